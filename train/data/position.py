"""The position of a loader within an epoch, as bytes that fit only the loader they were taken from."""

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from sdnet.train.errors import UserError


def pack(facts: Mapping[str, object], step: int, rest: bytes = b"") -> Tensor:
    """Return bytes [K] uint8: the facts that the loader was made with, its step, and anything else that it needs."""
    line = json.dumps({"step": step, **facts}).encode() + b"\n"
    return torch.frombuffer(bytearray(line + rest), dtype=torch.uint8)


def unpack(state: Tensor, facts: Mapping[str, object]) -> tuple[int, bytes]:
    """Return the step and the rest of what `pack` was given.

    Raises:
        UserError: The loader was made with other facts; the message names them.
    """
    line, _, rest = bytes(state.tolist()).partition(b"\n")
    try:
        stored = json.loads(line)
        step = int(stored.pop("step"))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError("The loader's state cannot be read: it is of another version.") from error
    names = dict.fromkeys((*facts, *stored))
    differences = [
        f"{name}: {facts.get(name)}, not {stored.get(name)}" for name in names if facts.get(name) != stored.get(name)
    ]
    if differences:
        raise UserError(f"The loader cannot resume within the epoch; {'; '.join(differences)}.")
    return step, rest
