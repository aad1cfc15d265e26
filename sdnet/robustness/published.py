"""Readers of published corrupted sets: CIFAR-10-C and CIFAR-100-C (`.npy` files), and ImageNet-C (folders).

CIFAR-10-C holds one file per corruption, uint8 [50000, 32, 32, 3]: the 10 000 test images at severity 1, then at
severity 2, and so on, and `labels.npy`. The header of a file is read as a literal, so no pickle is ever executed.
ImageNet-C holds <corruption>/<severity>/<class>/*.JPEG.
"""

import ast
import math
import struct
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sdnet.kernels import checks

SEVERITIES = 5
LONGEST_HEADER = 10_000
DTYPES = {
    "|u1": torch.uint8,
    "|i1": torch.int8,
    "<i2": torch.int16,
    "<i4": torch.int32,
    "<i8": torch.int64,
}
"""The types of elements that are read."""

PICTURE_ENDINGS = (".jpeg", ".jpg", ".png")


class PublishedFolder(NamedTuple):
    """The images of one corruption and severity of ImageNet-C.

    Attributes:
        files: the files, in the order of their classes and names.
        labels: the class of every file, [N] int64, an index into `classes`.
        classes: the names of the class folders, sorted.
    """

    files: tuple[Path, ...]
    labels: Tensor
    classes: tuple[str, ...]


def read_cifar_c(folder: str | Path, corruption: str, severity: int) -> tuple[Tensor, Tensor]:
    """Read one corruption and severity of CIFAR-10-C or CIFAR-100-C.

    Args:
        folder: the folder of the `.npy` files.
        corruption: the name of a file without its ending, such as "gaussian_noise".
        severity: 1 to 5.

    Returns:
        The images, [N, 3, H, W] uint8, and their labels, [N] int64; N is 10 000 in the published sets.

    Raises:
        ValueError: there is no such file, or it is not what it should be; the message names the file.
    """
    folder = _path("folder", folder)
    severity = _severity(severity)
    images = read_npy(_file(folder, corruption))
    file = folder / f"{corruption}.npy"
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) % SEVERITIES:
        raise ValueError(
            f"{file} holds {images.dtype} {list(images.shape)}; it must hold uint8 [{SEVERITIES} N, H, W, 3]."
        )
    labels = read_npy(_file(folder, "labels"))
    if labels.ndim != 1 or len(labels) != len(images):
        raise ValueError(f"{folder / 'labels.npy'} holds {list(labels.shape)}; it must hold [{len(images)}] labels.")
    if int(labels.min()) < 0:
        raise ValueError(f"{folder / 'labels.npy'} holds the label {int(labels.min())}; labels must be at least 0.")
    count = len(images) // SEVERITIES
    part = slice((severity - 1) * count, severity * count)
    return images[part].permute(0, 3, 1, 2).contiguous(), labels[part].long()


def corruptions_of(folder: str | Path) -> list[str]:
    """Return the corruptions that a folder of CIFAR-10-C, or of ImageNet-C, holds, sorted.

    Args:
        folder: the folder.

    Raises:
        ValueError: there is no such folder, or it holds none.
    """
    folder = _path("folder", folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    arrays = {file.stem for file in _visible(folder) if file.suffix == ".npy" and file.stem != "labels"}
    folders = {sub.name for sub in _visible(folder) if (sub / "1").is_dir()}
    if not arrays | folders:
        raise ValueError(f"{folder} holds neither <corruption>.npy nor <corruption>/1/<class>/ files.")
    return sorted(arrays | folders)


def read_imagenet_c(folder: str | Path, corruption: str, severity: int) -> PublishedFolder:
    """List one corruption and severity of ImageNet-C.

    Args:
        folder: the folder that holds <corruption>/<severity>/<class>/*.JPEG.
        corruption: the name of a folder, such as "gaussian_noise".
        severity: 1 to 5.

    Returns:
        The files and their labels. The labels count the class folders in sorted order, as ImageNet's do.

    Raises:
        ValueError: there is no such folder, or it holds no classes or a class without pictures.
    """
    classes = classes_of(folder, corruption, severity)
    place = Path(folder) / corruption / str(severity)
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(file for file in _visible(place / name) if file.suffix.lower() in PICTURE_ENDINGS)
        if not found:
            raise ValueError(f"{place / name} holds no {', '.join(PICTURE_ENDINGS)} files.")
        files += found
        labels += [label] * len(found)
    return PublishedFolder(tuple(files), torch.tensor(labels), classes)


def classes_of(folder: str | Path, corruption: str, severity: int) -> tuple[str, ...]:
    """Return the names of the class folders of one corruption and severity of ImageNet-C, sorted.

    Args:
        folder: see `read_imagenet_c`, as the others.
        corruption: the name of a folder.
        severity: 1 to 5.

    Raises:
        ValueError: there is no such folder, or it holds no classes.
    """
    place = _path("folder", folder) / _name(corruption) / str(_severity(severity))
    if not place.is_dir():
        raise ValueError(f"There is no folder {place}.")
    classes = tuple(sorted(sub.name for sub in _visible(place) if sub.is_dir()))
    if not classes:
        raise ValueError(f"{place} holds no folders of classes.")
    return classes


def read_npy(file: str | Path) -> Tensor:
    """Read an array of integers from a `.npy` file; the file is mapped into memory, not copied.

    Raises:
        ValueError: the file is no `.npy` file of little-endian integers in C order, or is cut off.
    """
    file = _path("file", file)
    try:
        with file.open("rb") as stream:
            magic = stream.read(8)
            if len(magic) < 8 or magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
                raise _NoArrayError
            form = "<H" if magic[6] == 1 else "<I"
            (length,) = struct.unpack(form, stream.read(struct.calcsize(form)))
            if length > LONGEST_HEADER:
                raise ValueError("a header of that length")
            header = ast.literal_eval(stream.read(length).decode("latin1").strip())
            offset, size = stream.tell(), file.stat().st_size
        code, order, shape = header["descr"], header["fortran_order"], tuple(header["shape"])
    except _NoArrayError as error:
        raise ValueError(f"{file} is no .npy file.") from error
    except (OSError, struct.error, SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "its header cannot be read"
        raise ValueError(f"{file} cannot be used: {reason}.") from error
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{file} holds elements of type {code!r}; it must hold integers of {', '.join(DTYPES)}.")
    if order is not False:
        raise ValueError(f"{file} holds an array in Fortran order; it must be in C order, see numpy.ascontiguousarray.")
    if not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"{file} has shape {list(shape)}; it must hold elements.")
    dtype, count = DTYPES[code], math.prod(shape)
    if size != offset + count * dtype.itemsize:
        raise ValueError(
            f"{file} has {size} bytes; its header asks for {offset + count * dtype.itemsize}, so it is damaged."
        )
    stored = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=size)
    data = torch.empty(0, dtype=torch.uint8).set_(stored)[offset:]  # pyright: ignore[reportArgumentType]
    return (data if dtype == torch.uint8 else data.clone().view(dtype)).view(shape)


class _NoArrayError(Exception):
    """A file does not begin as a `.npy` file does."""


def _path(name: str, path: str | Path) -> Path:
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"{name} is {checks.shown(path)}; it must be a path.")
    return Path(path)


def _severity(severity: int) -> int:
    if checks.integer("severity", severity, 1) > SEVERITIES:
        raise ValueError(f"severity is {severity}; it must be at most {SEVERITIES}.")
    return severity


def _name(corruption: str) -> str:
    """Return the name of a corruption, which must be that of one file or folder."""
    if not isinstance(corruption, str) or not corruption or corruption in (".", "..") or "/" in corruption:
        raise ValueError(f"corruption is {checks.shown(corruption)}; it must be the name of a file or folder.")
    return corruption


def _visible(folder: Path) -> list[Path]:
    """Return what is in a folder, without what file systems and archives hide there, such as `._fog.npy`."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".") and entry.name != "__MACOSX"]


def _file(folder: Path, corruption: str) -> Path:
    file = folder / f"{_name(corruption)}.npy"
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    return file
