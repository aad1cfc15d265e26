"""ImageNet 2012 as it is downloaded, read in place: no need to unpack 138 GB.

Training images: `ILSVRC2012_img_train.tar`, a tar of one tar per class, or `train/<wnid>/*`. Validation images:
`ILSVRC2012_img_val.tar` or the flat folder `val/*`. Ground truth: see `sdnet.train.data.devkit`.
"""

from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from sdnet.train.data.archives import Lost, Member, list_tar
from sdnet.train.data.devkit import find_truth, read_truth
from sdnet.train.data.folder import ImageSet, entries_of, images_of, is_folder, is_visible, read_split
from sdnet.train.data.formats import EXTENSIONS
from sdnet.train.data.names import printable
from sdnet.train.data.shards import TarSet
from sdnet.train.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def holds_imagenet(root: Path) -> bool:
    """Return whether a folder holds one of the archives, or a flat folder of validation images and their labels."""
    if (root / TRAIN_TAR).is_file() or (root / VAL_TAR).is_file():
        return True
    val = root / "val"
    if not val.is_dir() or find_truth(root) is None:
        return False
    return not any(is_folder(entry) for entry in entries_of(val) if is_visible(entry))


def read_imagenet(root: Path, val_labels: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Return the training and validation set of a download.

    Args:
        root: The folder of the download.
        val_labels: The ground truth of the validation images, if it does not lie in `root`.

    Raises:
        UserError: Something is missing or broken, or an archive holds a hostile member.
    """
    train = _read_train_tar(root / TRAIN_TAR) if (root / TRAIN_TAR).is_file() else read_split(root / "train")
    truth = val_labels or find_truth(root)
    if truth is None:
        raise UserError(f"There is no ground truth of the validation images in {printable(root)}.")
    if not truth.exists():
        raise UserError(f"--val-labels is {printable(truth)}, which does not exist.")
    tar, folder = root / VAL_TAR, root / "val"
    if tar.is_file():
        listing = list_tar(tar)
        images, ignored = _images_first(listing.members)
        if not images:
            raise UserError(f"The archive {printable(tar)} holds no images.")
        files = [member.name for member in images]
        return train, TarSet(
            root,
            train.classes,
            files,
            read_truth(truth, files, train.classes),
            ignored,
            listing.lost,
            tars=(tar,),
            places=np.array([(0, member.offset, member.size) for member in images], np.int64),
        )
    if not folder.is_dir():
        raise UserError(f"{printable(root)} holds neither {VAL_TAR} nor the folder val.")
    files, ignored = images_of(folder)
    if not files:
        raise UserError(f"The folder {printable(folder)} has no images.")
    return train, ImageSet(folder, train.classes, files, read_truth(truth, files, train.classes), ignored)


def _read_train_tar(path: Path) -> TarSet:
    """Return the images in a tar of tars, `<wnid>.tar` each."""
    here = printable(path)
    outer = list_tar(path)
    archives = sorted((member for member in outer.members if _is_archive(member.name)), key=_class_of)
    if not archives:
        raise UserError(f"The archive {here} holds no archives of classes.")
    classes = tuple(map(_class_of, archives))
    if twice := next((name for name, count in Counter(classes).items() if count > 1), None):
        raise UserError(f"The archive {here} holds two archives of class {printable(twice)}.")
    ignored = [member.name for member in outer.members if not _is_archive(member.name)]
    lost = list(outer.lost)
    files: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for label, (name, archive) in enumerate(zip(classes, archives, strict=True)):
        listing = list_tar(path, archive.offset, archive.size)
        images, others = _images_first(listing.members)
        if not images:
            raise UserError(
                f"The archive {printable(archive.name)} in {here} has no images: an empty class would shift the labels."
            )
        files += [f"{name}/{image.name}" for image in images]
        labels += [label] * len(images)
        places += [(0, image.offset, image.size) for image in images]
        ignored += [f"{name}/{other}" for other in others]
        within = f"{here}/{printable(archive.name)}"
        lost += [Lost(within + flaw.name.removeprefix(here), flaw.reason) for flaw in listing.lost]
    return TarSet(path.parent, classes, files, labels, ignored, lost, tars=(path,), places=np.array(places, np.int64))


def _images_first(members: list[Member]) -> tuple[list[Member], list[str]]:
    """Return the members that are named as images, sorted, and the names of the others."""
    images = sorted(member for member in members if _is_image(member.name))
    return images, sorted(member.name for member in members if not _is_image(member.name))


def _class_of(archive: Member) -> str:
    return PurePosixPath(archive.name).stem


def _is_archive(name: str) -> bool:
    base = PurePosixPath(name).name
    return not base.startswith(".") and base.endswith(".tar")


def _is_image(name: str) -> bool:
    base = PurePosixPath(name).name
    return not base.startswith(".") and base.lower().endswith(EXTENSIONS)
