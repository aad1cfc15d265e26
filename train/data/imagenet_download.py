"""ImageNet 2012 as it is downloaded, read in place: no need to unpack 138 GB.

Training pictures: `ILSVRC2012_img_train.tar`, a tar of one tar per class, or `train/<wnid>/*`. Validation pictures:
`ILSVRC2012_img_val.tar` or the flat folder `val/*`. Ground truth: see `sdnet.train.data.devkit`.
"""

import os
from pathlib import Path, PurePosixPath

import numpy as np

from sdnet.train.data.archives import tar_members
from sdnet.train.data.devkit import find_truth, read_truth
from sdnet.train.data.folder import EXTENSIONS, ImageSet, read_split
from sdnet.train.data.shards import TarSet
from sdnet.train.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


def holds_imagenet(root: Path) -> bool:
    """Whether a folder holds one of the archives, or validation pictures in a flat folder beside their truth."""
    if (root / TRAIN_TAR).is_file() or (root / VAL_TAR).is_file():
        return True
    val = root / "val"
    return val.is_dir() and find_truth(root) is not None and not any(entry.is_dir() for entry in os.scandir(val))


def read_imagenet(root: Path, val_labels: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """The training and validation set of a download; `val_labels` is the ground truth if it does not lie in `root`.

    Raises:
        UserError: something is missing or broken, or an archive holds a hostile member.
    """
    train = _read_train_tar(root / TRAIN_TAR) if (root / TRAIN_TAR).is_file() else read_split(root / "train")
    truth = val_labels or find_truth(root)
    if truth is None or not truth.exists():
        raise UserError(f"There is no {truth or f'ground truth of the validation pictures in {root}'}.")
    tar, folder = root / VAL_TAR, root / "val"
    if tar.is_file():
        members = sorted(member for member in tar_members(tar) if _is_picture(member.name))
        files = [member.name for member in members]
        places = np.array([(0, member.offset, member.size) for member in members], np.int64).reshape(-1, 3)
        labels = read_truth(truth, files, train.classes)
        return train, TarSet(root, train.classes, files, labels, tars=(tar,), places=places)
    if not folder.is_dir():
        raise UserError(f"{root} holds neither {VAL_TAR} nor the folder val.")
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    files = [entry.name for entry in entries if _is_picture(entry.name) and entry.is_file()]
    ignored = sorted({entry.name for entry in entries} - set(files))
    if not files:
        raise UserError(f"The folder {folder} has no pictures.")
    return train, ImageSet(folder, train.classes, files, read_truth(truth, files, train.classes), ignored)


def _read_train_tar(path: Path) -> TarSet:
    """The pictures in a tar of tars, `<wnid>.tar` each."""
    inner = sorted(member for member in tar_members(path) if member.name.endswith(".tar"))
    if not inner:
        raise UserError(f"The archive {path} holds no archives of classes.")
    classes = tuple(PurePosixPath(member.name).stem for member in inner)
    files: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for label, (name, archive) in enumerate(zip(classes, inner, strict=True)):
        pictures = sorted(m for m in tar_members(path, archive.offset, archive.size) if _is_picture(m.name))
        if not pictures:
            raise UserError(
                f"The archive {archive.name} in {path} has no pictures: an empty class would shift the labels."
            )
        files += [f"{name}/{picture.name}" for picture in pictures]
        labels += [label] * len(pictures)
        places += [(0, picture.offset, picture.size) for picture in pictures]
    return TarSet(path.parent, classes, files, labels, tars=(path,), places=np.array(places, np.int64))


def _is_picture(name: str) -> bool:
    base = PurePosixPath(name).name
    return not base.startswith(".") and base.lower().endswith(EXTENSIONS)
