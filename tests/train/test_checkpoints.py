"""Checkpoints within epochs: when they are written, in which order, and what a resume does with a damaged one."""

import io
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from sdnet.train import saving
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.data.dali import open_pictures
from sdnet.train.errors import UserError
from sdnet.train.interrupt import Interrupt
from sdnet.train.job import Job
from sdnet.train.recipes import demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]

# 15 images: 3 steps an epoch.
RECIPE = replace(demo(), epochs=2, batch=5, width=4, image_size=32, eval_resize=36, lr=0.01)


@pytest.fixture(scope="module")
def data(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tree(tmp_path_factory.mktemp("data"), [8, 7], [3, 2])


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from beginning to end."""
    return finished(data, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def two_steps(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run with a checkpoint every two steps."""
    return finished(data, tmp_path_factory.mktemp("two steps") / "run", checkpoint_every=2)


def trainer(data: Path, run: Path, resume: bool = False, **settings: Any) -> Trainer:
    return Trainer(Job(RECIPE, data, RunFolder(run), resume, threads=1, **settings), open_pictures)


def finished(data: Path, run: Path, **settings: Any) -> Path:
    trainer(data, run, **settings).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return run


class Killed(BaseException):
    """Ends a run where a kill would, without any of the code that runs after an error."""


def place(file: Path) -> tuple[int, int, int]:
    state = Checkpoint.load(file).shared["state"]
    return state["epoch"], state["batch"], state["step"]


def assert_same(run: Path, expected: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), name
    one, two = (Checkpoint.load(folder / "last.pt") for folder in (run, expected))
    assert torch_bytes(one) == torch_bytes(two)


def torch_bytes(checkpoint: Checkpoint) -> bytes:
    content = io.BytesIO()
    torch.save(vars(checkpoint), content)
    return content.getvalue()


def test_a_checkpoint_every_two_steps_and_the_one_before(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    written: list[tuple[tuple[int, int, int], ...]] = []
    save = saving.Saver.save

    def note(self: saving.Saver, *arguments: Any) -> None:
        save(self, *arguments)
        files = (self.run.checkpoint_file, self.run.previous_file)
        written.append(tuple(place(file) for file in files if file.exists()))

    monkeypatch.setattr(saving.Saver, "save", note)
    trainer(data, tmp_path / "run", checkpoint_every=2, keep_every=2).train()
    last = [files[0] for files in written]
    assert last == [(0, 2, 2), (1, 0, 3), (1, 1, 4), (2, 0, 6)]  # step 6 ends an epoch: one checkpoint, not two
    assert [files[1:] for files in written] == [(), *[(before,) for before in last[:-1]]]
    assert place(tmp_path / "run" / "epoch-0002.pt") == (2, 0, 6)
    assert (tmp_path / "run" / "epoch-0002.safetensors").read_bytes() == (
        tmp_path / "run" / "last.safetensors"
    ).read_bytes()
    assert not (tmp_path / "run" / "epoch-0001.pt").exists()


def test_a_kill_before_an_epoch_is_kept_does_not_lose_it(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "keep_checkpoint", kill)
        with pytest.raises(Killed):
            trainer(data, tmp_path / "run", keep_every=1).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer(data, tmp_path / "run", resume=True, keep_every=1).train()
    assert [place(tmp_path / "run" / f"epoch-000{epoch}.pt") for epoch in (1, 2)] == [(1, 0, 3), (2, 0, 6)]
    assert load_file(tmp_path / "run" / "epoch-0001.safetensors").keys()


def test_best_weights_from_after_the_checkpoint_are_set_aside(data: Path, whole: Path, tmp_path: Path) -> None:
    """The run goes on from its first epoch, as docs/training.md says; its best weights are of the second one."""
    run = finished(data, tmp_path / "run", keep_every=1)
    shutil.copyfile(run / "last.safetensors", run / "best.safetensors")
    shutil.copyfile(run / "epoch-0001.pt", run / "last.pt")
    resumed = trainer(data, run, resume=True)
    resumed.train()
    note = f"{run / 'best.safetensors'} is of step 6, after this checkpoint; it is now best.later.safetensors."
    assert note in resumed.notes
    assert (run / "best.safetensors").read_bytes() == (whole / "best.safetensors").read_bytes()
    assert (run / "best.later.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()


def test_a_run_that_changes_from_fp16_leaves_the_scale_of_its_gradients_behind(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    checkpoint = Checkpoint.load(run / "last.pt")
    checkpoint.shared["scaler"] = {"scale": 65536.0, "growth_factor": 2.0}
    checkpoint.save(run / "last.pt")
    trainer(data, run, resume=True).train()
    checkpoint.shared["others"] = {}
    checkpoint.save(run / "last.pt")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="parts that this run does not have: others"):
        trainer(data, run, resume=True)


def test_a_checkpoint_after_some_minutes(data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The clock advances 40 seconds whenever it is read."""
    now = iter(range(0, 10**6, 40))
    monkeypatch.setattr(saving.time, "monotonic", lambda: next(now))
    places = []
    save = saving.Saver.save
    monkeypatch.setattr(saving.Saver, "save", lambda self, *rest: places.append(self.state.step) or save(self, *rest))
    trainer(data, tmp_path / "run", checkpoint_minutes=1).train()
    assert places == [2, 3, 5, 6]


def test_checkpoints_do_not_change_a_run_and_each_resumes_exactly(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """A run is killed after each of its checkpoints in turn, before it has exported the weights."""
    save = Checkpoint.save

    def save_and_die(self: Checkpoint, *files: Path) -> None:
        save(self, *files)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_and_die)
        for resume in (False, True, True, True, True, True):
            with pytest.raises(Killed):
                trainer(data, tmp_path / "run", resume, checkpoint_every=1).train()
    assert place(tmp_path / "run" / "last.pt") == (2, 0, 6)
    trainer(data, tmp_path / "run", resume=True).train()
    assert_same(tmp_path / "run", whole)


def test_weights_are_those_of_the_checkpoint(two_steps: Path) -> None:
    weights = load_file(two_steps / "last.safetensors")
    stored = Checkpoint.load(two_steps / "last.pt").shared["model"]
    assert all(torch.equal(weights[name], value) for name, value in stored.items())


@pytest.mark.parametrize("damage", [lambda c: b"", lambda c: c[:-100], lambda c: b"x" + c[1:], None], ids=range(4))
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path,
    whole: Path,
    two_steps: Path,
    tmp_path: Path,
    damage: Callable[[bytes], bytes] | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(two_steps, tmp_path / "run")
    file, previous = tmp_path / "run" / "last.pt", tmp_path / "run" / "previous.pt"
    assert place(previous) == (1, 1, 4)
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    trainer(data, tmp_path / "run", resume=True).train()
    sentence = f"The run goes on from the checkpoint before, {previous}, epoch 2, step 4."
    said = capsys.readouterr().out
    assert said.count(sentence) == 1
    assert file.name in said
    assert_same(tmp_path / "run", whole)
    assert place(previous) == (1, 1, 4), "the damaged file must not take its place"


def test_two_damaged_checkpoints_are_both_named(data: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create(RECIPE)
    run.checkpoint_file.write_bytes(b"")
    run.previous_file.write_bytes(b"1")
    with pytest.raises(UserError) as caught:
        run.load_checkpoint()
    assert str(run.checkpoint_file) in str(caught.value)
    assert str(run.previous_file) in str(caught.value)


def test_no_flipped_bit_changes_what_is_loaded(tmp_path: Path) -> None:
    """Each of the bits is either in a place that means nothing, or found."""
    file = tmp_path / "last.pt"
    checkpoint = Checkpoint("digest", {"model": {"weight": torch.arange(4.0)}}, [{"meter": {"sums": torch.ones(2)}}])
    checkpoint.save(file)
    whole, wanted, found = file.read_bytes(), torch_bytes(checkpoint), 0
    for index in range(0, len(whole), 5):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 4]) + whole[index + 1 :])
        try:
            loaded = Checkpoint.load(file)
        except UserError:
            found += 1
        else:
            assert torch_bytes(loaded) == wanted, index
    assert found > 100


def test_what_a_killed_process_left_unfinished_goes(tmp_path: Path) -> None:
    (tmp_path / ".last.pt.tmp").touch()
    RunFolder(tmp_path).create(RECIPE)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_its_repetition_changes_nothing(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert interrupt.signal == 0
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert interrupt.signal == number
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_has_its_usual_effect_after_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sdnet.train.interrupt.PATIENCE", 0.0)
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As SIGHUP is under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            signal.raise_signal(signal.SIGHUP)
        assert interrupt.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)
