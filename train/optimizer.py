"""The optimiser of a recipe, with the parameters in groups by whether they decay."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdnet.step_size import csc_layers
from sdnet.stored_weight import stored_parameters
from sdnet.train.recipes import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Return the optimiser of a recipe over all parameters of a model that are trained.

    Parameters that do not decay are in a second group, with a weight decay of 0.
    """
    kept, decayed = [], []
    for parameter in (parameter for parameter in model.parameters() if parameter.requires_grad):
        (decayed if decays(recipe, parameter, dictionaries(model)) else kept).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}] if decayed else []
    groups += [{"params": kept, "weight_decay": 0.0}] if kept else []
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2))
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)


def dictionaries(model: nn.Module) -> set[int]:
    """Return the identities of the parameters that hold the atoms of the CSC layers."""
    return {id(parameter) for layer in csc_layers(model).values() for parameter in stored_parameters(layer)}


def decays(recipe: Recipe, parameter: Tensor, atoms: set[int]) -> bool:
    """Return whether weight decay applies to a parameter; norms and biases are the parameters of one dimension."""
    if id(parameter) in atoms:
        return recipe.decay_atoms
    return recipe.decay_norms or parameter.ndim > 1
