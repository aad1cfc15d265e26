"""Keeping atoms on the unit sphere and step sizes true while a network learns."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdnet.kernels import checks, step_sizes
from sdnet.kernels.reference import Pair
from sdnet.layers import CSCConv2d


def csc_layers(model: nn.Module) -> dict[str, CSCConv2d]:
    """Return the CSC layers of a model by name, in the order of definition (of the data for `create_model`).

    Raises:
        ValueError: `model` is no `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {checks.shown(model)}; it must be an nn.Module.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CSCConv2d)}
    # torch.compile adds a part to the names, which are otherwise those of the model.
    return {".".join(part for part in name.split(".") if part != "_orig_mod"): layer for name, layer in layers.items()}


def attach(model: nn.Module, optimizer: Optimizer, iterations: int = 1) -> RemovableHandle:
    """After every step of `optimizer` the atoms of `model` are projected and the step sizes follow, without a sync.

    Each step that really happened (not one that a gradient scaler skipped) is followed by the projection of every atom
    onto the unit sphere and `iterations` warm power iterations per CSC layer, on the device. One iteration tracks
    weights that move slowly; while a large learning rate throws them about, `step_margins` can exceed 1 for some steps.

    Call it once for a model and its optimiser; under torch.distributed in every process, for the vectors of rank 0 are
    sent to all, once. `.remove()` on what it returns ends it.
    """
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; it must be at least 1.")
    layers = list(csc_layers(model).values())
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for layer in layers:
            torch.distributed.broadcast(layer.power_vector, src=0)

    def update_dictionaries(*_: Any) -> None:
        step_sizes.update_dictionaries([layer.dictionary for layer in layers], iterations)

    return optimizer.register_step_post_hook(update_dictionaries)


@torch.no_grad()
def refresh_step_size(model: nn.Module, image_size: int | Pair | None = None) -> None:
    """Converges the power iteration of every CSC layer and sets step = 0.9 / (largest eigenvalue of A'A).

    With `image_size` the grids on which the steps are estimated follow images [1, C, H, W] of that height and width
    through the model, one forward in evaluation mode.
    """
    layers = csc_layers(model)
    if image_size is not None:
        for name, size in input_sizes(model, image_size).items():
            layers[name].reset_power_vector(size)
    for layer in layers.values():
        layer.step_size.copy_(step_sizes.step_size_of(layer.converge_power_vector()))


@torch.no_grad()
def converge_power_vectors(model: nn.Module) -> None:
    """Brings the vector of every CSC layer to where warm iterations can start; leaves the step sizes."""
    for layer in csc_layers(model).values():
        layer.converge_power_vector(tolerance=1e-3)


@torch.no_grad()
def step_margins(model: nn.Module, image_size: int | Pair | None = None) -> dict[str, float]:
    """step times the largest eigenvalue of A'A by layer, on the grid of `image_size`; changes nothing.

    0.9 is what a refresh gives. Above 1 a step may overshoot, from 2 on the steps diverge.
    """
    sizes = {} if image_size is None else input_sizes(model, image_size)
    margins = {}
    for name, layer in csc_layers(model).items():
        power_vector, grid = layer.power_vector, tuple(layer.power_vector.shape[2:])
        if sizes.get(name, grid) != grid:
            power_vector = step_sizes.initial_power_vector((1, power_vector.shape[1], *sizes[name])).to(
                power_vector.device
            )
        _, eigenvalue = step_sizes.largest_eigenvalue(layer.weight, power_vector, layer.stride, layer.padding)
        margins[name] = float(layer.step_size * eigenvalue)
    return margins


@torch.no_grad()
def input_sizes(model: nn.Module, image_size: int | Pair) -> dict[str, Pair]:
    """The grid that each CSC layer sees when images of `image_size` go through the model, by one forward of zeros.

    The images have as many channels as the first CSC layer takes.
    """
    layers = csc_layers(model)
    if not layers:
        return {}
    sizes: dict[str, Pair] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            sizes[name] = (inputs[0].shape[2], inputs[0].shape[3])

        return hook

    first = next(iter(layers.values()))
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        model(first.weight.new_zeros(1, first.in_channels, height, width))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return sizes
