"""Full disks and limits: one sentence, before any work where that can be known, and the last good state stays whole."""

import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdnet.train.checkpoint import Checkpoint
from sdnet.train.data.dali import open_pictures
from sdnet.train.disk_space import sizes
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.recipes import Recipe, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

RECIPE = replace(demo(), epochs=3, batch=5, width=4, image_size=32, eval_resize=36, lr=0.01, ema=0.9)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def train(data: Path, run: Path, resume: bool = False, recipe: Recipe = RECIPE, **settings: Any) -> None:
    Trainer(Job(recipe, data, RunFolder(run), resume, threads=1, **settings), open_pictures).train()


def test_a_full_disk_is_found_before_any_work(disk: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        train(tmp_path / "no data", disk / "run", recipe=replace(RECIPE, width=32))
    sentence = f"The run folder {disk / 'run'} cannot be written: No space left on device; there is no checkpoint."
    assert str(caught.value) == sentence
    assert list(disk.iterdir()) == []


def test_a_limit_on_the_size_of_files_is_found_before_any_work(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large; there is no checkpoint"):
            train(tmp_path / "no data", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_during_a_run_keeps_the_last_checkpoint_and_a_resume_goes_on(
    make_tree: MakeTree, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = make_tree([8, 7], [3, 2]), disk / "run"
    train(data, tmp_path / "whole")
    filler = disk / "filler"
    save = Checkpoint.save

    def fill_and_save(self: Checkpoint, *files: Path) -> None:
        if self.shared["state"]["epoch"] == 2:
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
        save(self, *files)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", fill_and_save)
        with pytest.raises(UserError) as caught:
            train(data, run)
    assert str(caught.value) == (
        f"The run folder {run} cannot be written: No space left on device; {run / 'last.pt'} is the last checkpoint."
    )
    assert not list(run.glob(".*"))
    assert not (run / "run.lock").exists()
    assert Checkpoint.load(run / "last.pt").shared["state"]["epoch"] == 1
    with pytest.raises(UserError, match="No space left on device"):  # still full: said before any work
        train(tmp_path / "no data", run, resume=True)
    filler.unlink()
    train(data, run, resume=True)
    for name in ("last.safetensors", "best.safetensors", "last_ema.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_space_that_is_reserved_is_what_a_run_takes(make_tree: MakeTree, tmp_path: Path) -> None:
    """At most: the model is counted with 1000 classes, and there is some slack."""
    train(make_tree([8, 7], [3, 2]), tmp_path / "run")
    taken = sum(file.stat().st_size for file in (tmp_path / "run").iterdir() if file.suffix in (".pt", ".safetensors"))
    largest = (tmp_path / "run" / "last.pt").stat().st_size
    assert taken + largest < sum(sizes(RECIPE, resume=False)) < 3 * taken
