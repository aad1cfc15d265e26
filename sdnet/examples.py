"""What a model is called with to see how it works: an example, run in evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from sdnet.kernels import checks

Example = Tensor | tuple[Any, ...] | dict[str, Any]
"""A batch that a model takes, a tuple of its positional or a dict of its keyword arguments."""


def checked_example(name: str, example: Any) -> Example:
    """Return an example.

    Raises:
        ValueError: it is none, or a tuple of integers alone, which is a size; the message names the argument.
    """
    is_size = isinstance(example, tuple) and all(isinstance(n, Integral) for n in example)
    if not isinstance(example, (Tensor, tuple, dict)) or is_size:
        raise ValueError(f"{name} is {checks.shown(example)}; it must be a tensor, a tuple or a dict of arguments.")
    return example


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode inside the block; after it every module is in its former mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def run_example(model: nn.Module, example: Example) -> None:
    """Call a model with an example, in evaluation mode and without gradients."""
    positional = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    with evaluation_mode(model):
        model(*positional, **(example if isinstance(example, dict) else {}))
