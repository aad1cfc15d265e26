"""The trainer in one process, on pictures through DALI."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import sdnet
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

# 21 pictures: 5 steps an epoch.
SMALL = replace(demo(), epochs=2, batch=4, image_size=32, eval_resize=36, lr=0.01)


@pytest.fixture(scope="module")
def data(write_tree, tmp_path_factory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [8, 7, 6], [3, 2, 2])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """A run from beginning to end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    trainer(data, run).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


def trainer(data: Path, run: Path, recipe: Recipe = SMALL, resume: bool = False) -> Trainer:
    job = Job(recipe, data, RunFolder(run), resume, threads=1, log_every=2)
    return Trainer(job, open_pictures)


def metrics(run: Path) -> list[dict[str, float]]:
    """Without what depends on the machine's speed."""
    lines = RunFolder(run).metrics()
    return [{key: line[key] for key in line if key not in ("images_per_second", "data_wait")} for line in lines]


def send_signal_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets the signal while it takes this step."""

    def rate(recipe: Recipe, now: int, steps_per_epoch: int) -> float:
        if now == step:
            signal.raise_signal(number)
        return learning_rate(recipe, now, steps_per_epoch)

    monkeypatch.setattr(trainer_module, "learning_rate", rate)


def test_a_run_leaves_its_folder(whole):
    files = {"recipe.json", "environment.json", "metrics.jsonl", "curve.png", "tensorboard"}
    assert {file.name for file in whole.iterdir()} == files | {"best.safetensors", "last.safetensors", "last.pt"}
    assert RunFolder(whole).recipe() == SMALL
    assert json.loads((whole / "environment.json").read_text())[0]["processes"] == 1
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))
    lines = RunFolder(whole).metrics()
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 5), (2, 10)]
    assert {"train_loss", "val_loss", "val_top1", "val_top5", "images_per_second", "data_wait", "lr"} <= lines[0].keys()


def test_saved_weights_give_the_reported_accuracy(data, whole):
    _, val = read_image_folder(data)
    loader = DaliLoader(val, batch=3, size=32, resize=36, augment=False, threads=1)
    for name in ("best", "last"):
        model = sdnet.create_model("sdnet18", 3, image_size=32)
        model.load_state_dict(load_file(whole / f"{name}.safetensors"))
        scores = evaluate(model, loader, 7, torch.device("cpu"))
        lines = RunFolder(whole).metrics()
        line = lines[-1] if name == "last" else max(lines, key=lambda line: line["val_top1"])
        assert scores == pytest.approx({key: line[key] for key in scores}, rel=1e-5)


@pytest.mark.parametrize(
    ("number", "step"),
    [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 4), (signal.SIGTERM, 7)],
    ids=["ctrl-c", "early", "last step of an epoch", "second epoch"],
)
def test_a_signal_ends_with_a_checkpoint_and_a_resume_gives_the_same_run(
    data, whole, tmp_path, monkeypatch, number, step
):
    with monkeypatch.context() as patch:
        send_signal_at(step, number, patch)
        with pytest.raises(SystemExit) as caught:
            trainer(data, tmp_path / "halves").train()
    assert caught.value.code == 128 + number
    checkpoint = Checkpoint.load(tmp_path / "halves" / "last.pt")
    assert (checkpoint.epoch, checkpoint.batch, checkpoint.step) == (step // 5, step % 5 + 1, step + 1)

    trainer(data, tmp_path / "halves", resume=True).train()
    assert metrics(tmp_path / "halves") == metrics(whole)
    weights = load_file(tmp_path / "halves" / "last.safetensors")
    for name, value in load_file(whole / "last.safetensors").items():
        assert torch.equal(weights[name], value), name


def test_a_finished_run_can_be_resumed_and_says_so(data, tmp_path, capsys):
    recipe = replace(SMALL, epochs=1)
    trainer(data, tmp_path / "run", recipe).train()
    before = metrics(tmp_path / "run")
    trainer(data, tmp_path / "run", recipe, resume=True).train()
    assert metrics(tmp_path / "run") == before
    said = capsys.readouterr().out
    assert "step 2/5  epoch 1  loss" in said
    assert said.count("Done: best top-1") == said.count(f"the run folder is {tmp_path / 'run'}") == 2


def test_resume_with_other_pictures_is_refused(make_tree, whole):
    with pytest.raises(UserError, match="the files or classes of the training data have changed"):
        trainer(make_tree([8, 7, 5], [3, 2, 2]), whole, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(data, tmp_path):
    explodes_in_epoch_2 = replace(SMALL, schedule="step", milestones=(1,), gamma=1e30)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer(data, tmp_path / "run", explodes_in_epoch_2).train()
    kept = tmp_path / "run" / "last.pt"
    assert str(caught.value) == (
        f"The training loss became infinite or NaN at step 7, in epoch 2; the last good checkpoint is {kept}."
    )
    checkpoint = Checkpoint.load(kept)
    assert (checkpoint.epoch, checkpoint.step) == (1, 5)
    assert all(value.isfinite().all() for value in checkpoint.model.values())


# One step an epoch: its loss is still finite, the weights after it are not.
EXPLODES_AT_ONCE = replace(SMALL, batch=16, lr=1e38, weight_decay=1e30)


def test_a_validation_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    sentence = "The validation loss became infinite or NaN after step 1, in epoch 1; no checkpoint had been written yet"
    with pytest.raises(NonFiniteLossError, match=sentence):
        trainer(data, tmp_path / "run", EXPLODES_AT_ONCE).train()
    assert not (tmp_path / "run" / "last.pt").exists()


def test_weights_that_are_not_finite_are_not_saved_on_a_signal(data, tmp_path, monkeypatch):
    send_signal_at(0, signal.SIGTERM, monkeypatch)
    with pytest.raises(
        NonFiniteLossError, match=r"[a-z0-9.]+ became infinite or NaN after step 1, in epoch 1; no check"
    ):
        trainer(data, tmp_path / "run", EXPLODES_AT_ONCE).train()
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize(
    "changes",
    [{"mixed_precision": "bf16"}, {"channels_last": True}, {"accumulate": 2}, {"model": "resnet18"}],
    ids=str,
)
def test_execution_settings_train(data, tmp_path, changes):
    trainer(data, tmp_path / "run", replace(SMALL, epochs=1, **changes)).train()
    assert metrics(tmp_path / "run")[0]["train_loss"] < 10


def test_channels_last_gives_the_same_losses(data, tmp_path):
    """In the first step: later ones amplify rounding."""
    losses = []
    for channels_last in (False, True):
        run = tmp_path / str(channels_last)
        trainer(data, run, replace(SMALL, epochs=1, batch=16, channels_last=channels_last)).train()
        losses.append(metrics(run)[0]["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_fp16_needs_a_gpu(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="Mixed precision fp16 needs a GPU; this run has cpu"):
        trainer(data, tmp_path / "run", replace(SMALL, mixed_precision="fp16"))


def test_the_launcher_and_the_recipe_must_agree(data, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="launched with mixed precision bf16 but the recipe says no: pass --mixed"):
        trainer(data, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(UserError, match="launched with 4 accumulation steps: pass --accumulate 4 instead"):
        trainer(data, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch": 32}, "The training set is smaller than one batch of 32."),
        ({"model": "sdnet19"}, "name is 'sdnet19'; it must be one of "),
        ({"shortcut": False}, "shortcut=False is for "),
    ],
    ids=str,
)
def test_what_does_not_fit_is_said_before_the_run_folder_is_made(data, tmp_path, changes, sentence):
    with pytest.raises(UserError) as caught:
        trainer(data, tmp_path / "run", replace(SMALL, **changes))
    assert sentence in str(caught.value)
    assert not (tmp_path / "run").exists()
