"""Robust inference: lambda as the knob that trades detail for noise."""

from typing import Literal, get_args

from torch import Tensor, nn

from sdnet.step_size import csc_layers

Layers = Literal["all", "first"]


def set_lambda(model: nn.Module, lam: float | Tensor, layers: Layers = "all") -> None:
    """Sets lambda of all CSC layers, or of the first (the stem), in force from the next forward on.

    Args:
        model: a network with CSC layers.
        lam: a float, or a tensor with one lambda per sample of the next batch, [N] or [N, 1, 1, 1]; at least 0.
        layers: "all" or "first".
    """
    if layers not in get_args(Layers):
        raise ValueError(f"layers is {layers!r}; it must be one of {', '.join(get_args(Layers))}.")
    found = list(csc_layers(model).values())
    if not found:
        raise ValueError("model has no CSC layers, so there is no lambda to set.")
    for layer in found if layers == "all" else found[:1]:
        layer.lam = lam
