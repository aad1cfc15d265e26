"""An image that breaks during a run: the run names it, and a resume can leave it out, reproducibly."""

import io
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdnet.train import trainer as trainer_module
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.data.dali import DaliLoader, open_pictures
from sdnet.train.data.folder import read_split
from sdnet.train.data.loader import Rank
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Job
from sdnet.train.recipes import demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.schedule import learning_rate
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]

# 16 images: 8 steps an epoch.
RECIPE = replace(demo(), epochs=2, batch=2, width=4, image_size=32, eval_resize=36, lr=0.01)


def run(data: Path, folder: Path, resume: bool = False, **settings: Any) -> Trainer:
    trainer = Trainer(Job(RECIPE, data, RunFolder(folder), resume, threads=1, **settings), open_pictures)
    trainer.train()
    return trainer


def stopped(data: Path, folder: Path, step: int, resume: bool = False, **settings: Any) -> None:
    """The run after some steps."""

    def rate(recipe: Any, now: int, *rest: Any) -> float:
        if now == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return learning_rate(recipe, now, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "learning_rate", rate)
        with pytest.raises(SystemExit):
            run(data, folder, resume, **settings)


def image_of_step(data: Path, step: int) -> Path:
    """The first image of a step of the first epoch."""
    images = read_split(data / "train")
    index = np.random.default_rng((RECIPE.seed, 0)).permutation(len(images))[step * RECIPE.batch]
    return data / "train" / str(images.files[index])


def spoil(file: Path) -> None:
    """Its beginning and its end: what a look at both ends takes for complete."""
    file.write_bytes(file.read_bytes()[:100] + b"\xff\xd9")


def torch_bytes(run: Path) -> bytes:
    content = io.BytesIO()
    torch.save(vars(Checkpoint.load(run / "last.pt")), content)
    return content.getvalue()


def test_a_broken_image_ends_a_run_and_a_resume_leaves_it_out(make_tree: MakeTree, tmp_path: Path) -> None:
    data, folder = make_tree([8, 8], [3, 2]), tmp_path / "run"
    stopped(data, folder, 1)
    broken = image_of_step(data, 6)
    spoil(broken)
    with pytest.raises(DataError) as caught:
        run(data, folder, resume=True, checkpoint_every=1)
    assert f"The image {broken} broke during the run: it " in str(caught.value)
    assert "resume with --bad-files skip to leave it out" in str(caught.value)
    assert RunFolder(folder).load_checkpoint()[0].shared["state"]["step"] >= 1

    with pytest.raises(UserError, match=f"1 of the files in {data} cannot be used.*\n  {broken} "):
        run(data, folder, resume=True)

    # From here on: one run without an interruption, and one with a stop within the epoch and another later.
    shutil.copytree(folder, tmp_path / "again")
    whole = run(data, folder, resume=True, bad_files="skip")
    assert any("1 images that broke after the run began are left out" in note for note in whole.notes)
    assert f"{broken}\t" in (folder / "left_out.tsv").read_text()
    events = [json.loads(line) for line in (folder / "bad_images.jsonl").read_text().splitlines()]
    name = str(broken.relative_to(data))
    assert [(event["event"], event["image"]) for event in events] == [("broken", name), ("dropped", name)]
    assert [line["epoch"] for line in whole.run.metrics()] == [1, 2]

    at = RunFolder(tmp_path / "again").load_checkpoint()[0].shared["state"]["step"]
    stopped(data, tmp_path / "again", at + 1, resume=True, bad_files="skip")
    run(data, tmp_path / "again", resume=True)  # it has been dropped already: no need to say so again
    assert torch_bytes(tmp_path / "again") == torch_bytes(folder)


def test_a_repaired_image_is_used_again(make_tree: MakeTree, tmp_path: Path) -> None:
    data = make_tree([8, 8], [3, 2])
    run(data, tmp_path / "whole")
    stopped(data, tmp_path / "run", 1)
    broken = image_of_step(data, 6)
    content = broken.read_bytes()
    broken.write_bytes(b"")
    with pytest.raises(UserError, match=f"{broken} is empty"):  # before the run goes on
        run(data, tmp_path / "run", resume=True)
    broken.write_bytes(content)
    run(data, tmp_path / "run", resume=True)
    assert torch_bytes(tmp_path / "run") == torch_bytes(tmp_path / "whole")


def test_images_left_out_at_the_start_stay_out_and_a_later_full_check_does_not_matter(
    make_tree: MakeTree, tmp_path: Path
) -> None:
    data = make_tree([9, 8], [3, 2])
    first, second = sorted((data / "train" / "class 00").iterdir())[:2]
    first.write_bytes(b"")
    stopped(data, tmp_path / "run", 2, bad_files="skip")
    spoil(second)
    trainer = run(data, tmp_path / "run", resume=True, bad_files="skip", verify="full")
    assert len(trainer.run.metrics()) == 2
    left_out = (tmp_path / "run" / "left_out.tsv").read_text()
    assert f"{first}\tis empty" in left_out
    assert f"{second}\t" in left_out


def test_a_resume_looks_at_the_validation_set(make_tree: MakeTree, tmp_path: Path) -> None:
    data = make_tree([8, 8], [3, 2])
    stopped(data, tmp_path / "run", 1)
    (data / "val" / "class 00" / "000.jpg").rename(data / "val" / "class 00" / "100.jpg")
    with pytest.raises(UserError, match="the files or classes of the validation data have changed"):
        run(data, tmp_path / "run", resume=True)


def test_a_broken_validation_image_is_not_evaluated(make_tree: MakeTree, tmp_path: Path) -> None:
    data = make_tree([8, 8], [3, 2])
    stopped(data, tmp_path / "run", 1)
    (data / "val" / "class 00" / "000.jpg").write_bytes(b"")
    trainer = run(data, tmp_path / "run", resume=True, bad_files="skip")
    assert trainer.data.val_size == 4


@pytest.mark.parametrize("world", [1, 2])
def test_the_order_of_the_others_stays(make_tree: MakeTree, world: int) -> None:
    images = read_split(make_tree([9, 8], [1, 1]) / "train")

    def batches(dropped: Sequence[int], rank: int) -> list[np.ndarray]:
        loader = DaliLoader(images, batch=2, size=32, augment=True, threads=1, dropped=dropped, rank=Rank(rank, world))
        return loader._batches()

    def interleaved(dropped: Sequence[int]) -> list[int]:
        ranks = [np.concatenate(batches(dropped, rank)) for rank in range(world)]
        return np.stack(ranks, 1).ravel().tolist()

    whole = np.random.default_rng((0, 0)).permutation(17).tolist()
    gone = whole[9]
    wanted = [index for index in whole if index != gone]
    assert interleaved([gone]) == wanted[: len(interleaved([gone]))]
    assert interleaved([gone])[:9] == interleaved([])[:9]
