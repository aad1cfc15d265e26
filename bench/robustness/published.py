"""Published corrupted sets as a source of pictures."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdnet.bench.robustness.pictures import Group, check_classes, seeded_order
from sdnet.models import SDNet
from sdnet.robustness.published import classes_of, corruptions_of, read_cifar_c, read_imagenet_c
from sdnet.train.errors import UserError

Source = Callable[[Group], tuple[Tensor, Tensor]]
"""Returns the pixels, uint8 or in [0, 1], and the labels of a noise at a severity."""

SAMPLE = 2**16
"""Bytes of the parts of a file that `picture_digest` reads."""


def published_source(
    folder: Path,
    noises: Sequence[str] | None,
    severities: Sequence[int] | None,
    pictures: int | None,
    device: torch.device,
    network: SDNet,
) -> tuple[Source, list[Group], str]:
    """Return a source of the pictures of a published set, its corruptions and severities, and a name for the set.

    Args:
        folder: a folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C.
        noises: names of corruptions; None for all that the folder holds.
        severities: severities; None for 1 to 5.
        pictures: how many pictures of each, a seeded choice; None for all.
        device: the device of the pictures.
        network: the network, which must have the same classes.

    Raises:
        UserError: there is no such folder, corruption or severity, there are fewer pictures, or other classes.
    """
    try:
        found = corruptions_of(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    names = list(dict.fromkeys(noises or found))
    if unknown := sorted(set(names) - set(found)):
        raise UserError(f"--noises has {unknown[0]}; {folder} holds {', '.join(found)}.")
    wanted = sorted(set(severities or range(1, 6)))
    if wanted[-1] > 5:
        raise UserError(f"--severities has {wanted[-1]}; published sets have 5.")
    for noise in names:  # all of them, before hours of work on the first
        check_set(folder, noise, wanted, pictures, network)

    def source(group: Group) -> tuple[Tensor, Tensor]:
        noise, severity = group
        try:
            if is_array(folder, noise):
                images, labels = read_cifar_c(folder, noise, severity)
                check_labels(folder, labels, network)
                chosen = choice(len(images), pictures)
                return images[chosen].to(device), labels[chosen].to(device)
            listed = read_imagenet_c(folder, noise, severity)
        except ValueError as error:
            raise UserError(str(error)) from error
        chosen = choice(len(listed.files), pictures)
        files = [listed.files[i] for i in chosen.tolist()]
        return decoded(files).to(device), listed.labels[chosen].to(device)

    groups = [(noise, severity) for noise in names for severity in wanted]
    return source, groups, f"{folder.resolve().name}, {pictures or 'all'} pictures"


def is_array(folder: Path, noise: str) -> bool:
    """Return whether a corruption is a file of CIFAR-10-C or CIFAR-100-C, and no folder of ImageNet-C."""
    return (folder / f"{noise}.npy").is_file()


def check_set(folder: Path, noise: str, severities: Sequence[int], pictures: int | None, network: SDNet) -> None:
    """Raise a UserError unless a corruption has these severities, enough pictures and the classes of the network."""
    try:
        if is_array(folder, noise):
            images, labels = read_cifar_c(folder, noise, severities[0])
            check_labels(folder, labels, network)
            choice(len(images), pictures)
            return
        for severity in severities:
            check_classes(folder / noise / str(severity), classes_of(folder, noise, severity), network)
    except ValueError as error:
        raise UserError(str(error)) from error


def check_labels(folder: Path, labels: Tensor, network: SDNet) -> None:
    """Raise a UserError if labels are no classes of the network, or so few of them that they are of another set."""
    most, classes = int(labels.max()), network.num_classes
    if most >= classes:
        raise UserError(f"{folder} has the label {most}; the network has classes 0 to {classes - 1}.")
    if most + 1 < classes and len(labels) >= 10 * classes:
        raise UserError(f"{folder} has the labels 0 to {most} alone; the network has classes 0 to {classes - 1}.")


def picture_digest(folder: Path, noise: str) -> str:
    """Return a fingerprint of a corruption: of its labels and of samples of its pixels, which take no time to read."""
    if is_array(folder, noise):
        parts = [sampled(folder / "labels.npy"), sampled(folder / f"{noise}.npy")]
    else:
        try:
            listed = read_imagenet_c(folder, noise, 1)
        except ValueError as error:
            raise UserError(str(error)) from error
        parts = ["\n".join(listed.classes).encode(), str(len(listed.files)).encode(), sampled(listed.files[0])]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def sampled(file: Path) -> bytes:
    """Return the size of a file and what is at its beginning, in its middle and at its end."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        parts = [f"{size}\n".encode()]
        for at in (0, size // 2, max(size - SAMPLE, 0)):
            stream.seek(at)
            parts.append(stream.read(SAMPLE))
    return b"".join(parts)


def choice(total: int, count: int | None) -> Tensor:
    """Return the positions of a seeded choice of pictures, the same for every corruption of a set."""
    if count is None:
        return torch.arange(total)
    if count > total:
        raise UserError(f"--pictures is {count}; there are {total}.")
    return seeded_order(total)[:count]


def decoded(files: Sequence[Path]) -> Tensor:
    """Return the pixels of picture files of one size, [N, 3, H, W] uint8.

    Raises:
        UserError: a file cannot be decoded, or is of another size than the first.
    """
    import numpy as np
    from PIL import Image

    pixels = np.empty(0, np.uint8)
    for index, file in enumerate(files):
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                array = np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} cannot be decoded: {error}.") from error
        if not index:
            pixels = np.empty((len(files), *array.shape), np.uint8)
        if array.shape != pixels.shape[1:]:
            raise UserError(f"{file} is {list(array.shape[:2])}; the first picture is {list(pixels.shape[1:3])}.")
        pixels[index] = array
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)
