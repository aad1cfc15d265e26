"""An ImageFolder tree, `train/<class>/*` and `val/<class>/*`, checked before any training."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from sdnet.train.data.archives import Lost
from sdnet.train.data.formats import EXTENSIONS
from sdnet.train.data.names import printable
from sdnet.train.data.span import Span
from sdnet.train.errors import UserError

# Folders that file systems, archives and network drives make beside those of the user.
SYSTEM_FOLDERS = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found")


@dataclass(frozen=True)
class ImageSet:
    """The images of one split in a fixed order: classes sorted by name, files sorted within a class.

    Attributes:
        root: The folder of the split.
        classes: The names of the classes.
        files: The names of the images, relative to `root`.
        labels: `labels[i]` is the index of the class of `files[i]` in `classes`.
        ignored: Other entries: hidden files, folders of the system, nested folders, loose files, other extensions.
        lost: What should hold images and cannot be read: links to nothing, damaged parts of archives.
    """

    root: Path
    classes: tuple[str, ...]
    files: Sequence[str]
    labels: Sequence[int]
    ignored: Sequence[str] = ()
    lost: Sequence[Lost] = ()

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.files)

    def digest(self) -> str:
        """Return a fingerprint of names and labels (not of pixels), equal on any machine that holds the same tree."""
        digest = hashlib.sha256("\0".join(self.classes).encode(errors="surrogateescape"))
        for file, label in zip(self.files, self.labels, strict=True):
            digest.update(f"\0{file}\0{label}".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def place(self) -> Path:
        """Return the folder or the file by which caches tell this set from others."""
        return self.root

    def where(self, index: int) -> Span:
        """Return where the bytes of an image lie."""
        return Span(self.root / self.files[index])

    def name(self, index: int) -> str:
        """Return the path of an image for messages, on one line."""
        return printable(self.root / self.files[index])

    def paths(self) -> Iterable[Path]:
        """Return the files on disk whose change would change the images."""
        return (self.root / file for file in self.files)

    def select(self, indices: Sequence[int]) -> Self:
        """Return some of the images, in the order of `indices`; the classes stay."""
        files, labels = [self.files[index] for index in indices], [self.labels[index] for index in indices]
        return replace(self, files=files, labels=labels)


def holds_image_folder(root: Path) -> bool:
    """Return whether a folder holds the training set of an ImageFolder tree."""
    return (root / "train").is_dir()


def read_image_folder(root: Path) -> tuple[ImageSet, ImageSet]:
    """Return the training and validation set under `root`; where there is no val, test is taken.

    Raises:
        UserError: A folder is missing, there are no classes, a class has no image, or the two class sets differ.
    """
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"The data folder {printable(root)} {state}.")
    held_out = root / ("test" if (root / "test").is_dir() and not (root / "val").is_dir() else "val")
    train, val = read_split(root / "train"), read_split(held_out)
    if train.classes != val.classes:
        differences = [
            f"only in {split}: {_shorten(sorted(set(ours) - set(theirs)))}"
            for split, ours, theirs in (("train", train.classes, val.classes), ("val", val.classes, train.classes))
            if set(ours) - set(theirs)
        ]
        lost = "".join(f"; {name} {reason}" for name, reason in (*train.lost, *val.lost)[:1])
        raise UserError(f"The classes of train and val in {printable(root)} differ; {'; '.join(differences)}{lost}.")
    return train, val


def read_split(root: Path) -> ImageSet:
    """Return the images of `root`/<class>/*.

    Raises:
        UserError: The folder is missing, there are no classes, or a class has no image.
    """
    if not root.is_dir():
        raise UserError(
            f"There is no folder {printable(root)}: an ImageFolder tree holds train/<class>/ and val/<class>/."
        )
    entries = entries_of(root)
    visible = [entry for entry in entries if is_visible(entry)]
    classes = tuple(entry.name for entry in visible if is_folder(entry))
    lost = tuple(
        Lost(printable(entry.path), "is a link whose target is missing") for entry in visible if leads_nowhere(entry)
    )
    if not classes:
        missing = "".join(f"; {name} {reason}" for name, reason in lost[:1])
        raise UserError(
            f"The folder {printable(root)} has no class folders: images belong in {root.name}/<class>/{missing}."
        )
    files: list[str] = []
    labels: list[int] = []
    ignored = [entry.name for entry in entries if entry.name not in classes and not leads_nowhere(entry)]
    for label, name in enumerate(classes):
        images, others = images_of(root / name)
        if not images:
            raise UserError(
                f"The class folder {printable(root / name)} has no images: an empty class would shift the labels."
            )
        files += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
        ignored += [f"{name}/{other}" for other in others]
    return ImageSet(root, classes, files, labels, ignored, lost)


def images_of(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names in a folder that belong to images, and the other names, both sorted.

    Whatever is named as an image and is no folder counts as one: the check of the images finds links to nothing.
    """
    images: list[str] = []
    others: list[str] = []
    for entry in entries_of(folder):
        named = entry.name[0] != "." and entry.name.lower().endswith(EXTENSIONS)
        (images if named and not is_folder(entry) else others).append(entry.name)
    return images, others


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name.

    Raises:
        UserError: The folder cannot be read.
    """
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {printable(folder)} cannot be read: {error.strerror}.") from error


def is_visible(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is neither hidden nor a folder that systems make beside those of the user."""
    return entry.name[0] != "." and entry.name not in SYSTEM_FOLDERS


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one; False for a link that leads nowhere or in a circle."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def leads_nowhere(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link whose target is missing or cannot be reached."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _shorten(names: Sequence[str], most: int = 5) -> str:
    listed = ", ".join(printable(name) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")
