"""An ImageFolder tree, `train/<class>/*` and `val/<class>/*`, checked before any training."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from sdnet.train.data.span import Span
from sdnet.train.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class ImageSet:
    """The pictures of one split in a fixed order: classes sorted by name, files sorted within a class.

    `files` are relative to `root`; `labels[i]` is the index of the class of `files[i]` in `classes`;
    `ignored` is what else lies there: hidden files and folders, nested folders, loose files, other extensions.
    """

    root: Path
    classes: tuple[str, ...]
    files: Sequence[str]
    labels: Sequence[int]
    ignored: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.files)

    def digest(self) -> str:
        """A fingerprint of names and labels (not of pixels): equal on any machine that holds the same tree."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for file, label in zip(self.files, self.labels, strict=True):
            digest.update(f"\0{file}\0{label}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def where(self, index: int) -> Span:
        """Where the bytes of a picture lie."""
        return Span(self.root / self.files[index])

    def paths(self) -> Iterable[Path]:
        """The files on disk whose change would change the pictures."""
        return (self.root / file for file in self.files)

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the pictures, in the order of `indices`; the classes stay."""
        files, labels = [self.files[index] for index in indices], [self.labels[index] for index in indices]
        return replace(self, files=files, labels=labels)


def read_image_folder(root: Path) -> tuple[ImageSet, ImageSet]:
    """The training and validation set under `root`; where there is no val, test is taken.

    Raises:
        UserError: a folder is missing, there are no classes, a class has no picture, or the two class sets differ.
    """
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist.")
    held_out = root / ("test" if (root / "test").is_dir() and not (root / "val").is_dir() else "val")
    train, val = read_split(root / "train"), read_split(held_out)
    if train.classes != val.classes:
        differences = [
            f"only in {split}: {_shorten(sorted(set(ours) - set(theirs)))}"
            for split, ours, theirs in (("train", train.classes, val.classes), ("val", val.classes, train.classes))
            if set(ours) - set(theirs)
        ]
        raise UserError(f"The classes of train and val in {root} differ; {'; '.join(differences)}.")
    return train, val


def read_split(root: Path) -> ImageSet:
    """The pictures of `root`/<class>/*; errors as in `read_image_folder`."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: an ImageFolder tree holds train/<class>/ and val/<class>/.")
    found = sorted(os.scandir(root), key=lambda entry: entry.name)
    classes = tuple(entry.name for entry in found if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise UserError(f"The folder {root} has no class folders: pictures belong in {root.name}/<class>/.")
    files: list[str] = []
    labels: list[int] = []
    ignored = [entry.name for entry in found if entry.name not in classes]
    for label, name in enumerate(classes):
        entries = sorted(os.scandir(root / name), key=lambda entry: entry.name)
        pictures = [entry.name for entry in entries if _is_picture(entry)]
        if not pictures:
            raise UserError(f"The class folder {root / name} has no pictures: an empty class would shift the labels.")
        files += [f"{name}/{picture}" for picture in pictures]
        labels += [label] * len(pictures)
        ignored += [f"{name}/{entry.name}" for entry in entries if not _is_picture(entry)]
    return ImageSet(root, classes, files, labels, ignored)


def _is_picture(entry: os.DirEntry[str]) -> bool:
    return entry.name[0] != "." and entry.name.lower().endswith(EXTENSIONS) and entry.is_file()


def _shorten(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
