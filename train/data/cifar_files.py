"""The official files of CIFAR-10 and CIFAR-100: archives and what comes out of them, pickled or binary.

The pickled files hold dictionaries of arrays, lists and strings. They are read by an unpickler that admits nothing
else, so nothing in them is executed.
"""

import hashlib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdnet.train.data.archives import read_members
from sdnet.train.data.names import printable
from sdnet.train.errors import UserError

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Arrays:
    """One split: images [N, 3, H, W] uint8 RGB and labels [N] int64."""

    images: np.ndarray
    labels: np.ndarray

    def digest(self) -> str:
        """Return a fingerprint of pixels and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()

    def select(self, positions: np.ndarray) -> "Arrays":
        """Return the images at some positions."""
        return Arrays(self.images[positions], self.labels[positions])


@dataclass(frozen=True)
class Official:
    """The classes and both splits of official files, and sentences for the user."""

    classes: tuple[str, ...]
    train: Arrays
    val: Arrays
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How one version of one data set is laid out.

    Attributes:
        dataset: The name of the data set.
        archive: The name that the archive is downloaded under.
        folder: The folder in the archive.
        train: The files of the training set.
        test: The file of the test set.
        meta: The file with the names of the classes.
        names: Return the names of the classes from `meta`.
        arrays: Return the images and labels of a file.
        official: Size and MD5 sum of the official files by name; no sum where files of one's own have that size too.
    """

    dataset: str
    archive: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names: Callable[[bytes], list[str]]
    arrays: Callable[[bytes], Arrays]
    official: dict[str, tuple[int, str | None]]

    def find(self, root: Path) -> Path | None:
        """Return the folder or the archive of this layout in `root`, or `root` if it is one; None if there is none."""
        if root.is_file():
            return root if root.name == self.archive else None
        if (root / self.folder).is_dir():
            return root / self.folder
        if (root / self.meta).is_file() and (root / self.test).is_file():
            return root
        return root / self.archive if (root / self.archive).is_file() else None


class Found(NamedTuple):
    """Official files that were found: their layout, and the folder or archive."""

    layout: Layout
    place: Path


def find_official(root: Path) -> Found | None:
    """Return the official files in a folder, or the archive that `root` is; None if there are none.

    Raises:
        UserError: There are files of both data sets, or of one beside an ImageFolder tree.
    """
    found = [Found(layout, place) for layout in LAYOUTS if (place := layout.find(root)) is not None]
    if not found:
        return None
    places = {each.layout.dataset: each.place for each in reversed(found)}
    if (root / "train").is_dir():
        places["an image folder"] = root / "train"
    if len(places) > 1:
        listed = " and ".join(f"{dataset} ({place.name})" for dataset, place in places.items())
        some = printable(next(iter(places.values())))
        raise UserError(f"{printable(root)} holds {listed}: name the one to train on, such as --data {some}.")
    return found[0]


def read_official(found: Found) -> Official:
    """Read the official files.

    A file whose size is that of the official one must have its MD5 sum. One of another size is taken for a subset that
    somebody has made; its archive has the checksum of gzip.

    Raises:
        UserError: A file is missing or damaged, or holds something else.
    """
    layout, place = found
    if place.is_dir():
        read, names = partial(_read_file, place), (layout.meta, layout.test, *layout.train)
        own = [name for name in names if not _is_official(layout, place / name)]
    else:
        own = [] if _is_official(layout, place) else [place.name]
        wanted = {f"{layout.folder}/{name}" for name in (layout.meta, layout.test, *layout.train)}
        members = read_members(place, wanted.__contains__)
        read = partial(_member, {name.rsplit("/", 1)[-1]: data for name, data in members.items()}, place)
    note = f"{printable(place)} is not the official {layout.dataset}: the size of {', '.join(own)} differs."
    try:
        classes = tuple(layout.names(read(layout.meta)))
        *parts, test = (layout.arrays(read(name)) for name in (*layout.train, layout.test))
        for part in (*parts, test):
            if not len(part.labels) or part.labels.min() < 0 or part.labels.max() >= len(classes):
                raise ValueError("labels out of range")
    except UserError:
        raise
    except Exception as error:  # unpickling raises exceptions of every kind on damaged data
        raise UserError(
            f"{printable(place)} is not the official {layout.dataset}: {type(error).__name__} {error}."
        ) from error
    train = Arrays(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
    return Official(classes, train, test, (note,) if own else ())


def load_restricted(data: bytes) -> dict[str, Any]:
    """Return a pickled dictionary of arrays, lists, numbers and strings; admit nothing else, execute nothing.

    Raises:
        pickle.UnpicklingError: It asks for anything else.
    """
    stored = _Unpickler(BytesIO(data), encoding="bytes").load()
    if not isinstance(stored, dict):
        raise pickle.UnpicklingError("it holds no dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in stored.items()}


def _is_official(layout: Layout, path: Path) -> bool:
    """Return whether a file has the size of the official one, or is none of the files that count.

    Raises:
        UserError: It has that size, but not its content.
    """
    if path.name not in layout.official or not path.is_file():
        return True
    size, expected = layout.official[path.name]
    if path.stat().st_size != size:
        return False
    if expected is None:
        return True
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != expected:
        raise UserError(
            f"{printable(path)} is damaged: its MD5 sum is {found}, that of the official file {expected}; "
            "download it again."
        )
    return True


def _read_file(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{printable(folder)} lacks the file {name}.") from error
    except OSError as error:
        raise UserError(f"{printable(path)} cannot be read: {error.strerror}.") from error


def _member(contents: dict[str, bytes], archive: Path, name: str) -> bytes:
    if name not in contents:
        raise UserError(f"{printable(archive)} lacks the file {name}.")
    return contents[name]


def _pickled_names(key: str, data: bytes) -> list[str]:
    names = load_restricted(data)[key]
    return [name if isinstance(name, str) else name.decode() for name in names]  # a subset may be of Python 3


def _pickled_arrays(key: str, data: bytes) -> Arrays:
    stored = load_restricted(data)
    images, labels = stored["data"], np.asarray(stored[key], np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), PIXELS):
        raise ValueError(f"images of shape {images.shape} and type {images.dtype} for {len(labels)} labels")
    return Arrays(images.reshape(-1, 3, 32, 32), labels)


def _text_names(data: bytes) -> list[str]:
    return data.decode().split()


def _binary_arrays(label_bytes: int, data: bytes) -> Arrays:
    """Return the records of a binary file: labels, of which the last is the finest, then the pixels."""
    if len(data) % (label_bytes + PIXELS):
        raise ValueError(f"{len(data)} bytes are no whole number of records of {label_bytes + PIXELS}")
    records = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + PIXELS)
    images = np.ascontiguousarray(records[:, label_bytes:]).reshape(-1, 3, 32, 32)
    return Arrays(images, records[:, label_bytes - 1].astype(np.int64))


class _Unpickler(pickle.Unpickler):
    """Admits what an array of numbers is made of, under its names in old and new NumPy."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        match module_name, global_name:
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
            case (("numpy.core.multiarray" | "numpy._core.multiarray"), "_reconstruct"):
                return np.empty(0).__reduce__()[0]
            case "_codecs", "encode":  # Python 3 writes bytes for Python 2 as a call of it
                return _latin1
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for text in {encoding}")
    return text.encode("latin1")


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

LAYOUTS = (
    Layout(
        dataset="CIFAR-10",
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        train=_BATCHES,
        test="test_batch",
        meta="batches.meta",
        names=partial(_pickled_names, "label_names"),
        arrays=partial(_pickled_arrays, "labels"),
        official={
            "cifar-10-python.tar.gz": (170498071, "c58f30108f718f92721af3b95e74349a"),
            "data_batch_1": (31035704, "c99cafc152244af753f735de768cd75f"),
            "data_batch_2": (31035320, "d4bba439e000b95fd0a9bffe97cbabec"),
            "data_batch_3": (31035999, "54ebc095f3ab1f0389bbae665268c751"),
            "data_batch_4": (31035696, "634d18415352ddfa80567beed471001a"),
            "data_batch_5": (31035623, "482c414d41f54cd18b22e5b47cb7c3cb"),
            "test_batch": (31035526, "40351d587109b95175f43aff81a1287e"),
        },
    ),
    Layout(
        dataset="CIFAR-100",
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        train=("train",),
        test="test",
        meta="meta",
        names=partial(_pickled_names, "fine_label_names"),
        arrays=partial(_pickled_arrays, "fine_labels"),
        official={
            "cifar-100-python.tar.gz": (169001437, "eb9058c3a382ffc7106e4002c42a8d85"),
            "train": (155249918, "16019d7e3df5f24257cddd939b257f8d"),
            "test": (31049918, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
        },
    ),
    Layout(
        dataset="CIFAR-10",
        archive="cifar-10-binary.tar.gz",
        folder="cifar-10-batches-bin",
        train=tuple(f"{name}.bin" for name in _BATCHES),
        test="test_batch.bin",
        meta="batches.meta.txt",
        names=_text_names,
        arrays=partial(_binary_arrays, 1),
        official={
            "cifar-10-binary.tar.gz": (170052171, "c32a1d4ab5d03f1284b67883e8d87530"),
            **{f"{name}.bin": (10_000 * (1 + PIXELS), None) for name in (*_BATCHES, "test_batch")},
        },
    ),
    Layout(
        dataset="CIFAR-100",
        archive="cifar-100-binary.tar.gz",
        folder="cifar-100-binary",
        train=("train.bin",),
        test="test.bin",
        meta="fine_label_names.txt",
        names=_text_names,
        arrays=partial(_binary_arrays, 2),
        official={
            "cifar-100-binary.tar.gz": (168513733, "03b5dce01913d631647c71ecec9e9cb8"),
            "train.bin": (50_000 * (2 + PIXELS), None),
            "test.bin": (10_000 * (2 + PIXELS), None),
        },
    ),
)
