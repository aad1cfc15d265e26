"""`--runs N`, the comparison of two commits, and training images that grow."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdnet.train import compare
from sdnet.train.compare import Course, difference, write_images
from sdnet.train.data.dali import DaliLoader
from sdnet.train.data.folder import read_image_folder
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.recipes import CIFAR_RECIPES, RECIPES, cifar_fast, cifar_sdnet18, imagenet_sdnet18
from sdnet.train.run_folder import RunFolder
from sdnet.train.runs import describe_summary, job_of, summarise, train_runs
from sdnet.train.schedule import learning_rate, training_size

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


def test_the_mean_and_the_sample_deviation_are_those_of_the_runs() -> None:
    runs = [[{"epoch": 1, "val_top1": best}, {"epoch": 2, "val_top1": last}] for best, last in ((90, 88), (94, 90))]
    found = summarise(runs)
    assert found["best_val_top1"]["mean"] == 92
    assert found["best_val_top1"]["deviation"] == pytest.approx(8**0.5)
    assert found["last_val_top1"]["values"] == [88, 90]
    assert describe_summary(found, 2) == "2 runs: best top-1 92.00 ± 2.83%, last 89.00 ± 1.41%"


def open_noise(job: Job, rank: Rank, device: torch.device) -> Data:
    """24 images in 2 classes."""
    images = np.random.default_rng(0).integers(0, 256, (24, 3, 16, 16), dtype=np.uint8)
    options: dict[str, Any] = {"batch": 8, "device": device, "rank": rank, "seed": job.recipe.seed}
    train = ResidentLoader(images[:16], np.arange(16) % 2, name="train", digest="t", augment=True, **options)
    val = ResidentLoader(images[16:], np.arange(8) % 2, name="val", digest="v", augment=False, **options)
    return Data(train, val, 8, ("a", "b"), "noise")


def test_several_runs_have_seeds_of_their_own_and_go_on_after_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = replace(cifar_sdnet18(), width=4, image_size=16, eval_resize=16, epochs=1, batch=8, lr=0.02, seed=5)
    job = Job(recipe, Path(), RunFolder(tmp_path / "runs"), runs=2, tracker=("none",))
    train_runs(job, open_noise)
    stored = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert stored["seeds"] == [5, 6]
    lines = [RunFolder(tmp_path / "runs" / f"seed{seed}").metrics()[-1] for seed in (5, 6)]
    assert lines[0]["train_loss"] != lines[1]["train_loss"]
    assert stored["last_val_top1"]["values"] == [line["val_top1"] for line in lines]
    assert "2 runs: best top-1 " in capsys.readouterr().out
    before = (tmp_path / "runs" / "seed5" / "last.pt").stat().st_mtime_ns
    train_runs(job, open_noise)  # all is done already
    assert (tmp_path / "runs" / "seed5" / "last.pt").stat().st_mtime_ns == before
    assert job_of(job, 5).resume
    with pytest.raises(UserError, match=r"holds several runs, such as seed5: go on with --runs N or choose another"):
        train_runs(replace(job, runs=1), open_noise)
    with pytest.raises(UserError, match=r"seed5 holds a run of another recipe; lr: 0\.5, not 0\.02\.$"):
        job_of(replace(job, recipe=replace(recipe, lr=0.5)), 5)


def test_several_runs_need_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    job = Job(cifar_fast(), Path(), RunFolder(tmp_path / "runs"), runs=3)
    with pytest.raises(UserError, match=r"^--runs 3 needs a single process; this launch has 2\.$"):
        train_runs(job, open_noise)


END = "are equal, but the weights weight differ at the end."


def course(losses: Sequence[float], weight: float = 1.0) -> Course:
    return Course(tuple(losses), {"weight": torch.tensor([weight])})


@pytest.mark.parametrize(
    ("one", "two", "sentence"),
    [
        (course([1, 2, 3]), course([1, 2, 3]), ""),
        (
            course([1, 2, 3]),
            course([1, 2.5, 9]),
            "Step 2 is the first that differs: the loss is 2 at a and 2.5 at b, relative difference 2.0e-01.",
        ),
        (course([1, 2, 3]), course([1, 2]), "a took 3 steps and b took 2."),
        (
            course([1]),
            course([1], 2.0),
            "The losses of all 1 steps are equal, but the weights weight differ at the end.",
        ),
        (course([1]), Course((1,), {}), "The losses are equal, but only one side has the weights weight."),
    ],
)
def test_the_first_difference_is_named(one: Course, two: Course, sentence: str) -> None:
    assert difference(one, two, ("a", "b")) == sentence


def test_the_images_of_a_comparison_are_always_the_same(tmp_path: Path) -> None:
    one, two = (write_images(tmp_path / name) for name in ("one", "two"))
    files = sorted(file.relative_to(one) for file in one.rglob("*.png"))
    assert len(files) == 3 * (16 + 2)
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_a_commit_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SystemExit) as caught:
        compare.main(["no-such-commit"])
    assert str(caught.value.code).startswith("error: The commit no-such-commit cannot be checked out: ")


def test_a_run_without_tensorboard_has_no_losses_to_compare(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave out --tracker"):
        compare.read_course(tmp_path)


@pytest.mark.slow
def test_a_commit_equals_itself(capsys: pytest.CaptureFixture[str]) -> None:
    short = ("--", "--width=4", "--tracker=tensorboard")
    assert compare.main(["HEAD", "HEAD", *short]) == 0
    assert "The losses of 12 steps and the weights are equal to the bit." in capsys.readouterr().out


def test_training_images_grow_to_their_full_size() -> None:
    recipe = replace(imagenet_sdnet18(), first_image_size=128, image_size=224, eval_resize=256, epochs=10)
    assert [training_size(recipe, epoch) for epoch in range(10)] == [128, 128, 128, 160, 160, 160, 192, 192, 224, 224]
    assert {training_size(imagenet_sdnet18(), epoch) for epoch in range(100)} == {224}
    with pytest.raises(UserError, match=r"^first_image_size is 256, more than image_size, 224\.$"):
        replace(imagenet_sdnet18(), first_image_size=256)


def test_the_loader_gives_the_size_of_the_epoch(make_tree: MakeTree) -> None:
    images, _ = read_image_folder(make_tree([4, 4], [1, 1]))
    recipe = replace(imagenet_sdnet18(), first_image_size=32, image_size=64, eval_resize=64, epochs=2)
    loader = DaliLoader(
        images, batch=4, size=64, augment=True, threads=1, size_of=lambda epoch: training_size(recipe, epoch)
    )
    for epoch, size in ((0, 32), (1, 64)):
        loader.set_epoch(epoch)
        assert {tuple(batch.shape) for batch, _ in loader} == {(4, 3, size, size)}


def test_the_fast_recipes_state_their_schedules() -> None:
    fast, modern = CIFAR_RECIPES["cifar_fast"](), RECIPES["imagenet_modern"]()
    assert (fast.model, fast.width, fast.epochs, fast.schedule) == ("sdnet18", 64, 24, "onecycle")
    assert max(learning_rate(fast, step, 97) for step in range(24 * 97)) == fast.lr
    assert learning_rate(fast, 24 * 97, 97) == 0
    assert (modern.ema, modern.label_smoothing, modern.mixup, modern.schedule) == (0.9999, 0.1, 0.2, "cosine")
    assert (modern.image_size, modern.first_image_size) == (224, 0)
