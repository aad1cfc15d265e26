"""Planted delays appear in the phases where they were planted, and ratios are right."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdnet.bench import __main__ as front
from sdnet.bench import measure_training, step_clock, training_run
from sdnet.bench.isolation import WorkerError
from sdnet.bench.ledger import Row, read
from sdnet.bench.tables import training_table
from sdnet.bench.training_run import OFFICIAL, TrainingRun, TrainingSetting, noise
from sdnet.kernels.qualify import __main__ as qualify
from sdnet.kernels.qualify import timing
from sdnet.kernels.qualify.key import Flags
from sdnet.layers import CSCConv2d

CPU = torch.device("cpu")


class Clock:
    """A clock that only `sleep` advances."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def before(self, call: Callable, seconds: float = 0.25) -> Callable:
        """Return the call, delayed by so many seconds."""

        def slower(*arguments: Any, **named: Any) -> Any:
            self.sleep(seconds)
            return call(*arguments, **named)

        return slower


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of the benchmarks."""
    clock = Clock()
    for module in (timing, step_clock):
        monkeypatch.setattr(module, "time", clock)
    return clock


class Small(nn.Module):
    """One CSC layer and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = CSCConv2d(3, 4, 3, input_size=8), nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).mean(dim=(2, 3)))


@pytest.fixture
def small_models(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Make every model small; the forward pass of SDNet-18 sleeps three times as long as that of the others."""

    def make(setting: TrainingSetting) -> nn.Module:
        model = Small()
        model.conv.forward = clock.before(model.conv.forward, 0.6 if setting.model == "sdnet18" else 0.2)
        return model

    monkeypatch.setattr(training_run, "make_model", make)


def setting(model: str, batch: int = 2) -> TrainingSetting:
    return TrainingSetting(model, "cifar", batch, 8, 2, "fp32", "contiguous", compiled=False)


def train(out: Path, *arguments: str) -> tuple[int, list[Row]]:
    options = ["--image-size", "8", "--batch", "2", "--seconds", "0", "--turns", "1", "--warm-up", "1"]
    status = front.main(["train", "--out", str(out), *options, *arguments])
    return status, [row for _, row in read(out)]


@pytest.mark.usefixtures("small_models")
def test_ratio_to_resnet_on_known_delays(tmp_path: Path) -> None:
    status, rows = train(tmp_path, "--model", "resnet18", "sdnet18", "--turns", "5")
    assert status == 0
    assert [row.metrics["images_per_second"] for row in rows] == pytest.approx([2 / 0.2, 2 / 0.6])
    assert [row.metrics["forward_ms"] for row in rows] == pytest.approx([200, 600])
    _, _, resnet, sdnet = training_table(rows).splitlines()
    assert "| 10 [10–10] | 1.00× | 0% | 0% | 100% | 0% | 0% |" in resnet
    assert "| 3.33 [3.33–3.33] | 0.33× | 0% | 0% | 100% | 0% | 0% |" in sdnet


@pytest.mark.parametrize("phase", ["data", "refresh", "optimiser"])
def test_a_planted_delay_appears_in_its_phase_alone(phase: str, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(training_run, "make_model", lambda _: Small())
    run = TrainingRun(setting("resnet18"), CPU)
    batches = noise(run.setting, CPU)
    if phase == "data":
        batches = map(clock.before(lambda batch: batch), batches)
    elif phase == "refresh":
        run.optimizer.register_step_post_hook(clock.before(lambda *_: None))  # after the one of sdnet.attach
    else:
        run.optimizer.register_step_pre_hook(clock.before(lambda *_: None))
    run.clock.lap()
    run.step(batches)
    split = run.clock.split()
    assert set(split) == {"data", "refresh", "forward", "backward", "optimiser"}
    assert {name for name, time in split.items() if time} == {phase}
    assert split[phase] == 250


@pytest.mark.parametrize("model", ["resnet18", "sdnet18", "official_sdnet18"])
def test_models_learn_and_keep_memory_for_the_backward_pass(model: str) -> None:
    run = TrainingRun(setting(model), CPU)
    before = [weight.detach().clone() for weight in run.model.parameters()]
    batches = noise(run.setting, CPU)
    run.clock.lap()
    run.step(batches)
    assert all(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    assert run.loss.isfinite()
    assert set(run.clock.split()) == {"data", "refresh", "forward", "backward", "optimiser"}
    first_codes = 2 * 64 * 8 * 8 * 4 / 2**20
    assert first_codes < run.kept_for_backward(batches) < 100 * first_codes


@pytest.mark.parametrize(("keep", "residuals"), [(None, 3), (True, 3), (False, 0)])
def test_kept_memory_of_a_layer_counted_by_hand(
    keep: bool | None, residuals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x, both codes and perhaps the residual; what the pooling, classifier and loss keep is 100 bytes a picture."""
    monkeypatch.setattr(training_run, "make_model", lambda _: Small())
    run = TrainingRun(replace(setting("resnet18", batch=64), keep_residuals=keep), CPU)
    kept = run.kept_for_backward(noise(run.setting, CPU)) * 2**20 / 64
    assert 0 <= kept - 4 * 64 * (3 + residuals + 2 * 4) < 300


def test_a_model_with_a_nan_loss_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: TrainingSetting) -> nn.Module:
        linear = nn.Linear(3 * 8 * 8, 10)
        nn.init.constant_(linear.weight, float("nan"))
        return nn.Sequential(nn.Flatten(), linear)

    monkeypatch.setattr(training_run, "make_model", broken)
    status, (row,) = train(tmp_path, "--model", "resnet18")
    assert (status, row.status, row.reason) == (1, "refused", "its loss is nan")


@pytest.mark.usefixtures("small_models")
def test_a_setting_that_ends_its_process_is_refused_and_the_others_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDNet-18 ends its process if its implementation is "auto"."""
    train_in_turns = measure_training.train_in_turns

    def fragile(settings: list[TrainingSetting], *arguments: Any) -> Iterator[tuple[TrainingSetting, dict[str, Any]]]:
        for item in settings:
            if item.model == "sdnet18" and item.impl == "auto":
                raise WorkerError("its process ended by signal 6", str(item))
        yield from train_in_turns(settings, *arguments)

    monkeypatch.setattr(measure_training, "train_in_turns", fragile)
    status, rows = train(tmp_path, "--model", "resnet18", "sdnet18", "--impl", "auto", "torch")
    assert status == 1
    assert [(row.provider, row.settings["impl"], row.status) for row in rows] == [
        ("sdnet18", "auto", "refused"),
        ("resnet18", "auto", "ok"),
        ("sdnet18", "torch", "ok"),
    ]
    assert rows[0].reason == "its process ended by signal 6"


@pytest.mark.usefixtures("small_models")
def test_a_model_that_fails_while_it_is_timed_is_refused_and_the_others_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = measure_training.TimedRun.turn

    def failing(run: measure_training.TimedRun) -> float:
        if run.setting.model == "sdnet18":
            raise ValueError("step_size holds nan.")
        return turn(run)

    monkeypatch.setattr(measure_training.TimedRun, "turn", failing)
    status, rows = train(tmp_path, "--model", "resnet18", "sdnet18")
    assert status == 1
    assert {row.provider: (row.status, row.reason) for row in rows} == {
        "sdnet18": ("refused", "it raised ValueError: step_size holds nan."),
        "resnet18": ("ok", ""),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels can run on the GPU")
def test_a_setting_that_cannot_run_is_reported_and_the_others_train(tmp_path: Path) -> None:
    status, rows = train(tmp_path, "--model", "sdnet18", "--impl", "triton", "torch")
    assert status == 0
    assert [(row.settings["impl"], row.status) for row in rows] == [("triton", "unsupported"), ("torch", "ok")]


@pytest.mark.usefixtures("small_models")
def test_no_setting_is_started_after_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A model takes 0.2 s for its warm-up, and 0.2 s for the measurement of its memory."""
    monkeypatch.setattr(measure_training, "time", clock)
    models = ["--model", "resnet18", "official_sdnet18", "sdnet18"]
    status, rows = train(tmp_path, *models, "--budget", "0.5")
    assert status == 0
    assert {row.provider: row.status for row in rows} == {
        "resnet18": "ok",
        "official_sdnet18": "ok",
        "sdnet18": "skipped",
    }
    assert {row.reason for row in rows if row.status == "skipped"} == {"the budget of 0 seconds was spent"}


@pytest.mark.usefixtures("small_models")
def test_scaling_gives_a_row_for_each_size(tmp_path: Path) -> None:
    status, rows = train(tmp_path, "--model", "resnet18", "sdnet18", "--batch", "1", "2", "--n-steps", "1", "2")
    assert status == 0
    sizes = [(row.provider, row.shape["batch"], row.shape["n_steps"]) for row in rows]
    assert sizes == [
        (model, batch, steps) for batch in (1, 2) for model, steps in (("resnet18", 1), ("sdnet18", 1), ("sdnet18", 2))
    ]


def test_official_runs_as_published() -> None:
    parser = argparse.ArgumentParser()
    measure_training.add_arguments(parser)
    options = parser.parse_args(["--layout", "channels_last", "--compile", "on", "off"])
    chosen = list(measure_training.chosen(options, CPU, 2, 32))
    official = [item for item in chosen if item.model in OFFICIAL]
    assert {(item.layout, item.compiled) for item in official} == {("contiguous", False)}
    assert len(chosen) == 3 * 2 + 2


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_networks_train_under_the_flags_of_their_verdicts(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else no verdict on the update of the dictionaries is found: its key holds the precision of convolutions."""
    seen: list[Flags] = []
    warm_up = measure_training.TimedRun.warm_up

    def noting(run: measure_training.TimedRun, steps: int) -> None:
        seen.append(Flags.now())
        warm_up(run, steps)

    monkeypatch.setattr(measure_training.TimedRun, "warm_up", noting)
    train(tmp_path, "--model", "sdnet18", "--dtype", dtype)
    verdicts = qualify.flags_of(dtype, deterministic=False)
    assert [flags.text(precision=True) for flags in seen] == [verdicts.text(precision=True)]
    assert verdicts.text(precision=True) == f"{'ieee' if dtype == 'fp32' else 'tf32'}, cudnn.benchmark"


def test_every_compiled_network_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default torch.compile runs what it meets after 8 networks of one class as it is."""
    compiled: list[torch.fx.GraphModule] = []

    class Sized(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(3, width), nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x.mean(dim=(2, 3))))

    def noted(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(training_run, "make_model", lambda setting: Sized(setting.n_steps))
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=noted))
    steps = [str(number) for number in range(1, 11)]
    status, rows = train(tmp_path, "--model", "sdnet18", "--n-steps", *steps, "--compile", "on")
    assert status == 0
    assert len(rows) == len(compiled) == 10


def test_unknown_model_gets_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    status, rows = train(tmp_path, "--model", "resnet51")
    assert (status, rows) == (2, [])
    assert "--model is resnet51; it must be one of resnet18" in capsys.readouterr().err
