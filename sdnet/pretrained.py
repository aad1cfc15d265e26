"""`create_model(..., pretrained=...)`: networks with the weights of a file, or of the small ones beside the cards."""

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from sdnet.kernels import checks
from sdnet.kernels.coding import CODING_FIELDS
from sdnet.models import WIDTH, SDNet
from sdnet.weights import load_model, read_weights

FOLDER = Path(__file__).resolve().parent / "bench" / "results" / "weights"
"""The small weights of a checkout; the wheel has none. docs/reproduction.md says how they were trained."""

CHANGEABLE = ("lam", "impl", "learn_lam", *CODING_FIELDS)
"""Arguments of `create_model` that may differ from those of the file, because no weight depends on them."""


def list_pretrained() -> list[str]:
    """Return the names that `create_model(..., pretrained=name)` takes.

    They are the small weights of a checkout; without a checkout there are none.
    """
    return sorted(file.parent.name for file in FOLDER.glob("*/model.safetensors"))


def load_pretrained(given: Mapping[str, Any]) -> SDNet:
    """Build the network of a weights file and load its weights.

    Args:
        given: the arguments that `create_model` was given, and not their defaults. `pretrained` is one of
            `list_pretrained()`, or a path as `sdnet.load_model` takes it.

    Raises:
        FileNotFoundError: there is no such file, and no such name.
        ValueError: the file is damaged, or holds another network.
    """
    pretrained = given["pretrained"]
    if not isinstance(pretrained, (str, PathLike)):
        raise ValueError(f"pretrained is {checks.shown(pretrained)}; it must be a path or a name.")
    place = FOLDER / pretrained if pretrained in list_pretrained() else Path(pretrained)
    if not pretrained or not os.path.exists(place):
        names = ", ".join(list_pretrained()) or "none, because they come with a checkout and not with the wheel"
        raise FileNotFoundError(f"pretrained is {str(pretrained)!r}: there is no such file, and the names are {names}.")
    config = read_weights(place).model
    if not config:
        raise ValueError(f"pretrained is '{place}', which does not say its network; use load_state_dict.")
    fixed = {"width": WIDTH, **given}
    for argument, value in fixed.items():
        if argument in (*CHANGEABLE, "pretrained") or (argument == "image_size" and value is None):
            continue
        stored = config.get(argument)
        if argument == "image_size":
            value, stored = checks.pair(argument, value, 1), tuple(stored or ())
        if value != stored:
            raise ValueError(f"{argument} is {value!r}; the network in '{place}' has {argument} {stored!r}.")
    return load_model(place, **{argument: given[argument] for argument in CHANGEABLE if argument in given})
