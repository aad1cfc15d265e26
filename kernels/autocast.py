"""What `torch.autocast` does to the arguments of the operator, and where it is turned off."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
Result = TypeVar("Result")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of autocast on a device, None where it is off or does not exist (the meta device)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which autocast is off on a device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def under_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in autocast's dtype where it is on, as conv2d would have them."""
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, weight
    if x.dtype != torch.float64:
        x = x.to(dtype)
    return x, weight.to(x.dtype)


def outside_autocast(
    function: Callable[Concatenate[Tensor, P], Result],
) -> Callable[Concatenate[Tensor, P], Result]:
    """Turn autocast off, on the device of the weight, while a function of a weight runs.

    In half precision the eigenvalue would be off by about 0.5 %.
    """

    @wraps(function)
    def call(weight: Tensor, *args: P.args, **kwargs: P.kwargs) -> Result:
        with without_autocast(weight.device):
            return function(weight, *args, **kwargs)

    return call
