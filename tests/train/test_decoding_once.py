"""Small images are decoded once, a check that was interrupted goes on, and settings without effect are refused."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdnet.train.cli import parse_job
from sdnet.train.data import check, cifar
from sdnet.train.data.cifar import read_small_pictures
from sdnet.train.data.dali import open_pictures
from sdnet.train.data.folder import read_image_folder
from sdnet.train.data.loader import Rank
from sdnet.train.errors import UserError
from sdnet.train.prepare import prepare
from sdnet.train.recipes import CIFAR_RECIPES, RECIPES

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sdnet"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Images of 8 x 8 pixels."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 2)):
        for name in ("a", "b"):
            folder = tmp_path / "small" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "small"


def test_images_are_decoded_once_until_a_file_changes(
    small: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_small_pictures(small)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "decode_all", lambda *_: pytest.fail("decoded again"))
        again = read_small_pictures(small)
    for one, two in ((first.train, again.train), (first.val, again.val)):
        assert np.array_equal(one.images, two.images)
        assert np.array_equal(one.labels, two.labels)
    assert len(list(cache.glob("pixels-*"))) == 2

    file = small / "train" / "a" / "0.png"
    Image.new("RGB", (8, 8), (1, 2, 3)).save(file)
    changed = read_small_pictures(small)
    assert (changed.train.images[0] == np.array([1, 2, 3])[:, None, None]).all()
    assert len(list(cache.glob("pixels-*"))) == 2  # the older ones are gone

    for kept in cache.glob("pixels-*"):
        content = bytearray(kept.read_bytes())
        content[-1] ^= 1
        kept.write_bytes(content)
    assert np.array_equal(read_small_pictures(small).train.images, changed.train.images)


def test_small_images_in_shards_are_decoded_once_too(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(small, tmp_path / "shards", say=lambda _: None)
    first = read_small_pictures(tmp_path / "shards")
    assert (len(first.train.labels), len(first.val.labels)) == (10, 4)
    monkeypatch.setattr(cifar, "decode_all", lambda *_: pytest.fail("decoded again"))
    again = read_small_pictures(tmp_path / "shards")
    assert np.array_equal(first.train.images, again.train.images)
    assert np.array_equal(first.val.images, again.val.images)


def test_a_margin_wider_than_the_images_is_refused_before_they_are_read(tmp_path: Path) -> None:
    options = ["--data", str(tmp_path / "nothing"), "--out", str(tmp_path / "run"), "--crop-padding", "33"]
    with pytest.raises(UserError, match=r"^crop_padding is 33; it must be at most 32 at this image_size\.$"):
        cifar.open_small_pictures(parse_job(CIFAR_RECIPES, "cifar_sdnet18", options), Rank(), torch.device("cpu"))


def test_an_image_that_does_not_decode_says_how_to_leave_it_out(small: Path) -> None:
    file = small / "train" / "a" / "0.png"
    content = bytearray(file.read_bytes())
    content[50:60] = bytes(10)
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} cannot be decoded: .*--verify full --bad-files skip"):
        read_small_pictures(small)
    found = read_small_pictures(small, "full", "skip")
    assert len(found.train.labels) == 9


def test_an_interrupted_check_goes_on_where_it_stopped(make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch) -> None:
    images, _ = read_image_folder(make_tree([7, 6], [1, 1]))
    (images.root / images.files[1]).write_bytes(b"")
    os.utime(images.root / images.files[1], ns=(1, 1))
    seen: list[str] = []
    inspect = check.inspect

    def look(span: check.Span, verify: check.Verify) -> str | None:
        seen.append(os.path.relpath(span.path, images.root))
        if len(seen) == 9:
            raise KeyboardInterrupt
        return inspect(span, verify)

    monkeypatch.setattr(check, "CHUNK", 2)
    monkeypatch.setattr(check, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(check, "inspect", look)
    with pytest.raises(KeyboardInterrupt):
        check.check_images(images, "header", 1)
    seen.clear()
    monkeypatch.setattr(check, "inspect", lambda span, verify: seen.append(span.path.name) or inspect(span, verify))
    (bad,) = check.check_images(images, "header", 1)
    assert (bad.position, bad.reason) == (1, "is empty")
    assert len(seen) == 13 - 8
    seen.clear()
    check.check_images(images, "header", 1)
    assert not seen
    check.check_images(images, "full", 1)  # a more thorough one starts anew
    assert len(seen) == 13


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (
            "--extras=trivial",
            "extras is trivial, which has no effect in train/cifar.py: these augmentations are DALI's",
        ),
        ("--first-image-size=4", "first_image_size is 4, which has no effect in train/cifar.py: all images are of "),
        ("--prefetch=3", "prefetch is 3, which has no effect in train/cifar.py: all images are in memory."),
        ("--hw-decoder-load=0.5", "hw_decoder_load is 0.5, which has no effect in train/cifar.py: "),
        ("--val-labels=labels.txt", "val_labels is labels.txt, which has no effect in train/cifar.py: the labels are "),
        ("--eval-resize=40", "eval_resize is 40; train/cifar.py evaluates the images as they are, so it must be "),
    ],
)
def test_settings_that_the_cifar_loader_does_not_use_are_refused(small: Path, option: str, sentence: str) -> None:
    fixed = ["--image-size=8", "--eval-resize=8", "--data", str(small), "--out", str(small.parent / "run")]
    job = parse_job(CIFAR_RECIPES, "cifar_sdnet18", [*fixed, option])
    with pytest.raises(UserError) as caught:
        cifar.open_small_pictures(job, Rank(), torch.device("cpu"))
    assert str(caught.value).startswith(sentence)


def test_the_margin_of_crops_is_refused_where_crops_are_of_another_kind(tmp_path: Path) -> None:
    job = parse_job(RECIPES, "demo", ["--data", "x", "--out", str(tmp_path / "run"), "--crop-padding=2"])
    with pytest.raises(
        UserError, match=r"^crop_padding is 2, which has no effect in train/imagenet\.py: random crops "
    ):
        open_pictures(job, Rank(), torch.device("cpu"))
