"""DALI loaders on real JPEGs. In most trees every picture is a class of its own, so that labels tell pictures apart."""

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdnet.train.data.dali import DaliLoader
from sdnet.train.data.folder import ImageSet, read_image_folder
from sdnet.train.data.loader import Rank
from sdnet.train.data.pipeline import MEAN, STD
from sdnet.train.errors import UserError

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


def training(images: ImageSet, rank: int = 0, world: int = 1, **options) -> DaliLoader:
    return DaliLoader(
        images, **{"batch": 4, "size": 32, "augment": True, "threads": 1, "rank": Rank(rank, world)} | options
    )


def evaluation(images: ImageSet, rank: int = 0, world: int = 1, **options) -> DaliLoader:
    return training(images, rank, world, **{"augment": False, "resize": 36} | options)


def labels_of(loader: DaliLoader) -> list[list[int]]:
    return [labels.tolist() for _, labels in loader]


@pytest.fixture
def pictures(make_tree: MakeTree) -> tuple[ImageSet, ImageSet]:
    """23 pictures in 23 classes, in train and in val."""
    return read_image_folder(make_tree([1] * 23, [1] * 23))


def test_a_batch_is_normalised_images_and_labels(pictures: tuple[ImageSet, ImageSet]) -> None:
    images, labels = next(iter(training(pictures[0])))
    assert images.shape == (4, 3, 32, 32)
    assert images.dtype == torch.float32
    assert labels.shape == (4,)
    assert labels.dtype == torch.int64
    pixels = images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
    assert pixels.min() > -0.5
    assert pixels.max() < 255.5


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_takes_each_picture_at_most_once_in_equal_steps(
    pictures: tuple[ImageSet, ImageSet], world: int
) -> None:
    loaders = [training(pictures[0], rank, world) for rank in range(world)]
    for epoch in range(3):
        for loader in loaders:
            loader.set_epoch(epoch)
        batches = [labels_of(loader) for loader in loaders]
        assert [len(of_rank) for of_rank in batches] == [23 // (4 * world)] * world == [len(loaders[0])] * world
        assert all(len(batch) == 4 for of_rank in batches for batch in of_rank)
        seen = [label for of_rank in batches for batch in of_rank for label in batch]
        assert len(seen) == len(set(seen))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_takes_each_picture_once_at_every_epoch(pictures: tuple[ImageSet, ImageSet], world: int) -> None:
    loaders = [evaluation(pictures[1], rank, world) for rank in range(world)]
    for epoch in range(3):
        for loader in loaders:
            loader.set_epoch(epoch)
        batches = [labels_of(loader) for loader in loaders]
        assert [len(of_rank) for of_rank in batches] == [len(loader) for loader in loaders]
        assert all(batch for of_rank in batches for batch in of_rank)
        assert sorted(label for of_rank in batches for batch in of_rank for label in batch) == list(range(23))


def test_each_epoch_reshuffles_the_whole_set(pictures: tuple[ImageSet, ImageSet]) -> None:
    loader = training(pictures[0], batch=23)
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append(labels_of(loader)[0])
    assert all(sorted(order) == list(range(23)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_a_seed_gives_the_same_batches_whatever_the_threads(pictures: tuple[ImageSet, ImageSet]) -> None:
    for (one, first), (two, second) in zip(training(pictures[0]), training(pictures[0], threads=2), strict=True):
        assert torch.equal(one, two)
        assert torch.equal(first, second)
    assert labels_of(training(pictures[0])) != labels_of(training(pictures[0], seed=1))


def test_global_batches_do_not_depend_on_the_number_of_ranks(pictures: tuple[ImageSet, ImageSet]) -> None:
    """The union of the ranks' k-th batches is the lone rank's k-th batch: runs on other machines stay comparable."""
    whole = labels_of(training(pictures[0], batch=8))
    halves = [labels_of(training(pictures[0], rank, 2)) for rank in range(2)]
    assert [sorted(batch) for batch in whole] == [sorted(a + b) for a, b in zip(*halves, strict=True)]


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_a_new_loader_resumes_in_the_middle_of_an_epoch(pictures: tuple[ImageSet, ImageSet], batches: int) -> None:
    loader = training(pictures[0])
    loader.set_epoch(2)
    expected = list(loader)
    iterator = iter(loader)
    for _ in range(batches):
        next(iterator)
    resumed = training(pictures[0], threads=2)
    resumed.set_epoch(2)
    resumed.load_state(loader.state())
    rest = list(resumed)
    assert len(rest) == len(expected) - batches
    for (images, labels), (other_images, other_labels) in zip(rest, expected[batches:], strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)
    assert len(list(resumed)) == len(loader), "the epoch after it is whole again"


def test_evaluation_agrees_with_pil(pictures: tuple[ImageSet, ImageSet]) -> None:
    """Shorter side to 36 px with an antialiased bilinear filter, centre crop of 32 px: a quarter grey level at most."""
    loaded = torch.cat([images for images, _ in evaluation(pictures[1])])
    for images, file in zip(loaded, pictures[1].files, strict=True):
        with Image.open(pictures[1].root / file) as picture:
            shorter = min(picture.size)
            width, height = (36 * side // shorter for side in picture.size)
            resized = picture.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - 32) // 2, (height - 32) // 2
        expected = np.asarray(resized.crop((left, top, left + 32, top + 32)), dtype=np.float64)
        found = images.permute(1, 2, 0).numpy() * STD + MEAN
        assert np.abs(found - expected).mean() < 0.25


def test_a_rotation_flag_in_the_file_is_not_applied(make_tree: MakeTree) -> None:
    root = make_tree([1], [1])
    file = root / "val/class 00/000.jpg"
    _, val = read_image_folder(root)
    before = next(iter(evaluation(val)))[0]
    flags = Image.Exif()
    flags[0x0112] = 6  # rotate by 90 degrees when shown
    segment = b"Exif\0\0" + flags.tobytes().removeprefix(b"Exif\0\0")
    content = file.read_bytes()
    file.write_bytes(content[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + content[2:])
    with Image.open(file) as picture:
        assert picture.getexif()[0x0112] == 6
    assert torch.equal(next(iter(evaluation(val)))[0], before)


@pytest.mark.parametrize("make", [training, evaluation])
def test_channels_last_changes_strides_alone(
    pictures: tuple[ImageSet, ImageSet], make: Callable[..., DaliLoader]
) -> None:
    plain, last = next(iter(make(pictures[0])))[0], next(iter(make(pictures[0], channels_last=True)))[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain, last)


@pytest.mark.parametrize("make", [training, evaluation])
def test_fewer_pictures_than_ranks(make_tree: MakeTree, make: Callable[..., DaliLoader]) -> None:
    train, _ = read_image_folder(make_tree([1, 1], [1, 1]))
    with pytest.raises(UserError, match="has 2 images, fewer than the 3 processes"):
        make(train, 0, 3)


def test_a_centre_crop_must_fit_into_the_resized_image(pictures: tuple[ImageSet, ImageSet]) -> None:
    with pytest.raises(UserError, match="resize is 31; it must be at least size, 32, for a centre crop"):
        evaluation(pictures[1], resize=31)


@pytest.mark.parametrize("extent", [(10_000, 1), (1, 10_000)])
def test_an_image_of_extreme_aspect_takes_little_memory(tmp_path: Path, extent: tuple[int, int]) -> None:
    """Resizing all of it, to a shorter side of 256, would take 2 GB; its centre is what Pillow's crop gives."""
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        line = np.random.default_rng(0).integers(0, 256, (extent[1], extent[0], 3), dtype=np.uint8)
        Image.fromarray(line).save(tmp_path / split / "one/line.png")
    train, val = read_image_folder(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for loader in (training(train, size=224, batch=1), evaluation(val, size=224, resize=256, batch=1)):
        ((images, _),) = list(loader)
        assert images.shape == (1, 3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "in KB"
    width, height = extent
    near = (
        max(0, width // 2 - 10),
        max(0, height // 2 - 10),
        min(width, width // 2 + 10),
        min(height, height // 2 + 10),
    )
    middle = Image.fromarray(line).crop(near)
    resized = middle.resize((256 * middle.width, 256 * middle.height), Image.Resampling.BILINEAR)
    left, top = ((side - 224) // 2 for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), np.float64)
    assert np.abs(images[0].permute(1, 2, 0).numpy() * STD + MEAN - expected).mean() < 0.25
