"""Checks of an ImageFolder tree: each flaw has its sentence."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sdnet.train.data.folder import read_image_folder
from sdnet.train.errors import UserError

MakeTree = Callable[[Sequence[int], Sequence[int]], Path]


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_image_folder(root)
    return str(caught.value)


def test_reads_classes_files_and_labels_in_sorted_order(make_tree: MakeTree) -> None:
    train, val = read_image_folder(make_tree([2, 1], [1, 2]))
    assert train.classes == val.classes == ("class 00", "class 01")
    assert list(train.files) == ["class 00/000.jpg", "class 00/001.jpg", "class 01/000.jpg"]
    assert list(train.labels) == [0, 0, 1]
    assert list(val.labels) == [0, 1, 1]


def test_digest_follows_names_and_classes(make_tree: MakeTree) -> None:
    root = make_tree([2, 1], [1, 1])
    before = read_image_folder(root)[0].digest()
    assert read_image_folder(root)[0].digest() == before
    (root / "train/class 00/001.jpg").rename(root / "train/class 00/002.jpg")
    assert read_image_folder(root)[0].digest() != before


def test_files_that_are_no_pictures_are_named_not_used(make_tree: MakeTree) -> None:
    root = make_tree([1], [1])
    (root / "train/class 00/notes.txt").write_text("not a picture")
    (root / "train/class 00/.hidden.jpg").write_bytes(b"")
    (root / "train/class 00/nested.jpg").mkdir()
    train, _ = read_image_folder(root)
    assert list(train.files) == ["class 00/000.jpg"]
    assert list(train.ignored) == ["class 00/.hidden.jpg", "class 00/nested.jpg", "class 00/notes.txt"]


def test_missing_folder(tmp_path: Path) -> None:
    assert refusal(tmp_path / "no") == f"The data folder {tmp_path / 'no'} does not exist."


def test_empty_folder(tmp_path: Path) -> None:
    sentence = f"There is no folder {tmp_path / 'train'}: an ImageFolder tree holds train/<class>/ and val/<class>/."
    assert refusal(tmp_path) == sentence


def test_missing_val(make_tree: MakeTree) -> None:
    root = make_tree([1], [1])
    shutil.rmtree(root / "val")
    assert f"no folder {root / 'val'}" in refusal(root)


def test_no_class_folders(make_tree: MakeTree) -> None:
    root = make_tree([1], [1])
    (root / "train/class 00/000.jpg").rename(root / "train/000.jpg")
    (root / "train/class 00").rmdir()
    assert refusal(root) == f"The folder {root / 'train'} has no class folders: images belong in train/<class>/."


def test_class_sets_that_differ(make_tree: MakeTree) -> None:
    root = make_tree([1, 1], [1, 1])
    (root / "val/class 01").rename(root / "val/cats")
    assert (
        refusal(root) == f"The classes of train and val in {root} differ; only in train: class 01; only in val: cats."
    )


def test_empty_class_folder(make_tree: MakeTree) -> None:
    root = make_tree([1, 1], [1, 1])
    (root / "train/class 00/000.jpg").unlink()
    empty = root / "train/class 00"
    assert refusal(root) == f"The class folder {empty} has no images: an empty class would shift the labels."


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", "lost+found"])
def test_a_folder_of_the_system_is_no_class(make_tree: MakeTree, name: str) -> None:
    root = make_tree([1, 1], [1, 1])
    for split in ("train", "val"):
        shutil.copytree(root / split / "class 00", root / split / name)
    train, val = read_image_folder(root)
    assert train.classes == val.classes == ("class 00", "class 01")
    assert list(train.ignored) == [name]


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "data").touch()
    assert refusal(tmp_path / "data") == f"The data folder {tmp_path / 'data'} is not a folder."
