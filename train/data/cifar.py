"""CIFAR-10, CIFAR-100 and other sets of small pictures of one size, as arrays.

A folder may hold the official archive (`cifar-10-python.tar.gz`, `cifar-100-python.tar.gz`), what comes out of it
(`cifar-10-batches-py/`, `cifar-100-python/`), or an image folder with train/<class>/* and test/<class>/* or val.
"""

import hashlib
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdnet.train.data.archives import read_members
from sdnet.train.data.check import FORMATS
from sdnet.train.data.epochs import loader_options
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.mixing import mixing_of
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.data.sources import read_checked
from sdnet.train.errors import UserError
from sdnet.train.job import BadFiles, Job, Verify


@dataclass(frozen=True)
class Arrays:
    """One split: images [N, 3, H, W] uint8 RGB and labels [N] int64."""

    images: np.ndarray
    labels: np.ndarray

    def digest(self) -> str:
        """A fingerprint of pixels and labels."""
        return hashlib.sha256(self.images.tobytes() + self.labels.tobytes()).hexdigest()


@dataclass(frozen=True)
class SmallPictures:
    """Both splits; `left_out` and `notes` as in `Data`."""

    classes: tuple[str, ...]
    train: Arrays
    val: Arrays
    left_out: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """How an official archive is laid out: its folder, batch files, and the keys in their dictionaries."""

    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    names: str
    labels: str

    @property
    def archive(self) -> str:
        """The name that it is downloaded under."""
        return f"{self.folder.removesuffix('-batches-py').removesuffix('-python')}-python.tar.gz"


LAYOUTS = (
    Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        "test_batch",
        "batches.meta",
        "label_names",
        "labels",
    ),
    Layout("cifar-100-python", ("train",), "test", "meta", "fine_label_names", "fine_labels"),
)


def open_small_pictures(job: Job, rank: Rank, device: torch.device) -> Data:
    """The loaders of one rank, with all pictures on the device.

    Raises:
        UserError: the data are missing or not what they should be, or the batch does not divide.
    """
    recipe = job.recipe
    found = read_small_pictures(job.data, job.verify, job.bad_files)
    train, val = found.train, found.val
    height, width = train.images.shape[2:]
    if (height, width) != (recipe.image_size, recipe.image_size):
        raise UserError(f"The pictures are {width} x {height}: pass --image-size, or train with train/imagenet.py.")
    options = loader_options(job, rank, device)
    digest = train.digest()
    return Data(
        train=ResidentLoader(
            train.images,
            train.labels,
            name=f"The training set in {job.data}",
            digest=digest,
            augment=True,
            padding=recipe.crop_padding,
            mixing=mixing_of(recipe, len(found.classes)),
            **options,
        ),
        val=ResidentLoader(
            val.images, val.labels, name=f"The test set in {job.data}", digest=val.digest(), augment=False, **options
        ),
        val_size=len(val.labels),
        classes=found.classes,
        digest=digest,
        left_out=found.left_out,
        notes=found.notes,
    )


def read_small_pictures(root: Path, verify: Verify = "header", bad_files: BadFiles = "fail") -> SmallPictures:
    """What lies under `root`; for `verify` and `bad_files` see `sdnet.train.data.sources`.

    Raises:
        UserError: there are no such data, or they are broken.
    """
    for layout in LAYOUTS:
        for folder in (root / layout.folder, root):
            if (folder / layout.meta).is_file() and (folder / layout.test).is_file():
                return _read_official(layout, lambda name, folder=folder: _read_file(folder / name), folder)
        for archive in (root / layout.archive, root):
            if archive.is_file() and archive.name == layout.archive:
                return _read_archive(layout, archive)
    checked = read_checked(root, None, verify, bad_files)
    train, val = decode_all(checked.train), decode_all(checked.val)
    if train.images.shape[2:] != val.images.shape[2:]:
        raise UserError(f"The pictures of both splits in {root} are not of the same size.")
    return SmallPictures(checked.train.classes, train, val, checked.left_out, checked.notes)


def decode_all(images: ImageSet) -> Arrays:
    """All pictures of a set as Pillow decodes them.

    Raises:
        UserError: a picture does not decode, or is not of the first one's size.
    """

    def decode(index: int) -> np.ndarray:
        try:
            with Image.open(BytesIO(images.where(index).read()), formats=FORMATS) as picture:
                return np.asarray(picture.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"The picture {images.root / images.files[index]} cannot be decoded: {error}.") from error

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as executor:
        first = decode(0)
        decoded = np.empty((len(images), 3, *first.shape[:2]), np.uint8)
        for index, pixels in enumerate(executor.map(decode, range(len(images)))):
            if pixels.shape != first.shape:
                sizes = [f"{shape[1]} x {shape[0]}" for shape in (pixels.shape, first.shape)]
                raise UserError(f"The picture {images.root / images.files[index]} is {sizes[0]}, the first {sizes[1]}.")
            decoded[index] = pixels.transpose(2, 0, 1)
    return Arrays(decoded, np.asarray(images.labels, np.int64))


def _read_archive(layout: Layout, archive: Path) -> SmallPictures:
    wanted = {f"{layout.folder}/{name}": name for name in (*layout.train, layout.test, layout.meta)}
    contents = {wanted[name]: data for name, data in read_members(archive, wanted.__contains__).items()}

    def read(name: str) -> bytes:
        if name not in contents:
            raise UserError(f"The archive {archive} lacks {layout.folder}/{name}.")
        return contents[name]

    return _read_official(layout, read, archive)


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _read_official(layout: Layout, read: Callable[[str], bytes], place: Path) -> SmallPictures:
    try:
        names = tuple(name.decode() for name in load_restricted(read(layout.meta))[layout.names])
        parts = [_batch(layout, load_restricted(read(name)), len(names)) for name in layout.train]
        train = Arrays(np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts]))
        return SmallPictures(names, train, _batch(layout, load_restricted(read(layout.test)), len(names)))
    except (pickle.UnpicklingError, KeyError, ValueError, TypeError, AttributeError, EOFError, IndexError) as error:
        raise UserError(f"{place} is not the official CIFAR data: {type(error).__name__} {error}.") from error


def _batch(layout: Layout, stored: dict[str, Any], classes: int) -> Arrays:
    images, labels = stored["data"], np.asarray(stored[layout.labels], np.int64)
    if images.dtype != np.uint8 or images.shape != (len(labels), 3 * 32 * 32):
        raise ValueError(f"pictures of shape {images.shape} and type {images.dtype} for {len(labels)} labels")
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError("labels out of range")
    return Arrays(images.reshape(-1, 3, 32, 32), labels)


def load_restricted(data: bytes) -> dict[str, Any]:
    """A pickled dictionary of arrays, lists, numbers and strings; nothing else is admitted, nothing is executed.

    Raises:
        pickle.UnpicklingError: it asks for anything else.
    """
    stored = _Unpickler(BytesIO(data), encoding="bytes").load()
    if not isinstance(stored, dict):
        raise pickle.UnpicklingError("it holds no dictionary")
    return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in stored.items()}


class _Unpickler(pickle.Unpickler):
    """Knows what an array of numbers is made of, under its names in old and new NumPy."""

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
