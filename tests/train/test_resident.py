"""Small images in memory: batches made on the device, states, mixing, and the official recipe."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdnet.train.cifar import main
from sdnet.train.data.loader import Rank
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.resident import MEAN, STD, ResidentLoader
from sdnet.train.errors import UserError
from sdnet.train.recipes import cifar_sdnet18


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def loader(count: int = 23, rank: int = 0, world: int = 1, side: int = 32, **options) -> ResidentLoader:
    """Every picture is a class of its own."""
    fixed = {"batch": 4, "augment": True, "name": "The set", "digest": "d", "rank": Rank(rank, world)}
    return ResidentLoader(pixels(count, side), np.arange(count), **fixed | options)


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).round().to(torch.uint8)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_training_picture_is_a_crop_in_a_black_margin_perhaps_flipped(channels_last: bool) -> None:
    padded = torch.nn.functional.pad(torch.from_numpy(pixels(23, 12)), (4,) * 4)
    seen = set()
    for epoch in range(4):
        this = loader(side=12, channels_last=channels_last)
        this.set_epoch(epoch)
        for images, labels in this:
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last) == channels_last
            for image, label in zip(as_pixels(images), labels, strict=True):
                places = [
                    (top, left, flip)
                    for top in range(9)
                    for left in range(9)
                    for flip in (False, True)
                    if torch.equal(image.flip(2) if flip else image, padded[label, :, top : top + 12, left : left + 12])
                ]
                assert len(places) == 1
                seen.add(places[0])
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == set(range(9))
    assert {flip for _, _, flip in seen} == {False, True}


def test_both_memory_formats_hold_the_same_pictures() -> None:
    for (one, _), (two, _) in zip(loader(), loader(channels_last=True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_picture_counts_once(world: int) -> None:
    for epoch in range(3):
        training = [loader(rank=rank, world=world) for rank in range(world)]
        evaluation = [loader(rank=rank, world=world, augment=False) for rank in range(world)]
        for loaders in (training, evaluation):
            for this in loaders:
                this.set_epoch(epoch)
            batches = [[labels.tolist() for _, labels in this] for this in loaders]
            assert {len(of_rank) for of_rank in batches} == {len(loaders[0])}
            assert all(batch for of_rank in batches for batch in of_rank)
            seen = [label for of_rank in batches for batch in of_rank for label in batch]
            assert len(seen) == len(set(seen))
        assert sorted(seen) == list(range(23))


def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    for (whole, labels), *parts in zip(loader(batch=8), *(loader(rank=r, world=2) for r in range(2)), strict=False):
        order = torch.cat([part for _, part in parts]).argsort()
        assert torch.equal(torch.cat([part for part, _ in parts])[order], whole[labels.argsort()])


def test_evaluation_gives_the_pictures_as_they_are() -> None:
    images = torch.cat([images for images, _ in loader(augment=False)])
    assert torch.equal(as_pixels(images), torch.from_numpy(pixels(23)))


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_resumes_in_the_middle_of_an_epoch(batches: int) -> None:
    first, second = loader(), loader()
    for this in (first, second):
        this.set_epoch(3)
    expected = list(loader_at(3))
    iterator = iter(first)
    for _ in range(batches):
        next(iterator)
    second.load_state(first.state())
    rest = list(second)
    assert len(rest) == len(expected) - batches
    for got, want in zip(rest, expected[batches:], strict=True):
        assert all(map(torch.equal, got, want))
    assert len(list(second)) == len(expected), "the epoch after it is whole again"


def loader_at(epoch: int) -> ResidentLoader:
    this = loader()
    this.set_epoch(epoch)
    return this


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"batch": 5}, "batch: 5, not 4"),
        ({"seed": 1}, "seed: 1, not 0"),
        ({"digest": "e"}, "images: e, not d"),
        ({"world": 2}, "processes: 2, not 1"),
    ],
)
def test_a_state_of_another_loader_is_refused_by_field(other: dict[str, Any], field: str) -> None:
    with pytest.raises(UserError, match=field):
        loader(**other).load_state(loader().state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches_in_half_precision_are_rounded_ones(dtype: torch.dtype) -> None:
    for (half, _), (full, _) in zip(loader(dtype=dtype), loader(), strict=True):
        assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_images_have_mixed_targets(mixup: float, cutmix: float) -> None:
    mixing = Mixing(mixup, cutmix, 23)
    options = {"mixing": mixing, "padding": 0}
    for (images, targets), (again, _) in zip(loader(**options), loader(**options), strict=True):
        assert torch.equal(images, again)
        assert targets.shape == (4, 23)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        assert ((targets > 0).sum(1) <= 2).all()
    # On pictures that are one everywhere in their own channel, the share of the target is the share of the picture.
    images, labels = torch.eye(3)[:, :, None, None].expand(3, 3, 16, 16), torch.arange(3)
    for seed in range(20):
        mixed, targets = Mixing(mixup, cutmix, 3)(images, labels, np.random.default_rng(seed))
        torch.testing.assert_close(mixed.mean((2, 3)), targets)


def test_fewer_pictures_than_ranks() -> None:
    with pytest.raises(UserError, match="The set has 2 images, fewer than the 3 processes"):
        loader(2, 0, 3)


def test_the_official_recipe() -> None:
    recipe = cifar_sdnet18()
    assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, True, 5e-4)
    assert (recipe.epochs, recipe.batch, recipe.schedule, recipe.lr_min) == (220, 128, "cosine", 1e-6)
    assert (recipe.stem, recipe.image_size, recipe.crop_padding, recipe.lam) == ("cifar", 32, 4, 0.1)


def test_pictures_of_another_size_than_the_recipes(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.fromarray(pixels(1, 16)[0].transpose(1, 2, 0)).save(tmp_path / split / "one/one.png")
    with pytest.raises(SystemExit, match="images are 16 x 16, not 32 x 32: pass --image-size"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch", "1"])
