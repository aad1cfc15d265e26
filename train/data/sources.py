"""One door to every source of pictures that training and `sdnet.train.prepare` read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sdnet.train.data.check import BadPicture, check_pictures, refuse
from sdnet.train.data.folder import ImageSet, read_image_folder
from sdnet.train.data.imagenet_download import holds_imagenet, read_imagenet
from sdnet.train.data.shards import holds_shards, read_shards
from sdnet.train.errors import UserError
from sdnet.train.job import BadFiles, Verify

NOT_PICTURES = "not used: hidden, nested, or not named as a picture"


@dataclass(frozen=True)
class Checked:
    """The training and validation set without what cannot be used.

    `left_out` are (file, reason) of what is not used; `notes` say how much, in sentences for the user.
    """

    train: ImageSet
    val: ImageSet
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_pictures(root: Path, val_labels: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and validation set under `root`.

    It may be a folder of tar shards (`sdnet.train.data.shards`), ImageNet as it is downloaded
    (`sdnet.train.data.imagenet_download`; `val_labels` may give its ground truth), or an ImageFolder tree.

    Raises:
        UserError: it is none of them, or not whole.
    """
    if holds_shards(root):
        return read_shards(root)
    if val_labels is not None or holds_imagenet(root):
        return read_imagenet(root, val_labels)
    return read_image_folder(root)


def read_checked(
    root: Path,
    val_labels: Path | None = None,
    verify: Verify = "header",
    bad_files: BadFiles = "fail",
    threads: int = 2,
) -> Checked:
    """`read_pictures`, with a look at every picture; see `sdnet.train.data.check` for what `verify` looks at.

    Raises:
        UserError: pictures cannot be used and `bad_files` is "fail" (they are listed), or none is left of a class.
    """
    sets = read_pictures(root, val_labels)
    found = [check_pictures(images, verify, threads) for images in sets]
    if bad_files == "fail":
        refuse(root, [*found[0], *found[1]])
    left_out: list[tuple[str, str]] = []
    notes: list[str] = []
    for images, bad in zip(sets, found, strict=True):
        if bad:
            notes.append(f"{len(bad)} pictures in {images.root} cannot be used and are left out.")
            left_out += [(picture.name, picture.reason) for picture in bad]
        if images.ignored:
            some = images.ignored[0]
            notes.append(f"{len(images.ignored)} entries in {images.root} are {NOT_PICTURES}, such as {some}.")
            left_out += [(str(images.root / name), f"is {NOT_PICTURES}") for name in images.ignored]
    train, val = (_without(images, bad) for images, bad in zip(sets, found, strict=True))
    return Checked(train, val, tuple(left_out), tuple(notes))


def _without(images: ImageSet, bad: Sequence[BadPicture]) -> ImageSet:
    """The set without bad pictures."""
    if not bad:
        return images
    places = {picture.place for picture in bad}
    kept = images.select([place for place in range(len(images)) if place not in places])
    if emptied := set(images.labels) - set(kept.labels):
        raise UserError(f"None of the pictures of class {images.classes[min(emptied)]} in {images.root} can be used.")
    return kept
