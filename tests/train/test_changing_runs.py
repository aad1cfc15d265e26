"""Starting, going on with and changing a run: `--resume auto`, `--override`, and the lock on the run folder."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sdnet
from sdnet.train.cli import parse_job
from sdnet.train.data.dali import open_pictures
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.lock import RunLock
from sdnet.train.overrides import FIXED
from sdnet.train.recipes import RECIPES, Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

RECIPE = replace(demo(), epochs=1, batch=5, width=4, image_size=32, eval_resize=36, lr=0.01)
CHANGED: dict[str, Any] = {"lr": 0.002, "epochs": 2, "nesterov": True, "label_smoothing": 0.1, "ema": 0.99}
WORDS = [word for name, value in CHANGED.items() for word in ("--override", f"{name}={str(value).lower()}")]


def parse(*options: str | Path) -> Job:
    return parse_job(RECIPES, "demo", ["--data", "pictures", *map(str, options)])


def refusal(*options: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        parse(*options)
    return str(caught.value)


def train(data: Path, job: Job) -> Trainer:
    trainer = Trainer(replace(job, data=data, threads=1), open_pictures)
    trainer.train()
    return trainer


def test_resume_auto_starts_and_goes_on_with_one_command(tmp_path: Path) -> None:
    command = ("--out", tmp_path / "run", "--resume", "auto", "--lr", "0.01")
    job = parse(*command)
    assert (job.resume, job.recipe.lr, job.run.path) == (False, 0.01, tmp_path / "run")
    job.run.create(job.recipe)  # the run died before its first checkpoint
    assert not parse(*command).resume
    job.run.previous_file.touch()  # it died while it wrote the second one
    assert parse(*command).resume
    assert parse(*command).recipe == job.recipe
    assert "another recipe; lr: 0.5, not 0.01" in refusal("--out", tmp_path / "run", "--resume", "auto", "--lr", "0.5")


def test_resume_auto_needs_the_folder() -> None:
    assert refusal("--resume", "auto").startswith("--resume auto needs --out RUN")


def test_a_resumed_run_takes_the_changed_settings_and_records_them(make_tree: MakeTree, tmp_path: Path) -> None:
    data, run = make_tree([8, 7], [3, 2]), RunFolder(tmp_path / "run")
    train(data, Job(RECIPE, data, run))
    job = parse("--resume", run.path, *WORDS)
    assert job.recipe == replace(RECIPE, **CHANGED)
    assert job.changes == (
        "epochs: 2, not 1",
        "lr: 0.002, not 0.01",
        "nesterov: True, not False",
        "label_smoothing: 0.1, not 0.0",
        "ema: 0.99, not 0.0",
    )
    trainer = Trainer(replace(job, data=data, threads=1), open_pictures)
    assert trainer.ema
    averaged = trainer.ema.state_dict()
    for name, value in trainer.model.state_dict().items():  # the average begins with the weights of the checkpoint
        assert torch.equal(averaged[name], value), name
    trainer.train()
    assert trainer.optimizer.param_groups[0]["nesterov"]
    assert "Changed from step 3 on; epochs: 2, not 1; " in "".join(trainer.notes)
    assert run.recipe() == job.recipe
    assert [line["epoch"] for line in run.metrics()] == [1, 2]
    starts = run.environments()
    assert [(start["step"], start["changes"]) for start in starts] == [(0, []), (3, list(job.changes))]
    same = parse("--resume", run.path, *WORDS)  # the scheduler's command again
    assert (same.recipe, same.changes) == (job.recipe, ())


def test_weights_from_before_a_change_keep_the_settings_that_reached_their_scores(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    data, run = make_tree([8, 7], [3, 2]), RunFolder(tmp_path / "run")
    train(data, Job(RECIPE, data, run))
    before = (run.path / "best.safetensors").read_bytes()
    assert sdnet.load_model(run.path / "best.safetensors").config["lam"] == 0.1
    train(data, parse("--resume", run.path, "--override", "lam=0.3", "--override", "lr=0.1"))
    assert run.recipe().lam == 0.3
    assert (run.path / "best.safetensors").read_bytes() == before, "with lambda 0.1, as it was evaluated"


def test_one_command_with_changes_goes_on_again_and_again(tmp_path: Path) -> None:
    command = ("--out", tmp_path, "--resume", "auto", "--lr", "0.01", "--override", "lr=0.002")
    stored = replace(demo(), lr=0.01)
    RunFolder(tmp_path).create(stored)
    RunFolder(tmp_path).checkpoint_file.touch()
    assert parse(*command).changes == ("lr: 0.002, not 0.01",)
    RunFolder(tmp_path).create(replace(stored, lr=0.002))
    assert (parse(*command).recipe.lr, parse(*command).changes) == (0.002, ())


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("milestones=30,60", (30, 60)),
        ("milestones=[30, 60]", (30, 60)),
        ("lr-min=1e-5", 1e-5),
        ("schedule=step", "step"),
        ("mu=0.5", 0.5),
        ("compile=True", True),
    ],
)
def test_values_are_written_as_in_json_or_as_options(tmp_path: Path, word: str, value: object) -> None:
    RunFolder(tmp_path).create(demo())
    name = word.partition("=")[0].replace("-", "_")
    assert parse("--resume", tmp_path, "--override", word).recipe.to_json()[name] == value


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("lr", "--override is 'lr'; it must be NAME=VALUE."),
        ("rate=1", "--override is 'rate=1'; there is no setting rate."),
        ("lr=-1", "--override: lr is -1; it must be a finite number of at least 0."),
        ("epochs=many", "--override: epochs is 'many'; it must be an int of at least 1."),
        (
            "model=resnet18",
            "--override is 'model=resnet18'; model cannot change within a run: it decides what is trained.",
        ),
        (
            "batch=8",
            "--override is 'batch=8'; batch cannot change within a run: it decides how many steps an epoch has.",
        ),
    ],
)
def test_a_change_that_is_not_possible_is_refused(tmp_path: Path, word: str, sentence: str) -> None:
    RunFolder(tmp_path).create(demo())
    assert refusal("--resume", tmp_path, "--override", word) == sentence
    assert refusal("--override", "lr=1") == (
        "--override changes a run that is resumed; give a new run the options themselves."
    )


def test_a_change_without_effect_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).create(replace(demo(), learn_lam="atom", ema=0.9))
    assert refusal("--resume", tmp_path, "--override", "lam=0.2") == (
        "--override: lam cannot change in a run that learns lambda; its values are among the weights."
    )
    assert refusal("--resume", tmp_path, "--override", "ema=0") == (
        "--override: ema cannot become 0; the files of the averaged weights would grow stale."
    )
    assert parse("--resume", tmp_path, "--override", "lam=0.1", "--override", "ema=0.99").recipe.ema == 0.99


def test_settings_that_are_fixed_exist() -> None:
    assert set(FIXED) <= set(Recipe().to_json())


def test_a_folder_is_locked_and_the_holder_named(tmp_path: Path) -> None:
    lock, second = RunLock(tmp_path / "runs" / "run"), RunLock(tmp_path / "runs" / "run")
    lock.acquire()
    with pytest.raises(UserError) as caught:
        second.acquire()
    sentence = f"The run folder {lock.folder} is in use by process {os.getpid()} on {socket.gethostname()}, since "
    assert str(caught.value).startswith(sentence)
    lock.release()
    assert list(tmp_path.iterdir()) == []
    with second:
        second.acquire()
    lock.acquire()
    (lock.folder / "recipe.json").touch()
    lock.release()
    assert list(lock.folder.iterdir()) == [lock.folder / "recipe.json"]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sdnet.train.lock import RunLock; "
        "RunLock(Path(sys.argv[1])).acquire(); print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE) as holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"locked\n"
        lock = RunLock(tmp_path)
        with pytest.raises(UserError, match=f"in use by process {holder.pid} on "):
            lock.acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert json.loads(lock.file.read_text())["pid"] == holder.pid  # left behind
    lock.acquire()
    assert json.loads(lock.file.read_text())["pid"] == os.getpid()
    lock.release()


def test_a_second_start_and_a_second_resume_are_refused_before_any_work(make_tree: MakeTree, tmp_path: Path) -> None:
    data, run = make_tree([8, 7], [3, 2]), RunFolder(tmp_path / "run")
    first = Trainer(Job(RECIPE, data, run, threads=1), open_pictures)
    for resume in (False, True):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            Trainer(Job(RECIPE, tmp_path / "no data", run, resume), open_pictures)
    first.train()
    with pytest.raises(UserError, match="holds a run: go on with --resume"):  # parsed before the first was done
        Trainer(Job(RECIPE, tmp_path / "no data", run), open_pictures)
    assert not (run.path / "run.lock").exists()


def test_a_refused_run_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Trainer(Job(RECIPE, tmp_path / "no data", RunFolder(tmp_path / "runs" / "run")), open_pictures)
    assert list(tmp_path.iterdir()) == []
