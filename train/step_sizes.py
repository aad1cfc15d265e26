"""Converged step sizes for evaluation and export, and the margins of the step sizes while training."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

import sdnet
from sdnet.kernels.step_sizes import SAFETY, estimate_eigenvalue
from sdnet.step_size import csc_layers

DIVERGENCE = 4 / 3
"""FISTA can diverge where step size times largest eigenvalue is above this bound."""


ESTIMATES = 3
"""Estimates of `measured_margins` in a row: enough for an error of about one percent while weights move."""


@torch.no_grad()
def measured_margins(model: nn.Module) -> dict[str, float]:
    """Return step size times largest eigenvalue by layer; one host sync, and nothing changes.

    Unlike `sdnet.step_margins` it does not converge the eigenvalue but takes a few estimates from the power vector.
    """
    layers = csc_layers(model)
    margins = [
        layer.step_size
        * estimate_eigenvalue(layer.weight.float(), layer.power_vector, layer.stride, layer.padding, ESTIMATES)[1]
        for layer in layers.values()
    ]
    return dict(zip(layers, torch.stack(margins).tolist(), strict=True)) if margins else {}


@torch.no_grad()
def converge_step_sizes(model: nn.Module) -> dict[str, float]:
    """Converge the step size of every CSC layer in place to the official 0.9 / eigenvalue.

    Returns:
        The step size before, times the largest eigenvalue, by layer.
    """
    layers = csc_layers(model)
    before = {name: layer.step_size.clone() for name, layer in layers.items()}
    sdnet.refresh_step_size(model)
    return {name: float(SAFETY * before[name] / layer.step_size) for name, layer in layers.items()}


@contextmanager
def converged_step_sizes(model: nn.Module) -> Iterator[None]:
    """Converge the step size of every CSC layer inside the block, and restore the state of the layers after it."""
    layers = csc_layers(model).values()
    before = [
        {name: value.clone() for name, value in layer.state_dict().items() if name != "weight"} for layer in layers
    ]
    converge_step_sizes(model)
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer.load_state_dict(state, strict=False)
