"""The DALI loader beyond plain folders: shards, uneven counts, odd formats, states, types, extra augmentation."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.train.data.dali import DaliLoader, Extras
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.loader import Rank
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.shards import read_shards
from sdnet.train.errors import UserError
from sdnet.train.prepare import prepare

WriteTree = Callable[[Path, Sequence[int], Sequence[int]], Path]


def training(images: ImageSet, rank: int = 0, world: int = 1, **options) -> DaliLoader:
    fixed = {"batch": 4, "size": 32, "augment": True, "threads": 1, "rank": Rank(rank, world)}
    return DaliLoader(images, **fixed | options)


def evaluation(images: ImageSet, rank: int = 0, world: int = 1, **options) -> DaliLoader:
    return training(images, rank, world, **{"augment": False, "resize": 36} | options)


@pytest.fixture(scope="module")
def shards(write_tree: WriteTree, tmp_path_factory: pytest.TempPathFactory) -> tuple[ImageSet, ImageSet]:
    """97 pictures in 97 classes, in train and in val, in shards of uneven length."""
    folder = tmp_path_factory.mktemp("many")
    write_tree(folder / "in", [1] * 97, [1] * 97)
    prepare(folder / "in", folder / "out", shards=6, say=lambda _: None)
    return read_shards(folder / "out")


@pytest.mark.parametrize(("world", "batch"), [(1, 16), (2, 16), (3, 16), (2, 48), (3, 5)])
def test_each_picture_counts_once_at_every_epoch(shards: tuple[ImageSet, ImageSet], world: int, batch: int) -> None:
    """97 files, 2 ranks, batches of 16 is where DALI's DROP with padding repeats one picture 16 times in epoch 1."""
    train, val = shards
    loaders = [training(train, rank, world, batch=batch, size=8) for rank in range(world)]
    judges = [evaluation(val, rank, world, batch=batch, size=8, resize=8) for rank in range(world)]
    for epoch in range(3):
        for loader in (*loaders, *judges):
            loader.set_epoch(epoch)
        taken = [[labels.tolist() for _, labels in loader] for loader in loaders]
        assert {len(of_rank) for of_rank in taken} == {97 // (batch * world)} == {len(loaders[0])}
        assert all(len(of_step) == batch for of_rank in taken for of_step in of_rank)
        seen = [label for of_rank in taken for of_step in of_rank for label in of_step]
        assert len(seen) == len(set(seen))
        judged = [[labels.tolist() for _, labels in judge] for judge in judges]
        assert {len(of_rank) for of_rank in judged} == {len(judges[0])}, "equal steps on all ranks"
        assert all(of_step for of_rank in judged for of_step in of_rank), "no empty batch"
        assert sorted(label for of_rank in judged for of_step in of_rank for label in of_step) == list(range(97))


def test_shards_resume_in_the_middle_of_an_epoch(shards: tuple[ImageSet, ImageSet]) -> None:
    loader, resumed = training(shards[0], 1, 2), training(shards[0], 1, 2)
    for each in (loader, resumed):
        each.set_epoch(4)
    expected = list(loader)
    loader.set_epoch(4)
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    resumed.load_state(loader.state())
    for want, got in zip(expected[5:], resumed, strict=True):
        assert all(map(torch.equal, want, got))


def test_a_second_iteration_continues_the_first(shards: tuple[ImageSet, ImageSet]) -> None:
    loader = training(shards[0])
    expected = [labels.tolist() for _, labels in loader]
    iterator = iter(loader)
    got = [next(iterator)[1].tolist() for _ in range(3)]
    assert got + [labels.tolist() for _, labels in loader] == expected


@pytest.mark.parametrize(
    ("other", "field"),
    [
        ({"batch": 5}, "batch: 5, not 4"),
        ({"seed": 1}, "seed: 1, not 0"),
        ({"rank": 1}, "rank: 1, not 0"),
        ({"world": 3}, "processes: 3, not 2"),
        ({"files": 1}, "images: "),
        ({"epoch": 1}, "epoch: 1, not 0"),
    ],
)
def test_a_state_of_another_loader_is_refused_by_field(
    shards: tuple[ImageSet, ImageSet], other: dict[str, Any], field: str
) -> None:
    loader = training(shards[0], 0, 2)
    next(iter(loader))
    options = {"rank": 0, "world": 2} | {key: value for key, value in other.items() if key not in ("files", "epoch")}
    images = shards[0].select(range(96)) if "files" in other else shards[0]
    different = training(images, **options)
    different.set_epoch(other.get("epoch", 0))
    with pytest.raises(UserError, match=field):
        different.load_state(loader.state())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches_in_half_precision_are_rounded_ones(
    shards: tuple[ImageSet, ImageSet], dtype: torch.dtype, channels_last: bool
) -> None:
    pairs = zip(training(shards[0], dtype=dtype, channels_last=channels_last), training(shards[0]), strict=True)
    for (half, _), (full, _) in pairs:
        assert half.dtype == dtype
        assert half.is_contiguous(memory_format=torch.channels_last) == channels_last
        torch.testing.assert_close(half.float(), full, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-3)


@pytest.mark.parametrize("extras", ["trivial", "rand"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:nvidia")
def test_extra_augmentation_repeats_and_resumes(shards: tuple[ImageSet, ImageSet], extras: Extras) -> None:
    plain, loader = training(shards[0]), training(shards[0], extras=extras)
    expected = list(loader)
    assert not torch.equal(expected[0][0], next(iter(plain))[0])
    iterator = iter(loader)
    for _ in range(20):
        next(iterator)
    resumed = training(shards[0], extras=extras)
    resumed.load_state(loader.state())
    for want, got in zip(expected[20:], resumed, strict=True):
        assert all(map(torch.equal, want, got))


def test_mixing_resumes_too(shards: tuple[ImageSet, ImageSet]) -> None:
    loader, resumed = (training(shards[0], mixing=Mixing(0.2, 1.0, 97)) for _ in range(2))
    expected = list(loader)
    iterator = iter(loader)
    for _ in range(21):
        next(iterator)
    resumed.load_state(loader.state())
    for want, got in zip(expected[21:], resumed, strict=True):
        assert all(map(torch.equal, want, got))
        assert got[1].shape == (4, 97)
