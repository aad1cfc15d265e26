"""CIFAR and other small pictures: official archives, image folders, batches made on the device, training."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdnet.train.cifar import main
from sdnet.train.data.cifar import read_small_pictures
from sdnet.train.data.cifar_files import load_restricted
from sdnet.train.data.loader import Rank
from sdnet.train.data.mixing import Mixing
from sdnet.train.data.resident import MEAN, STD, ResidentLoader
from sdnet.train.errors import UserError
from sdnet.train.recipes import cifar_sdnet18
from sdnet.train.run_folder import RunFolder

NAMES = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def pixels(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)


def loader(count: int = 23, rank: int = 0, world: int = 1, side: int = 32, **options) -> ResidentLoader:
    """Every picture is a class of its own."""
    fixed = {"batch": 4, "augment": True, "name": "The set", "digest": "d", "rank": Rank(rank, world)}
    return ResidentLoader(pixels(count, side), np.arange(count), **fixed | options)


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    return (images * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).round().to(torch.uint8)


def write_official(root: Path, classes: int, per_batch: int = 6) -> dict[str, bytes]:
    """The files of an official archive, pickled as Python 2 did, with random pixels."""
    fine = classes == 100
    key = b"fine_labels" if fine else b"labels"

    def batch(seed: int) -> bytes:
        labels = [(seed * per_batch + at) % classes for at in range(per_batch)]
        return pickle.dumps({b"data": pixels(per_batch, seed=seed).reshape(per_batch, -1), key: labels}, protocol=2)

    names = [f"class {label}".encode() for label in range(classes)]
    files = {"train": batch(0), "test": batch(9)} if fine else {f"data_batch_{at}": batch(at) for at in range(1, 6)}
    if not fine:
        files["test_batch"] = batch(9)
    files["meta" if fine else "batches.meta"] = pickle.dumps(
        {b"fine_label_names" if fine else b"label_names": names}, 2
    )
    folder = root / NAMES[classes]
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_reads_the_official_archive_packed_or_unpacked(tmp_path, classes, packed):
    files = write_official(tmp_path / "made", classes)
    root = tmp_path / "made"
    if packed:
        root = tmp_path / "packed"
        root.mkdir()
        with tarfile.open(root / f"cifar-{classes}-python.tar.gz", "w:gz") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(f"{NAMES[classes]}/{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    found = read_small_pictures(root)
    assert found.classes == tuple(f"class {label}" for label in range(classes))
    seeds = range(1, 6) if classes == 10 else [0]
    assert np.array_equal(found.train.images, np.concatenate([pixels(6, seed=seed) for seed in seeds]))
    assert found.train.labels.tolist() == [(seed * 6 + at) % classes for seed in seeds for at in range(6)]
    assert np.array_equal(found.val.images, pixels(6, seed=9))


class Hostile:
    """Unpickling one of these would run a command."""

    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('executed').touch()",)


@pytest.mark.parametrize("where", ["data", "labels"])
def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path, 10)
    stored = {b"data": pixels(6).reshape(6, -1), b"labels": [0] * 6} | {where.encode(): Hostile()}
    (tmp_path / NAMES[10] / "data_batch_3").write_bytes(pickle.dumps(stored, 2))
    with pytest.raises(UserError, match=r"not the official CIFAR-10: UnpicklingError it asks for .*eval"):
        read_small_pictures(tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("admitted", [np.arange(6, dtype=np.uint8), [1, "two", b"three", 4.0], {"a": [1]}])
@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_lists_and_plain_values_are_admitted(admitted, protocol):
    found = load_restricted(pickle.dumps({b"x": admitted}, protocol))["x"]
    assert np.array_equal(found, admitted)


@pytest.mark.parametrize("refused", [Path("/"), np.float64, print, Hostile(), {1, 2}.__class__, io.BytesIO()])
def test_anything_else_is_refused(refused):
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        load_restricted(pickle.dumps({b"x": refused}, 2))


def test_broken_official_files(tmp_path):
    write_official(tmp_path, 10)
    for data, sentence in (
        (b"", "EOFError"),
        (b"text", "not the official"),
        (pickle.dumps({b"data": np.zeros((6, 10), np.uint8), b"labels": [0] * 6}, 2), r"images of shape \(6, 10\)"),
        (pickle.dumps({b"data": pixels(6).reshape(6, -1), b"labels": [11] * 6}, 2), "labels out of range"),
        (pickle.dumps([1, 2], 2), "holds no dictionary"),
    ):
        (tmp_path / NAMES[10] / "test_batch").write_bytes(data)
        with pytest.raises(UserError, match=sentence):
            read_small_pictures(tmp_path)


def test_reads_an_image_folder_with_test_for_val(tmp_path):
    for split in ("train", "test"):
        for label in range(2):
            folder = tmp_path / split / f"class {label}"
            folder.mkdir(parents=True)
            Image.fromarray(pixels(1, seed=label)[0].transpose(1, 2, 0)).save(folder / "one.png")
            Image.fromarray(pixels(1, seed=label)[0, 0]).save(folder / "gray.png")
    found = read_small_pictures(tmp_path)
    assert found.train.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(found.train.images[3], pixels(1, seed=1)[0])
    assert np.array_equal(found.train.images[0], np.repeat(pixels(1)[:, 0], 3, axis=0))
    Image.fromarray(pixels(1, 40)[0].transpose(1, 2, 0)).save(tmp_path / "test/class 1/one.png")
    with pytest.raises(UserError, match=r"one\.png is 40 x 40, the first 32 x 32"):
        read_small_pictures(tmp_path)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_training_picture_is_a_crop_in_a_black_margin_perhaps_flipped(channels_last):
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


def test_both_memory_formats_hold_the_same_pictures():
    for (one, _), (two, _) in zip(loader(), loader(channels_last=True), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_picture_counts_once(world):
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


def test_global_batches_do_not_depend_on_the_number_of_ranks():
    for (whole, labels), *parts in zip(loader(batch=8), *(loader(rank=r, world=2) for r in range(2)), strict=False):
        order = torch.cat([part for _, part in parts]).argsort()
        assert torch.equal(torch.cat([part for part, _ in parts])[order], whole[labels.argsort()])


def test_evaluation_gives_the_pictures_as_they_are():
    images = torch.cat([images for images, _ in loader(augment=False)])
    assert torch.equal(as_pixels(images), torch.from_numpy(pixels(23)))


@pytest.mark.parametrize("batches", [0, 2, 5])
def test_resumes_in_the_middle_of_an_epoch(batches):
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
def test_a_state_of_another_loader_is_refused_by_field(other, field):
    with pytest.raises(UserError, match=field):
        loader(**other).load_state(loader().state())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batches_in_half_precision_are_rounded_ones(dtype):
    for (half, _), (full, _) in zip(loader(dtype=dtype), loader(), strict=True):
        assert torch.equal(half, full.to(dtype))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.2, 0.0), (0.0, 1.0), (0.2, 1.0)])
def test_mixed_images_have_mixed_targets(mixup, cutmix):
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


def test_fewer_pictures_than_ranks():
    with pytest.raises(UserError, match="The set has 2 images, fewer than the 3 processes"):
        loader(2, 0, 3)


def test_the_official_recipe():
    recipe = cifar_sdnet18()
    assert (recipe.lr, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (0.1, 0.9, True, 5e-4)
    assert (recipe.epochs, recipe.batch, recipe.schedule, recipe.lr_min) == (220, 128, "cosine", 1e-6)
    assert (recipe.stem, recipe.image_size, recipe.crop_padding, recipe.lam) == ("cifar", 32, 4, 0.1)


def test_trains_and_resumes_from_the_command_line(tmp_path):
    write_official(tmp_path, 10)
    settings = ["--model", "sdnet18", "--batch", "10", "--data", str(tmp_path), "--log-every", "1"]
    main([*settings, "--epochs", "1", "--out", str(tmp_path / "run")])
    (line,) = RunFolder(tmp_path / "run").metrics()
    assert line["step"] == 3
    with pytest.raises(SystemExit, match="batch: 15, not 10"):
        main(["--data", str(tmp_path), "--resume", str(tmp_path / "run"), "--batch", "15"])


def test_pictures_of_another_size_than_the_recipes(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        Image.fromarray(pixels(1, 16)[0].transpose(1, 2, 0)).save(tmp_path / split / "one/one.png")
    with pytest.raises(SystemExit, match="images are 16 x 16, not 32 x 32: pass --image-size"):
        main(["--data", str(tmp_path), "--out", str(tmp_path / "run"), "--batch", "1"])
