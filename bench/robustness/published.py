"""Published corrupted sets as a source of pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdnet.bench.robustness.pictures import Group, check_classes, seeded_order
from sdnet.robustness.corruptions import as_pixels
from sdnet.robustness.published import corruptions_of, read_cifar_c, read_imagenet_c
from sdnet.train.errors import UserError


def published_source(
    folder: Path,
    noises: Sequence[str] | None,
    severities: Sequence[int] | None,
    pictures: int | None,
    device: torch.device,
    classes: int,
) -> tuple[Callable[[Group], tuple[Tensor, Tensor]], list[Group], str]:
    """Return a source of the pictures of a published set, its corruptions and severities, and a name for the set.

    Args:
        folder: a folder of CIFAR-10-C, CIFAR-100-C or ImageNet-C.
        noises: names of corruptions; None for all that the folder holds.
        severities: severities; None for 1 to 5.
        pictures: how many pictures of each, a seeded choice; None for all.
        device: the device of the pictures.
        classes: the number of classes of the network.

    Raises:
        UserError: there is no such folder, corruption or severity, there are fewer pictures, or other classes.
    """
    try:
        found = corruptions_of(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    names = noises or found
    if unknown := sorted(set(names) - set(found)):
        raise UserError(f"--noises has {unknown[0]}; {folder} holds {', '.join(found)}.")
    if wrong := [n for n in severities or () if n > 5]:
        raise UserError(f"--severities has {wrong[0]}; published sets have 5.")
    groups = [(noise, severity) for noise in names for severity in severities or range(1, 6)]

    def source(group: Group) -> tuple[Tensor, Tensor]:
        noise, severity = group
        try:
            if (folder / f"{noise}.npy").is_file():
                images, labels = read_cifar_c(folder, noise, severity)
                if (most := int(labels.max())) >= classes:
                    raise UserError(f"{folder} has the label {most}; the network has classes 0 to {classes - 1}.")
                chosen = choice(len(images), pictures)
                return as_pixels(images[chosen]).to(device), labels[chosen].to(device)
            listed = read_imagenet_c(folder, noise, severity)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_classes(folder / noise / str(severity), len(listed.classes), classes)
        chosen = choice(len(listed.files), pictures)
        files = [listed.files[i] for i in chosen.tolist()]
        return as_pixels(decoded(files)).to(device), listed.labels[chosen].to(device)

    return source, groups, f"{folder.resolve().name}, {pictures or 'all'} pictures"


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

    arrays: list[np.ndarray] = []
    for file in files:
        try:
            with Image.open(file, formats=("JPEG", "PNG")) as image:
                arrays.append(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{file} cannot be decoded: {error}.") from error
        if arrays[-1].shape != arrays[0].shape:
            raise UserError(
                f"{file} is {list(arrays[-1].shape[:2])}; the first picture is {list(arrays[0].shape[:2])}."
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
