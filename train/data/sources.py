"""The sources of images that training and `sdnet.train.prepare` read.

A new kind of source is a module with two functions, one that tells whether a folder holds it and one that reads it, and
an entry in `READERS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sdnet.train.data.check import BadImage, check_images, refuse
from sdnet.train.data.folder import ImageSet, holds_image_folder, read_image_folder
from sdnet.train.data.imagenet_download import holds_imagenet, read_imagenet
from sdnet.train.data.names import printable
from sdnet.train.data.shards import holds_shards, read_shards
from sdnet.train.errors import UserError
from sdnet.train.job import BadFiles, Verify

NOT_IMAGES = "not used: hidden, nested, or not named as an image"


class Reader(NamedTuple):
    """A kind of source: its name, whether a folder holds it, and how it is read."""

    name: str
    holds: Callable[[Path], bool]
    read: Callable[[Path], tuple[ImageSet, ImageSet]]


# The first one whose `holds` is true reads a folder; the last one explains what is missing.
READERS = (
    Reader("tar shards", holds_shards, read_shards),
    Reader("the ImageNet download", holds_imagenet, read_imagenet),
    Reader("an ImageFolder tree", holds_image_folder, read_image_folder),
)


@dataclass(frozen=True)
class Checked:
    """The training and validation set without what cannot be used.

    Attributes:
        train: The training set.
        val: The validation set.
        left_out: (file, reason) for everything that is not used; the names are on one line each.
        notes: Sentences for the user that say how much is left out.
    """

    train: ImageSet
    val: ImageSet
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_pictures(
    root: Path, val_labels: Path | None = None, bad_files: BadFiles = "fail"
) -> tuple[ImageSet, ImageSet]:
    """Return the training and validation set under `root`, without looking into the images.

    Args:
        root: A folder of tar shards (`sdnet.train.data.shards`), ImageNet as it is downloaded
            (`sdnet.train.data.imagenet_download`), or an ImageFolder tree.
        val_labels: The ground truth of a flat validation folder or of ImageNet's validation archive.
        bad_files: "fail" to refuse links that lead nowhere and damaged archives, "skip" to list them in `lost`.

    Raises:
        UserError: The folder holds none of them, or something is missing or damaged.
    """
    if val_labels is None:
        reader = next((reader for reader in READERS if reader.holds(root)), READERS[-1])
        sets = reader.read(root)
    elif holds_shards(root):
        raise UserError(
            f"--val-labels is {printable(val_labels)}, but the tar shards in {printable(root)} have labels."
        )
    else:
        sets = read_imagenet(root, val_labels)
    if bad_files == "fail":
        refuse(root, [lost for images in sets for lost in images.lost])
    return sets


def read_checked(
    root: Path,
    val_labels: Path | None = None,
    verify: Verify = "header",
    bad_files: BadFiles = "fail",
    threads: int = 2,
) -> Checked:
    """Return what `read_pictures` finds after a look at every image.

    Args:
        root: As for `read_pictures`.
        val_labels: As for `read_pictures`.
        verify: "header" looks at both ends of an image, "full" decodes it; see `sdnet.train.data.check`.
        bad_files: "fail" to refuse what cannot be used, "skip" to leave it out.
        threads: Threads that look at images.

    Raises:
        UserError: Something cannot be used and `bad_files` is "fail" (it is listed), or none is left of a class.
    """
    sets = read_pictures(root, val_labels, "skip")
    found = [check_images(images, verify, threads) for images in sets]
    unusable = [
        [*images.lost, *((image.name, image.reason) for image in bad)] for images, bad in zip(sets, found, strict=True)
    ]
    if bad_files == "fail":
        refuse(root, [*unusable[0], *unusable[1]])
    left_out: list[tuple[str, str]] = []
    notes: list[str] = []
    for images, bad in zip(sets, unusable, strict=True):
        here = printable(images.root)
        if bad:
            notes.append(f"{len(bad)} files in {here} cannot be used and are left out.")
            left_out += [(name, printable(reason)) for name, reason in bad]
        if images.ignored:
            some = printable(images.ignored[0])
            notes.append(f"{len(images.ignored)} entries in {here} are {NOT_IMAGES}, such as {some}.")
            left_out += [(printable(images.root / name), f"is {NOT_IMAGES}") for name in images.ignored]
    train, val = (_without(images, bad) for images, bad in zip(sets, found, strict=True))
    return Checked(train, val, tuple(left_out), tuple(notes))


def _without(images: ImageSet, bad: Sequence[BadImage]) -> ImageSet:
    """Return the set without bad images."""
    if not bad:
        return images
    positions = {image.position for image in bad}
    kept = images.select([index for index in range(len(images)) if index not in positions])
    if emptied := set(images.labels) - set(kept.labels):
        name = printable(images.classes[min(emptied)])
        raise UserError(f"None of the images of class {name} in {printable(images.root)} can be used.")
    return kept
