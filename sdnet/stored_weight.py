"""Where a CSC layer stores its dictionary: as a parameter, sharded, parametrized or pruned.

Projecting the atoms means writing to what is stored. `refusal` says for which layers that is not possible.
"""

import copy
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sdnet.kernels import step_sizes
from sdnet.kernels.dictionaries import update_dictionaries
from sdnet.kernels.step_sizes import DictionaryState
from sdnet.layers import CSCConv2d

UNIT_TOLERANCE = 1e-2
"""The relative error of a norm that half precision makes of atoms of unit norm, with some reserve."""


def is_sharded(weight: Tensor | None) -> bool:
    """Return whether a parameter is a DTensor, whose class takes long to import."""
    return hasattr(weight, "full_tensor")


def is_plain(layer: CSCConv2d) -> bool:
    """Return whether the weight is an ordinary parameter."""
    weight = layer._parameters.get("weight")
    return weight is not None and not is_sharded(weight)


def is_pruned(layer: CSCConv2d) -> bool:
    """Return whether the weight is a parameter times a mask, as `torch.nn.utils.prune` makes it."""
    return "weight_orig" in layer._parameters and "weight_mask" in layer._buffers


def _pruned(layer: CSCConv2d) -> tuple[Tensor, Tensor]:
    """Return the parameter and the mask of a pruned weight."""
    original, mask = layer._parameters["weight_orig"], layer._buffers["weight_mask"]
    assert original is not None
    assert mask is not None
    return original, mask


def _parametrizations(layer: CSCConv2d) -> Any:
    """Return the list of parametrizations of a parametrized weight."""
    lists: Any = layer.parametrizations
    return lists["weight"]


def stored_parameters(layer: CSCConv2d) -> list[nn.Parameter]:
    """Return the parameters from which the weight is made."""
    if parametrize.is_parametrized(layer, "weight"):
        return list(_parametrizations(layer).parameters())
    names = [name for name in layer._parameters if name.startswith("weight")]
    return [parameter for name in names if (parameter := layer._parameters[name]) is not None]


def refusal(name: str, layer: CSCConv2d) -> str | None:
    """Return one sentence that says why the atoms of a layer cannot be projected, None if they can.

    Args:
        name: the layer's name in its model.
        layer: the layer.
    """
    place = f"{name}.weight" if name else "weight"
    if parametrize.is_parametrized(layer, "weight"):
        steps = _parametrizations(layer)
        if not all(hasattr(step, "right_inverse") for step in steps):
            return f"{place} has a parametrization without right_inverse, through which atoms cannot be projected."
        if not _holds_unit_atoms(layer):
            return (
                f"{place} has the parametrization {steps[0]}, which does not keep atoms of unit norm; remove it "
                "with torch.nn.utils.parametrize.remove_parametrizations."
            )
        return None
    if is_pruned(layer):
        return None
    weight = layer._parameters.get("weight")
    if weight is None:
        names = ", ".join(key for key in layer._parameters if key.startswith("weight"))
        return f"{place} is computed from {names}; use torch.nn.utils.parametrizations instead, or none."
    if weight.ndim != 4:
        return (
            f"{place} is flattened to shape {list(weight.shape)}, as by FullyShardedDataParallel; "
            "use torch.distributed.fsdp.fully_shard instead."
        )
    return None


_holding: WeakSet[nn.Module] = WeakSet()
"""The parametrizations that have been found to hold atoms of unit norm. The answer costs a wait for the device."""


@torch.no_grad()
def _holds_unit_atoms(layer: CSCConv2d) -> bool:
    """Return whether atoms of unit norm, stored through a parametrization with right inverse, come back as such.

    They do not for `orthogonal` and `spectral_norm`. This is tried on a copy, once for each parametrization.
    """
    steps = _parametrizations(layer)
    if steps in _holding or any(map(is_sharded, steps.parameters())):
        return True
    trial = copy.deepcopy(steps)
    wanted = trial().clone()
    if not wanted.is_meta and wanted.isfinite().all():
        step_sizes.project_atoms(wanted)
        try:
            trial.right_inverse(wanted)
        except (RuntimeError, ValueError):  # a NotImplementedError is a RuntimeError
            return False
        norms, expected = (torch.linalg.vector_norm(atoms, dim=(1, 2, 3)) for atoms in (trial(), wanted))
        if not torch.allclose(norms, expected, rtol=UNIT_TOLERANCE):
            return False
        _holding.add(steps)
    return True


@torch.no_grad()
def effective_weight(layer: CSCConv2d) -> Tensor:
    """Return the whole dictionary that a forward uses, [K, n_dict C, kh, kw]; a collective call if it is sharded."""
    if is_pruned(layer):
        original, mask = _pruned(layer)
        return original * mask
    weight: Any = layer.weight.detach()
    return weight.full_tensor() if is_sharded(weight) else weight


@torch.no_grad()
def store(layer: CSCConv2d, projected: Tensor) -> None:
    """Change what a layer that is not plain stores, so that its dictionary is `projected`.

    Args:
        layer: the layer.
        projected: its dictionary with atoms of unit norm.
    """
    if is_pruned(layer):
        original, mask = _pruned(layer)
        original.copy_(torch.where(mask != 0, projected, original))
        layer.weight = projected  # pyright: ignore[reportAttributeAccessIssue]
        return
    weight: Any = layer._parameters.get("weight")
    if is_sharded(weight):
        from torch.distributed.tensor import distribute_tensor

        weight.copy_(distribute_tensor(projected, weight.device_mesh, weight.placements, src_data_rank=None))
    else:
        layer.weight = projected  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def update_layers(layers: list[CSCConv2d], iterations: int) -> None:
    """Project the atoms of layers and re-estimate their step sizes, without a host sync.

    Args:
        layers: the layers; those whose weight is an ordinary parameter are updated together.
        iterations: the estimates of each layer.
    """
    states: list[DictionaryState] = []
    copies: list[tuple[CSCConv2d, Tensor]] = []
    for layer in layers:
        if is_plain(layer):
            states.append(layer.dictionary)
        else:
            copies.append((layer, effective_weight(layer).clone()))
            states.append(layer.dictionary._replace(weight=copies[-1][1]))
    update_dictionaries(states, iterations, [layer.impl for layer in layers])
    for layer, projected in copies:
        store(layer, projected)


@torch.no_grad()
def project_layer(layer: CSCConv2d) -> None:
    """Scale the atoms of a layer to unit norm where they are stored."""
    if is_plain(layer):
        step_sizes.project_atoms(layer.weight)
    else:
        projected = effective_weight(layer).clone()
        step_sizes.project_atoms(projected)
        store(layer, projected)
