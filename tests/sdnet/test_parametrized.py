"""Parametrized dictionaries that cannot hold atoms of unit norm: refused, and left as they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

import sdnet

from .small_network import bits, csc_layers, network


class Twice(nn.Module):
    """Doubles the weight, with an inverse that does not halve it."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


PARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "_Orthogonal": parametrizations.orthogonal,
    "_Orthogonal, no trivialization": lambda layer: parametrizations.orthogonal(layer, use_trivialization=False),
    "_SpectralNorm": parametrizations.spectral_norm,
    "Twice": lambda layer: register_parametrization(layer, "weight", Twice()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
@pytest.mark.parametrize("attached_first", [True, False])
def test_parametrizations_that_do_not_keep_unit_norms_are_refused(kind: str, attached_first: bool) -> None:
    model = network().eval()  # in training spectral_norm changes its state whenever the weight is read
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if attached_first:
        sdnet.attach(model, optimizer)
    PARAMETRIZED[kind](csc_layers(model)[1])
    before = bits(model)
    name = kind.partition(",")[0]
    sentence = rf"1\.weight has the parametrization {name}\(\), which does not keep atoms of unit norm"
    call = optimizer.step if attached_first else lambda: sdnet.attach(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=sentence):
        call()
    with pytest.raises(ValueError, match=sentence):
        sdnet.project(model)
    assert bits(model) == before
