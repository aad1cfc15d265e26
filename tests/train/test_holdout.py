"""Held-out training images: how they are drawn, and that they alone choose the best weights."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sdnet.train import trainer as trainer_module
from sdnet.train.data.cifar import open_small_pictures
from sdnet.train.data.dali import open_pictures
from sdnet.train.data.holdout import divide
from sdnet.train.data.loader import Data, Rank
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.outcome import describe_outcome, outcome
from sdnet.train.recipes import Recipe, cifar_sdnet18, demo
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]
CPU = torch.device("cpu")

SMALL = replace(demo(), model="resnet18", width=4, epochs=3, batch=4, image_size=32, eval_resize=36)


def test_classes_give_in_proportion_to_their_size() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    kept, held = divide(labels, 16, "The set")
    assert np.bincount(labels[held]).tolist() == [10, 5, 1]
    assert sorted([*kept, *held]) == list(range(160))
    assert [kept.tolist(), held.tolist()] == [part.tolist() for part in divide(labels, 16, "The set")]


@pytest.mark.parametrize("count", [1, 7, 159])
def test_any_number_can_be_held_out_of_one_class(count: int) -> None:
    kept, held = divide([0] * 160, count, "The set")
    assert len(held) == count
    assert sorted([*kept, *held]) == list(range(160))


def test_too_many_are_refused() -> None:
    with pytest.raises(UserError, match=r"^The set has 5 images and holdout is 5; some must be left to train on\.$"):
        divide([0] * 5, 5, "The set")
    with pytest.raises(UserError, match=r"^The set would have no images of class number 1 left; holdout is 3\.$"):
        divide([0, 0, 0, 0, 1], 3, "The set")


def seen(loader: trainer_module.Loader | None) -> list[int]:
    """A number for each image of an evaluation loader."""
    assert loader is not None
    return [hash(image.numpy().tobytes()) for images, _ in loader for image in images]


@pytest.mark.parametrize(
    ("open_data", "side"), [(open_pictures, 32), (open_small_pictures, 40)], ids=["DALI", "memory"]
)
def test_held_out_images_are_not_trained_on(
    open_data: Callable[[Job, Rank, torch.device], Data], side: int, tmp_path: Path
) -> None:
    from PIL import Image

    for split, count in (("train", 12), ("val", 2)):
        for label in ("a", "b"):
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = np.random.default_rng([number, ord(label), ord(split[0])]).integers(0, 256, (side, side, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02}.png")
    recipe = replace(SMALL, image_size=side, eval_resize=side, holdout=6)
    job = Job(recipe, tmp_path / "data", RunFolder(tmp_path / "run"), threads=1)
    parts = [open_data(job, Rank(index, 2), CPU) for index in range(2)]
    assert [part.holdout_size for part in parts] == [6, 6]
    held = [image for part in parts for image in seen(part.holdout)]
    assert len(held) == len(set(held)) == 6
    everything = open_data(replace(job, recipe=replace(recipe, holdout=0)), Rank(), CPU)
    assert everything.holdout is None
    assert parts[0].digest == parts[1].digest != everything.digest
    assert [len(part.train) for part in parts] == [(24 - 6) // 4] * 2
    assert not set(held) & {image for part in parts for image in seen(part.val)}


def test_the_held_out_images_choose_the_best_weights(
    make_tree: MakeTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores are planted: the held-out images prefer epoch 2, the validation set epoch 3."""
    planted = {"val": iter([10.0, 20.0, 30.0]), "holdout": iter([40.0, 60.0, 50.0])}

    def scores(model: torch.nn.Module, loader: object, size: int, device: torch.device) -> dict[str, float]:
        top1 = next(planted["val" if size == 5 else "holdout"])
        return {"val_loss": 1.0, "val_top1": top1, "val_top5": 100.0}

    monkeypatch.setattr(trainer_module, "evaluate", scores)
    run = RunFolder(tmp_path / "run")
    Trainer(Job(replace(SMALL, holdout=4), make_tree([8, 8], [3, 2]), run, threads=1), open_pictures).train()
    lines = run.metrics()
    assert [(line["val_top1"], line["holdout_top1"]) for line in lines] == [(10, 40), (20, 60), (30, 50)]
    assert {name: line["epoch"] for name, line in outcome(lines).items()} == {
        "best": 2,
        "best_on_validation": 3,
        "last": 3,
    }
    from safetensors import safe_open

    with safe_open(run.path / "best.safetensors", "pt") as file:
        assert file.metadata()["epoch"] == "2"
    assert (
        "Done: best top-1 20.00% (epoch 2, chosen on held-out images), best on validation 30.00% (epoch 3), "
        "last 30.00% (epoch 3); the run folder is"
    ) in capsys.readouterr().out


def test_without_held_out_images_the_validation_set_chooses() -> None:
    lines = [{"epoch": epoch, "val_top1": top1} for epoch, top1 in ((1, 10.0), (2, 30.0), (3, 30.0), (4, 20.0))]
    assert describe_outcome(lines) == "best top-1 30.00% (epoch 2), last 20.00% (epoch 4)"
    assert describe_outcome([]) == "the run was not evaluated"


def test_recipes_hold_nothing_out_unless_told() -> None:
    assert Recipe().holdout == cifar_sdnet18().holdout == 0
