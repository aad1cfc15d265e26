"""The trainer in one process, on pictures through DALI."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sdnet
from sdnet.train import guards
from sdnet.train import trainer as trainer_module
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.data.dali import DaliLoader, open_pictures
from sdnet.train.data.folder import read_image_folder
from sdnet.train.errors import NonFiniteLossError, UserError
from sdnet.train.job import Job
from sdnet.train.metrics import evaluate
from sdnet.train.recipes import Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.schedule import learning_rate
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]
MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

# 21 images: 5 steps an epoch.
SMALL = replace(demo(), width=16, epochs=2, batch=4, image_size=32, eval_resize=36, lr=0.01)


@pytest.fixture(scope="module")
def data(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [8, 7, 6], [3, 2, 2])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer(data, run).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def trainer(data: Path, run: Path, recipe: Recipe = SMALL, resume: bool = False) -> Trainer:
    return Trainer(Job(recipe, data, RunFolder(run), resume, threads=1, log_every=2), open_pictures)


def metrics(run: Path) -> list[dict[str, float]]:
    """Without what depends on the machine's speed."""
    lines = RunFolder(run).metrics()
    return [{key: line[key] for key in line if key not in ("images_per_second", "data_wait")} for line in lines]


def assert_same_run(run: Path, expected: Path) -> None:
    """Exported weights and the whole checkpoint are equal to the bit."""
    for name in ("last", "best"):
        weights = load_file(run / f"{name}.safetensors")
        for key, value in load_file(expected / f"{name}.safetensors").items():
            assert torch.equal(weights[key], value), f"{name} {key}"
    stored, wanted = (flat(vars(Checkpoint.load(folder / "last.pt"))) for folder in (run, expected))
    assert stored.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(stored[key], value) if isinstance(value, torch.Tensor) else stored[key] == value, key


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries and lists, by their path."""
    if not isinstance(value, dict | list):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {path: leaf for key, inner in pairs for path, leaf in flat(inner, f"{name}/{key}").items()}


def send_signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets the signal while it takes this step."""

    def rate(recipe: Recipe, now: int, steps_per_epoch: int) -> float:
        if now == step:
            signal.raise_signal(number)
        return learning_rate(recipe, now, steps_per_epoch)

    monkeypatch.setattr(trainer_module, "learning_rate", rate)


def test_a_run_leaves_its_folder(whole: Path) -> None:
    files = {"recipe.json", "model.json", "environment.json", "metrics.jsonl", "train.log", "tensorboard"}
    files |= {"curve.png", "atoms.png"}
    state = {"best.safetensors", "last.safetensors", "last.pt", "previous.pt"}
    assert {file.name for file in whole.iterdir()} == files | state
    assert RunFolder(whole).recipe() == SMALL
    assert json.loads((whole / "environment.json").read_text())[0]["processes"] == 1
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))
    lines = RunFolder(whole).metrics()
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 5), (2, 10)]
    assert {"train_loss", "val_loss", "val_top1", "val_top5", "images_per_second", "data_wait", "lr"} <= lines[0].keys()


def test_saved_weights_give_the_reported_accuracy(data: Path, whole: Path) -> None:
    _, val = read_image_folder(data)
    loader = DaliLoader(val, batch=3, size=32, resize=36, augment=False, threads=1)
    for name in ("best", "last"):
        model = sdnet.load_model(whole / f"{name}.safetensors")
        assert model.class_names == ("class 00", "class 01", "class 02")
        scores = evaluate(model, loader, 7, torch.device("cpu"))
        lines = RunFolder(whole).metrics()
        line = lines[-1] if name == "last" else max(lines, key=lambda line: line["val_top1"])
        assert scores == pytest.approx({key: line[key] for key in scores}, rel=1e-5)
        facts = sdnet.read_weights(whole / f"{name}.safetensors").facts
        assert {key: facts[key] for key in scores} == {key: f"{line[key]:.4f}" for key in scores}
        assert (facts["epoch"], facts["step"]) == (str(line["epoch"]), str(line["step"]))


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 4), (signal.SIGTERM, 7)],
    ids=["ctrl-c", "early", "last step of an epoch", "second epoch"],
)
def test_a_signal_ends_with_a_checkpoint_and_a_resume_gives_the_same_run(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, step: int
) -> None:
    with monkeypatch.context() as patch:
        send_signal_at(step, number, patch)
        with pytest.raises(SystemExit) as caught:
            trainer(data, tmp_path / "halves").train()
    assert caught.value.code == 128 + number
    checkpoint = Checkpoint.load(tmp_path / "halves" / "last.pt")
    state = checkpoint.shared["state"]
    assert (state["epoch"], state["batch"], state["step"]) == (step // 5, step % 5 + 1, step + 1)

    trainer(data, tmp_path / "halves", resume=True).train()
    assert metrics(tmp_path / "halves") == metrics(whole)
    assert_same_run(tmp_path / "halves", whole)


def test_a_finished_run_can_be_resumed_and_says_so(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(SMALL, epochs=1)
    trainer(data, tmp_path / "run", recipe).train()
    before = metrics(tmp_path / "run")
    trainer(data, tmp_path / "run", recipe, resume=True).train()
    assert metrics(tmp_path / "run") == before
    said = capsys.readouterr().out
    assert "step 2/5  epoch 1  loss" in said
    assert said.count("Done: best top-1") == said.count(f"the run folder is {tmp_path / 'run'}") == 2


def test_resume_with_other_pictures_is_refused(make_tree: MakeTree, whole: Path) -> None:
    with pytest.raises(UserError, match="the files or classes of the training data have changed"):
        trainer(make_tree([8, 7, 5], [3, 2, 2]), whole, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "learning_rate", lambda recipe, step, steps: 0.01 if step < 5 else 1e30)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer(data, tmp_path / "run").train()
    kept = tmp_path / "run" / "last.pt"
    assert str(caught.value) == (
        f"The training loss became infinite or NaN at step 7, in epoch 2; the last good checkpoint is {kept}."
    )
    checkpoint = Checkpoint.load(kept)
    assert (checkpoint.shared["state"]["epoch"], checkpoint.shared["state"]["step"]) == (1, 5)
    assert all(value.isfinite().all() for value in checkpoint.shared["model"].values())


# One step an epoch: its loss is still finite, the weights after it are not.
EXPLODES_AT_ONCE = replace(SMALL, batch=16, lr=1e38, weight_decay=1e30)
# The weights after it are finite, but the validation loss is not.
OVERFLOWS_IN_EVALUATION = replace(SMALL, batch=16, lr=1e20)


def test_weights_that_are_not_finite_stop_the_run_before_the_evaluation(data: Path, tmp_path: Path) -> None:
    sentence = r"^[a-z0-9.]+ became infinite or NaN after step 1, in epoch 1; no checkpoint had been written yet\.$"
    with pytest.raises(NonFiniteLossError, match=sentence):
        trainer(data, tmp_path / "run", EXPLODES_AT_ONCE).train()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    sentence = "The validation loss became infinite or NaN after step 1, in epoch 1; no checkpoint had been written yet"
    with pytest.raises(NonFiniteLossError, match=sentence):
        trainer(data, tmp_path / "run", OVERFLOWS_IN_EVALUATION).train()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_weights_that_are_not_finite_are_not_saved_on_a_signal(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send_signal_at(0, signal.SIGTERM, monkeypatch)
    with pytest.raises(
        NonFiniteLossError, match=r"[a-z0-9.]+ became infinite or NaN after step 1, in epoch 1; no check"
    ):
        trainer(data, tmp_path / "run", EXPLODES_AT_ONCE).train()
    assert not (tmp_path / "run" / "last.pt").exists()


def margins_of(weights: dict[str, torch.Tensor]) -> dict[str, float]:
    model = sdnet.create_model("sdnet18", 3, image_size=32, width=16)
    model.load_state_dict(weights)
    return sdnet.step_margins(model)


def test_evaluated_and_exported_weights_have_converged_step_sizes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.9 is the official margin; in the training itself the step size follows the weights approximately."""
    evaluated: list[dict[str, float]] = []

    def note_margins(model: torch.nn.Module, *rest: Any) -> dict[str, float]:
        evaluated.append(sdnet.step_margins(model))
        return evaluate(model, *rest)

    monkeypatch.setattr(trainer_module, "evaluate", note_margins)
    send_signal_at(7, signal.SIGTERM, monkeypatch)
    with pytest.raises(SystemExit):
        trainer(data, tmp_path / "run", replace(SMALL, lr=0.5, warmup_epochs=0.0)).train()
    within_epoch_2 = margins_of(load_file(tmp_path / "run" / "last.safetensors"))
    for margins in (*evaluated, margins_of(load_file(tmp_path / "run" / "best.safetensors")), within_epoch_2):
        assert margins == pytest.approx(dict.fromkeys(margins, 0.9), rel=1e-3)
    live = Checkpoint.load(tmp_path / "run" / "last.pt").shared["model"]
    exported = load_file(tmp_path / "run" / "last.safetensors")
    different = {name for name, value in live.items() if not torch.equal(value, exported[name])}
    assert "stem.conv.step_size" in different, "a stop must not change the training"
    assert different <= {name for name in live if name.startswith("stem.conv.") and name != "stem.conv.weight"}


def test_the_largest_step_margin_is_logged(whole: Path) -> None:
    assert all(0.8 < line["step_margin"] < 1.1 for line in RunFolder(whole).metrics())
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    reports = [(event.step, event.value) for event in events.Scalars("train/step_margin")]
    assert [step for step, _ in reports] == [2, 4, 6, 8, 10]
    assert all(0.8 < margin < 1.1 for _, margin in reports)
    assert [event.step for event in events.Images("atoms/stem.conv")] == [5, 10]


def test_a_step_size_that_diverges_is_reported_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(guards, "DIVERGENCE", 0.1)
    trainer(data, tmp_path / "run", replace(SMALL, epochs=2)).train()
    said = capsys.readouterr().out
    assert said.count("Warning: step size x eigenvalue of stem.conv is ") == 1


@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "bf16"}, {"channels_last": True}, {"accumulate": 2}, {"model": "resnet18"}],
    ids=str,
)
def test_execution_settings_train(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    trainer(data, tmp_path / "run", replace(SMALL, epochs=1, **changes)).train()
    assert metrics(tmp_path / "run")[0]["train_loss"] < 10


def test_channels_last_gives_the_same_losses(data: Path, tmp_path: Path) -> None:
    """In the first step: later ones amplify rounding."""
    losses = []
    for channels_last in (False, True):
        run = tmp_path / str(channels_last)
        trainer(data, run, replace(SMALL, epochs=1, batch=16, channels_last=channels_last)).train()
        losses.append(metrics(run)[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_image_a_batch_trains_where_the_last_stage_is_larger(data: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, stem="cifar", epochs=1, batch=16, accumulate=16, image_size=16, eval_resize=16)
    trainer(data, tmp_path / "run", recipe).train()
    assert metrics(tmp_path / "run")[0]["train_loss"] < 10


def test_a_damaged_checkpoint_is_said_before_the_data_are_opened(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    file = tmp_path / "run" / "last.pt"
    file.write_bytes(file.read_bytes()[:1000])
    (tmp_path / "run" / "previous.pt").unlink()
    with pytest.raises(UserError, match=f"^The checkpoint {file} is damaged or cut off"):
        trainer(tmp_path / "no data", tmp_path / "run", resume=True)


def test_a_checkpoint_with_other_parameters_is_refused_in_one_sentence(data: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(UserError, match=r"^The model in the checkpoint .*last\.pt does not fit: [^\n]*$"):
        trainer(data, tmp_path / "run", replace(SMALL, model="resnet18"), resume=True)


def test_a_full_disk_ends_the_run_with_one_sentence(data: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=15m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        with pytest.raises(UserError) as caught:
            trainer(data, disk / "run", replace(SMALL, epochs=1)).train()
        assert str(caught.value) == (
            f"The run folder {disk / 'run'} cannot be written: No space left on device; there is no checkpoint."
        )
        assert not list((disk / "run").glob(".*"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
