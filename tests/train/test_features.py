"""Averaged weights, clipping, optimizer groups, erasing, evaluation every few epochs and an early stop."""

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import sdnet
from sdnet.step_size import csc_layers
from sdnet.train import trainer as trainer_module
from sdnet.train.build import make_accelerator, make_model
from sdnet.train.data.dali import open_pictures
from sdnet.train.data.erasing import AREA, boxes, erase
from sdnet.train.ema import Ema
from sdnet.train.errors import UserError
from sdnet.train.execution import execution
from sdnet.train.job import Job
from sdnet.train.optimizer import make_optimizer
from sdnet.train.recipes import Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]

# 16 images: 4 steps an epoch.
SMALL = replace(demo(), width=4, epochs=2, batch=4, image_size=32, eval_resize=36, lr=0.01)


@pytest.fixture(scope="module")
def data(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [8, 8], [3, 2])


def train(data: Path, run: Path, recipe: Recipe, resume: bool = False) -> Trainer:
    trainer = Trainer(Job(recipe, data, RunFolder(run), resume, threads=1, log_every=2), open_pictures)
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return trainer


def small_model(**options: Any) -> Any:
    torch.manual_seed(0)
    return sdnet.create_model("sdnet18", 2, stem="cifar", image_size=8, width=4, **options)


def test_the_average_is_the_weighted_sum_of_all_weights() -> None:
    model = small_model()
    ema = Ema(model, 0.5)
    weights = [model.linear.weight.detach().clone()]
    for step in range(6):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.stem.norm.running_mean.add_(1.0)
            model.stem.norm.num_batches_tracked.add_(1)
        weights.append(model.linear.weight.detach().clone())
        ema.update(step)
    expected, mean = weights[0], 0.0
    for step, weight in enumerate(weights[1:]):
        decay = min(0.5, (1 + step) / (10 + step))
        expected, mean = decay * expected + (1 - decay) * weight, decay * mean + (1 - decay) * (step + 1)
    averaged = ema.model.state_dict()
    torch.testing.assert_close(averaged["linear.weight"], expected)
    torch.testing.assert_close(averaged["stem.norm.running_mean"], torch.full((4,), mean))
    assert averaged["stem.norm.num_batches_tracked"] == 6
    assert torch.equal(averaged["stem.conv.power_vector"], model.stem.conv.power_vector)


def test_the_average_is_projected_for_use_and_left_as_it_was() -> None:
    model = small_model()
    ema = Ema(model, 0.9)
    with torch.no_grad():
        model.stem.conv.weight.copy_(-model.stem.conv.weight.roll(1, 0))
    ema.update(1000)
    raw = {name: value.clone() for name, value in ema.state_dict().items()}
    inner: Any = ema.model
    norms = inner.stem.conv.weight.flatten(1).norm(dim=1)
    assert (norms < 0.99).all()
    with ema.projected():
        torch.testing.assert_close(inner.stem.conv.weight.flatten(1).norm(dim=1), torch.ones(4))
        assert sdnet.step_margins(inner)["stem.conv"] == pytest.approx(0.9, rel=1e-3)
    for name, value in ema.state_dict().items():
        assert torch.equal(value, raw[name]), name
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())


@pytest.fixture(scope="module")
def averaged(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("averaged") / "run"
    train(data, run, replace(SMALL, ema=0.9, clip_norm=1.0, random_erasing=0.5, holdout=4, batch=3))
    return run


def test_the_average_is_evaluated_and_exported_beside_the_live_weights(averaged: Path) -> None:
    lines = RunFolder(averaged).metrics()
    kinds = {f"{prefix}{kind}_top1" for prefix in ("", "ema_") for kind in ("val", "holdout")}
    assert all(kinds <= line.keys() for line in lines)
    assert lines[-1]["val_loss"] != lines[-1]["ema_val_loss"]
    model: Any = sdnet.create_model("sdnet18", 2, image_size=32, width=4)
    for name in ("last_ema", "best_ema"):
        model.load_state_dict(load_file(averaged / f"{name}.safetensors"))
        torch.testing.assert_close(model.stem.conv.weight.flatten(1).norm(dim=1), torch.ones(4))
    for name, prefix in (("last", ""), ("last_ema", "ema_")):
        with safe_open(averaged / f"{name}.safetensors", "pt") as file:
            assert file.metadata()["val_top1"] == f"{lines[-1][prefix + 'val_top1']:.4f}"


def test_a_run_with_an_average_resumes_exactly(data: Path, averaged: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import signal

    recipe = RunFolder(averaged).recipe()

    def rate(recipe: Recipe, now: int, steps: int) -> float:
        if now == 5:
            signal.raise_signal(signal.SIGTERM)
        return trainer_module_rate(recipe, now, steps)

    trainer_module_rate = trainer_module.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "learning_rate", rate)
        with pytest.raises(SystemExit):
            train(data, tmp_path / "run", recipe)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(data, tmp_path / "run", recipe, resume=True)
    for name in ("last", "last_ema", "best", "best_ema"):
        expected = load_file(averaged / f"{name}.safetensors")
        for key, value in load_file(tmp_path / "run" / f"{name}.safetensors").items():
            assert torch.equal(value, expected[key]), f"{name} {key}"


def test_clipping_bounds_the_step_and_a_large_bound_changes_nothing(data: Path, tmp_path: Path) -> None:
    plain = replace(SMALL, model="resnet18", momentum=0.0, weight_decay=0.0, warmup_epochs=0.0)
    once = replace(plain, epochs=1, batch=16, lr=1.0)  # one step, that is, minus the gradient
    start = make_model(once, 2, torch.device("cpu")).state_dict()
    moved = {}
    for clip in (0.0, 0.05, 1e9):
        end = train(data, tmp_path / str(clip), replace(once, clip_norm=clip)).model
        moved[clip] = torch.cat([(value.detach() - start[name]).flatten() for name, value in end.named_parameters()])
    assert float(moved[0.0].norm()) > 0.1
    assert float(moved[0.05].norm()) == pytest.approx(0.05, rel=1e-3)
    torch.testing.assert_close(moved[1e9], moved[0.0])
    torch.testing.assert_close(moved[0.05] / 0.05, moved[0.0] / moved[0.0].norm(), rtol=1e-3, atol=5e-6)


def names_without_decay(learn_lam: str = "no", **changes: Any) -> set[str]:
    model = small_model(learn_lam=learn_lam)
    recipe = replace(demo(), weight_decay=0.01, **changes)
    groups = make_optimizer(recipe, model).param_groups
    assert {group["weight_decay"] for group in groups} <= {0.0, 0.01}
    free = {id(parameter) for group in groups if not group["weight_decay"] for parameter in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    return {name for name, parameter in model.named_parameters() if id(parameter) in free}


def test_norms_biases_and_atoms_can_be_exempt_from_decay() -> None:
    assert names_without_decay() == set()
    norms = names_without_decay(decay_norms=False)
    assert {"stem.norm.weight", "stem.norm.bias", "stages.0.0.norm1.weight", "linear.bias"} <= norms
    assert "linear.weight" not in norms
    assert names_without_decay(decay_atoms=False) == {"stem.conv.weight"}
    assert names_without_decay(decay_norms=False, decay_atoms=False) == norms | {"stem.conv.weight"}


@pytest.mark.parametrize("learn_lam", ["layer", "atom"])
def test_a_learned_lambda_never_decays(learn_lam: str) -> None:
    assert names_without_decay(learn_lam) == {"stem.conv.raw_lam"}
    assert "stem.conv.raw_lam" in names_without_decay(learn_lam, decay_norms=False, optimizer="adamw")


def test_a_run_learns_lambda_and_resumes_exactly(data: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, learn_lam="layer", lam=0.2, ema=0.5, lr=0.1, weight_decay=0.5, epochs=1)
    train(data, tmp_path / "run", recipe)
    assert "lambda 0.2, learned per layer" in (tmp_path / "run" / "train.log").read_text()
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/lambda/stem.conv")
    assert [event.step for event in events] == [2, 4]
    model = sdnet.load_model(tmp_path / "run" / "last.safetensors")
    learned = float(csc_layers(model)["stem.conv"].lam.detach())
    assert learned == pytest.approx(events[-1].value)
    assert learned != pytest.approx(0.2, abs=1e-4)
    assert abs(learned - 0.2) < 0.05  # decay of raw_lam, -1.5, by 0.5 would have moved it by more
    train(data, tmp_path / "run", replace(recipe, epochs=2), resume=True)
    train(data, tmp_path / "whole", replace(recipe, epochs=2, warmup_epochs=1.0))
    one, two = (load_file(tmp_path / name / "last_ema.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(one[name], value) for name, value in two.items())


def test_a_lambda_that_cannot_be_learned_is_refused(tmp_path: Path) -> None:
    for changes, sentence in (
        ({"model": "resnet18"}, r"^learn_lam is 'atom'; the model resnet18 has no CSC layers\.$"),
        ({"lam": 0.0}, "^lam is 0; a lambda that is learned must be above 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(tmp_path / "no data", tmp_path / "run", replace(SMALL, learn_lam="atom", **changes))
        AcceleratorState._reset_state(reset_partial_state=True)


def test_adamw_takes_the_settings_of_the_recipe() -> None:
    optimizer = make_optimizer(replace(demo(), optimizer="adamw", momentum=0.8, beta2=0.95, lr=3e-3), small_model())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["lr"]) == ((0.8, 0.95), 3e-3)


def test_frozen_parameters_are_not_in_the_optimizer() -> None:
    model = small_model()
    model.linear.requires_grad_(False)
    held = {id(parameter) for group in make_optimizer(demo(), model).param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()} - {id(p) for p in model.linear.parameters()}


def test_erased_rectangles_have_the_asked_share_and_area() -> None:
    top, bottom, left, right = boxes(4000, 0.25, (32, 48), np.random.default_rng(0))
    assert min(top.min(), left.min()) == 0
    assert (bottom.max(), right.max()) == (32, 48)
    area = ((bottom - top) * (right - left))[bottom > top] / (32 * 48)
    assert len(area) / 4000 == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert area.mean() == pytest.approx(sum(AREA) / 2, rel=0.05)


def test_erasing_sets_one_rectangle_to_zero_and_keeps_the_rest() -> None:
    images = torch.rand(8, 3, 16, 16) + 1
    erased = erase(images, 1.0, np.random.default_rng(3))
    for image, before in zip(erased, images, strict=True):
        mask = image[0] == 0
        assert mask.any()
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        assert torch.equal(image, torch.where(mask, 0.0, before))
    assert torch.equal(erase(images, 0.0, np.random.default_rng(3)), images)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The top-1 accuracies that the evaluations give, in turn."""
    accuracies: list[float] = []

    def scores(*_: Any) -> dict[str, float]:
        return {"val_loss": 1.0, "val_top1": accuracies.pop(0), "val_top5": 100.0}

    monkeypatch.setattr(trainer_module, "evaluate", scores)
    yield accuracies
    assert not accuracies


def test_epochs_without_an_evaluation_have_no_scores(data: Path, tmp_path: Path, planted: list[float]) -> None:
    planted += [10.0, 20.0, 15.0]
    train(data, tmp_path / "run", replace(SMALL, model="resnet18", epochs=5, batch=16, eval_every=2))
    lines = RunFolder(tmp_path / "run").metrics()
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    assert {line["epoch"]: line["val_top1"] for line in lines if "val_top1" in line} == {2: 10.0, 4: 20.0, 5: 15.0}


def test_training_ends_early_without_a_better_score_and_stays_ended(
    data: Path, tmp_path: Path, planted: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    planted += [10.0, 30.0, 20.0, 30.0]
    recipe = replace(SMALL, model="resnet18", epochs=9, batch=16, early_stop=2)
    train(data, tmp_path / "run", recipe)
    assert [line["val_top1"] for line in RunFolder(tmp_path / "run").metrics()] == [10.0, 30.0, 20.0, 30.0]
    assert "Training ended after epoch 4: 2 epochs without a better top-1." in capsys.readouterr().out
    train(data, tmp_path / "run", recipe, resume=True)
    assert len(RunFolder(tmp_path / "run").metrics()) == 4


def test_synchronised_batch_norm_needs_gpus_and_keeps_the_names_of_the_weights(tmp_path: Path) -> None:
    recipe = replace(SMALL, sync_bn=True)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"^sync_bn needs GPUs; this run has cpu\.$"):
            make_accelerator(recipe, RunFolder(tmp_path))
    model = make_model(recipe, 2, torch.device("cpu"))
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    assert model.state_dict().keys() == make_model(SMALL, 2, torch.device("cpu")).state_dict().keys()


def state() -> tuple[Any, ...]:
    cudnn: Any = torch.backends.cudnn
    matmul = torch.backends.cuda.matmul
    return (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, torch.are_deterministic_algorithms_enabled())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tf32": False, "cudnn_benchmark": False}, (False, False, False, False)),
        ({"deterministic": True}, (True, True, False, True)),
    ],
    ids=str,
)
def test_a_run_computes_with_the_switches_of_its_recipe(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], expected: tuple[bool, ...]
) -> None:
    seen: list[tuple[Any, ...]] = []
    before, rate = state(), trainer_module.learning_rate
    monkeypatch.setattr(trainer_module, "learning_rate", lambda *rest: seen.append(state()) or rate(*rest))
    train(data, tmp_path / "run", replace(SMALL, model="resnet18", epochs=1, batch=16, **changes))
    assert seen == [expected]
    assert state() == before


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_a_compiled_run_takes_the_same_step_in_every_mode(data: Path, tmp_path: Path, mode: Any) -> None:
    recipe = replace(SMALL, epochs=1, batch=16)  # one step
    plain = train(data, tmp_path / "plain", recipe).model
    compiled = train(data, tmp_path / "compiled", replace(recipe, compile=True, compile_mode=mode)).model
    assert f"compiled, mode {mode}" in (tmp_path / "compiled" / "train.log").read_text()
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5), name


def test_execution_settings_hold_within_a_run_only() -> None:
    before = state()
    with execution(Recipe()):
        assert state() == (True, True, True, False)
    with execution(replace(Recipe(), tf32=False, cudnn_benchmark=False)):
        assert state() == (False, False, False, False)
    with execution(replace(Recipe(), deterministic=True)):
        assert state() == (True, True, False, True)
    assert state() == before


def test_what_is_not_deterministic_is_named_once() -> None:
    said: list[str] = []
    with execution(replace(Recipe(), deterministic=True), said.append):
        for _ in range(2):
            torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))
    general, operation = said
    assert general.startswith("--deterministic: equal runs need the same number of processes")
    assert operation == "--deterministic: put_ has no deterministic algorithm, so runs may differ in their last bits."
