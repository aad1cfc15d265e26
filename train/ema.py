"""The exponential moving average of the weights of a model."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import sdnet
from sdnet.step_size import csc_layers


class Ema:
    """The exponential moving average of the weights, and of the statistics of batch norm.

    After optimizer step t = 0, 1, ... the average is

        average <- d average + (1 - d) weights,    d = min(decay, (1 + t) / (10 + t))

    so that an early average forgets the random initial weights. Step sizes and power vectors are not averaged: they
    follow from the averaged dictionaries. An average of unit vectors is shorter than one, so the atoms are projected
    for evaluation and export (`projected`); the average itself stays as it is.

    Args:
        model: The model, with its initial weights.
        decay: The decay, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.model = deepcopy(model).requires_grad_(False).eval()
        self._averages, self._sources = _averaged(self.model), _averaged(model)
        self._copies, self._originals = _counters(self.model), _counters(model)

    def restart(self, model: nn.Module) -> None:
        """Begin again with the present weights of a model."""
        self.model.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the present weights; no host sync.

        Args:
            step: The number of the optimizer step that was just taken, counted from 0.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, self._sources, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for copy, original in zip(self._copies, self._originals, strict=True):
            copy.copy_(original)

    @contextmanager
    def projected(self) -> Iterator[nn.Module]:
        """Yield the averaged model with atoms of unit norm and converged step sizes; afterwards it is as before."""
        layers = csc_layers(self.model).values()
        raw = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
        if raw:
            sdnet.project(self.model)
        try:
            yield self.model
        finally:
            for layer, state in zip(layers, raw, strict=True):
                layer.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return the average."""
        return self.model.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Set the average."""
        self.model.load_state_dict(state_dict)


def _averaged(model: nn.Module) -> list[Tensor]:
    """Return the tensors that are averaged: the parameters and the statistics of batch norm."""
    own = {id(buffer) for layer in csc_layers(model).values() for buffer in layer.buffers()}
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point() and id(buffer) not in own]
    return [parameter.detach() for parameter in model.parameters()] + buffers


def _counters(model: nn.Module) -> list[Tensor]:
    """Return the integer buffers, such as the number of batches that batch norm has seen."""
    return [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
