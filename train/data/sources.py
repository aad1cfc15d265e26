"""The sources of images that training and `sdnet.train.prepare` read.

A new kind of source is a module with two functions, one that tells whether a folder holds it and one that reads it, and
an entry in `READERS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from sdnet.train.bad_images import BadImages, image_key
from sdnet.train.data.check import BadImage, check_images, inspect, refuse
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
        root: The data folder, as messages name it.
        bad: (image, reason) for the images that were looked at and are in none of the sets.
        dropped: The reason for each image that is in a set, for it was good when the run began, and cannot be used now.
    """

    train: ImageSet
    val: ImageSet
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    root: str = ""
    bad: tuple[tuple[str, str], ...] = ()
    dropped: Mapping[str, str] = field(default_factory=dict)

    def dropped_from(self, images: ImageSet) -> list[int]:
        """Return the positions in a set of the images that cannot be used now."""
        if not self.dropped:
            return []
        return [index for index in range(len(images)) if image_key(images.name(index), self.root) in self.dropped]

    def without_dropped(self, images: ImageSet) -> ImageSet:
        """Return a set without the images that cannot be used now."""
        gone = set(self.dropped_from(images))
        return images.select([index for index in range(len(images)) if index not in gone]) if gone else images


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
        UserError: The folder holds none of them, or shards beside an ImageFolder tree, or something is missing or
            damaged.
    """
    if holds_shards(root) and holds_image_folder(root):
        raise UserError(
            f"{printable(root)} holds tar shards and a folder train: move the one to train on to a folder of its own."
        )
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
    recorded: BadImages | None = None,
) -> Checked:
    """Return what `read_pictures` finds after a look at every image.

    Args:
        root: As for `read_pictures`.
        val_labels: As for `read_pictures`.
        verify: "header" looks at both ends of an image, "full" decodes it; see `sdnet.train.data.check`.
        bad_files: "fail" to refuse what cannot be used, "skip" to leave it out.
        threads: Threads that look at images.
        recorded: What a run has recorded that is resumed. The sets are then those of its start; images that are
            recorded as left out are no reason to refuse, and images that broke since then are decoded.

    Raises:
        UserError: Something cannot be used and `bad_files` is "fail" (it is listed), or none is left of a class.
    """
    sets = read_pictures(root, val_labels, "skip")
    here = printable(root)
    found = [check_images(images, verify, threads) for images in sets]
    dropped: dict[str, str] = {}
    if recorded:
        divided = [_since_start(images, bad, recorded, here) for images, bad in zip(sets, found, strict=True)]
        now = [image for _, broken in divided for image in broken]
        if bad_files == "fail":
            refuse(root, [(image.name, image.reason) for image in now])
        found = [at_start for at_start, _ in divided]
        dropped = {**recorded.dropped, **{image_key(image.name, here): image.reason for image in now}}
    unusable = [
        [*images.lost, *((image.name, image.reason) for image in bad)] for images, bad in zip(sets, found, strict=True)
    ]
    if bad_files == "fail" and not recorded:
        refuse(root, [*unusable[0], *unusable[1]])
    left_out: list[tuple[str, str]] = []
    notes: list[str] = []
    for images, bad in zip(sets, unusable, strict=True):
        split = printable(images.root)
        if bad:
            notes.append(f"{len(bad)} files in {split} cannot be used and are left out.")
            left_out += [(name, printable(reason)) for name, reason in bad]
        if images.ignored:
            some = printable(images.ignored[0])
            notes.append(f"{len(images.ignored)} entries in {split} are {NOT_IMAGES}, such as {some}.")
            left_out += [(printable(images.root / name), f"is {NOT_IMAGES}") for name in images.ignored]
    train, val = (_without(images, bad) for images, bad in zip(sets, found, strict=True))
    if dropped:
        notes.append(
            f"{len(dropped)} images that broke after the run began are left out, such as {next(iter(dropped))}."
        )
        left_out += [(f"{here}/{name}", reason) for name, reason in dropped.items()]
    at_start = tuple((image_key(image.name, here), image.reason) for bad in found for image in bad)
    return Checked(train, val, tuple(left_out), tuple(notes), here, at_start, dropped)


def _since_start(
    images: ImageSet, bad: Sequence[BadImage], recorded: BadImages, root: str
) -> tuple[list[BadImage], list[BadImage]]:
    """Divide a set's bad images into those left out when the run began, and those that broke since then.

    Images that are recorded as left out or dropped count as such even if they have been repaired.
    """
    keys = {image_key(images.name(index), root): index for index in range(len(images))}
    now = {image_key(image.name, root): image for image in bad}
    for key in (*recorded.at_start, *recorded.broken):
        if key in keys and key not in now and key not in recorded.dropped:
            index = keys[key]
            reason = recorded.at_start.get(key) or inspect(images.where(index))  # what broke once is decoded
            if reason:
                now[key] = BadImage(index, images.name(index), reason)
    at_start = [image for key, image in now.items() if key in recorded.at_start]
    known = (recorded.at_start, recorded.dropped)
    return at_start, [image for key, image in now.items() if not any(key in names for names in known)]


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
