"""The mean and the deviation by which the loaders normalise the colours of images."""

from collections.abc import Mapping
from typing import Any, cast

from sdnet.train.data.loader import Program
from sdnet.train.errors import UserError

Channels = tuple[float, float, float]
Norms = tuple[Channels, Channels]

NORMS: dict[Program, Norms] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
"""Mean and deviation of red, green and blue in [0, 1], by the program that trains; its stem has the same name.

For CIFAR they are CIFAR-10's mean and the usual deviation: the mean of the deviations of the single images.
"""


def training_program(config: Mapping[str, Any], header: Mapping[str, str]) -> Program:
    """Return the program that trained a network: the one that the header of its weights file names, or its stem.

    Args:
        config: The arguments that the network was created with.
        header: The facts in the header of the weights file, empty if there is none.

    Raises:
        UserError: The header names no program of this package.
    """
    program = header.get("program") or str(config["stem"])
    if program not in NORMS:
        raise UserError(f"The header of the checkpoint names the program {program!r}; it must be {' or '.join(NORMS)}.")
    return cast(Program, program)
