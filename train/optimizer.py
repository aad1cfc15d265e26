"""The optimizer of a recipe, with the parameters in groups by whether they decay."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sdnet.step_size import csc_layers
from sdnet.stored_weight import stored_parameters
from sdnet.train.recipes import Recipe


def make_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """Return the optimizer of a recipe over all parameters of a model that are trained.

    Parameters that do not decay are in a second group, with a weight decay of 0. A learned lambda never decays: it is
    softplus(raw_lam), and decay would draw it to softplus(0), about 0.69.
    """
    layers = csc_layers(model).values()
    atoms = {id(parameter) for layer in layers for parameter in stored_parameters(layer)}
    lambdas = {id(layer.raw_lam) for layer in layers}

    def decays(parameter: Tensor) -> bool:
        if id(parameter) in atoms:
            return recipe.decay_atoms
        norm_or_bias = parameter.ndim <= 1
        return id(parameter) not in lambdas and (recipe.decay_norms or not norm_or_bias)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if decays(parameter)]
    kept = [parameter for parameter in trained if not decays(parameter)]
    groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": recipe.weight_decay}] if decayed else []
    groups += [{"params": kept, "weight_decay": 0.0}] if kept else []
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, recipe.beta2))
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.nesterov)
