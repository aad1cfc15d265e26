"""The pictures that robustness is measured on: test pictures, and held-out training pictures to fit the rules."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from sdnet.models import SDNet
from sdnet.robustness.corruptions import NOISES, Noise, Scale, as_pixels, corrupt
from sdnet.train.data.cifar import read_small_pictures
from sdnet.train.data.cifar_files import Arrays
from sdnet.train.data.holdout import divide
from sdnet.train.data.normalisation import NORMS
from sdnet.train.errors import UserError

PIXEL_MEAN, PIXEL_STD = NORMS["cifar"]

SEED = 2026
"""Decides which pictures a part of a set holds, and the noise."""

Group = tuple[str, int]
"""A noise, or a corruption of a published set, and its severity; severity 0 is the clean picture."""

CLEAN: Group = ("gaussian", 0)


def name_of(group: Group) -> str:
    """Return the name of a group in results: "clean", "gaussian 3"."""
    return f"{group[0]} {group[1]}" if group[1] else "clean"


@dataclass(frozen=True)
class Pictures:
    """Pictures with their labels.

    Attributes:
        images: [N, 3, H, W] uint8, on the device.
        labels: [N] int64, on the device.
        seed: decides the noise; test and held-out pictures have different ones.
    """

    images: Tensor
    labels: Tensor
    seed: int

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self.images)

    def first(self, count: int) -> "Pictures":
        """Return the first `count` pictures."""
        return Pictures(self.images[:count], self.labels[:count], self.seed)

    def corrupted(self, group: Group, scale: Scale = "cifar10-c") -> Tensor:
        """Return the pixels in [0, 1] under a noise, as read back from uint8 files.

        The noise of a picture depends on the size of the set too: cut parts from the result, not from the set.
        """
        noise, severity = cast(Noise, group[0]), group[1]
        if not severity:
            return as_pixels(self.images)
        seed = self.seed + 100 * NOISES.index(noise) + severity
        return as_pixels(corrupt(self.images, noise, severity, scale=scale, generator=seed, as_uint8=True))


@dataclass(frozen=True)
class Sets:
    """Test pictures and held-out training pictures of one data set.

    Attributes:
        test: the pictures on which results are reported.
        held: training pictures that the network was not trained on, to fit the rules.
        classes: the names of the classes.
        digest: a fingerprint of both.
    """

    test: Pictures
    held: Pictures
    classes: tuple[str, ...]
    digest: str


def open_sets(data: Path, holdout: int, test: int, held: int, device: torch.device) -> Sets:
    """Read test and held-out pictures.

    Args:
        data: a folder of CIFAR or other small pictures, as train/cifar.py takes it.
        holdout: how many training pictures the run held out; the same ones are used.
        test: how many test pictures are used, a seeded choice of all; 0 for all.
        held: how many held-out pictures are used; 0 for all.
        device: the device of the pictures.

    Raises:
        UserError: there are no such data, or too few pictures, or the run held out none.
    """
    if not holdout:
        raise UserError("The run held out no training pictures to fit the rules on; train with --holdout 5000.")
    found = read_small_pictures(data)
    _, positions = divide(found.train.labels, holdout, f"The training set in {data}")
    arrays = (
        chosen(found.val, test, "The number of test pictures"),
        chosen(found.train.select(positions), held, "The number of held-out pictures"),
    )
    digest = hashlib.sha256("".join(part.digest() for part in arrays).encode()).hexdigest()
    return Sets(placed(arrays[0], SEED, device), placed(arrays[1], SEED + 10_000, device), found.classes, digest)


def test_pictures(data: Path, count: int, device: torch.device, network: SDNet) -> tuple[Pictures, str]:
    """Read test pictures.

    Args:
        data: a folder of CIFAR or other small pictures, as train/cifar.py takes it.
        count: how many are used, a seeded choice of all; 0 for all.
        device: the device of the pictures.
        network: the network, which must have the same classes.

    Returns:
        The pictures, and a fingerprint of them.

    Raises:
        UserError: there are no such data, too few pictures, or other classes.
    """
    found = read_small_pictures(data)
    check_classes(data, found.classes, network)
    arrays = chosen(found.val, count, "--pictures")
    return placed(arrays, SEED, device), arrays.digest()


def placed(arrays: Arrays, seed: int, device: torch.device) -> Pictures:
    """Return pictures on a device."""
    images, labels = (torch.from_numpy(values).to(device) for values in (arrays.images, arrays.labels))
    return Pictures(images, labels.long(), seed)


def check_classes(data: Path, found: Sequence[str], network: SDNet) -> None:
    """Raise a UserError unless the pictures in a folder have the classes of the network, as far as it names them."""
    if len(found) != network.num_classes:
        raise UserError(f"The pictures in {data} have {len(found)} classes; the network has {network.num_classes}.")
    for here, there in zip(found, network.class_names, strict=False):
        if here != there:
            raise UserError(f"{data} has a class {here} where the network has {there}.")


def chosen(arrays: Arrays, count: int, name: str) -> Arrays:
    """Return a seeded choice of `count` pictures, or all of them in a seeded order for 0.

    Raises:
        UserError: there are fewer; the message says `name` for the count.
    """
    total = len(arrays.labels)
    if count > total:
        raise UserError(f"{name} is {count}; there are {total} pictures.")
    return arrays.select(seeded_order(total)[: count or total].numpy())


def seeded_order(total: int) -> Tensor:
    """Return the order from which parts of a set of `total` pictures are taken."""
    return torch.randperm(total, generator=torch.Generator().manual_seed(SEED))
