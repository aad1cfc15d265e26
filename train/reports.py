"""What a run tells about itself: the summary at its start, and the scalars of a report."""

from collections import Counter
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import sdnet
from sdnet.examples import evaluation_mode
from sdnet.kernels import explain
from sdnet.step_size import csc_layers
from sdnet.train.data.loader import Data
from sdnet.train.environment import device_name
from sdnet.train.recipes import Recipe

LOOKED_AT = 16
"""Images of the last batch whose codes a report describes."""


def summary(recipe: Recipe, model: nn.Module, data: Data, accelerator: Accelerator, steps_per_epoch: int) -> list[str]:
    """Return lines that say what is about to run."""
    return [*_data_lines(recipe, data, steps_per_epoch), *_model_lines(recipe, model, accelerator)]


def _data_lines(recipe: Recipe, data: Data, steps_per_epoch: int) -> Iterator[str]:
    counts = f"{steps_per_epoch} steps of {recipe.batch} an epoch"
    if data.train_size:
        dropped = data.train_size - steps_per_epoch * recipe.batch
        counts = f"{data.train_size} training images in {len(data.classes)} classes  {counts}"
        counts += f", {dropped} image{'s' * (dropped > 1)} left out of each" if dropped else ""
    held = f"  {data.holdout_size} held-out images" if data.holdout else ""
    yield f"{counts}  {data.val_size} validation images{held}"


def _model_lines(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> Iterator[str]:
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    layers = csc_layers(model)
    name = f"{recipe.model}  width {recipe.width}  {parameters:.2f} million parameters"
    learned = "" if recipe.learn_lam == "no" else f", learned per {recipe.learn_lam}"
    yield (
        f"{name}  {len(layers)} CSC layer{'s' * (len(layers) > 1)}, lambda {recipe.lam:g}{learned}" if layers else name
    )
    device, precision = accelerator.device, {"no": "fp32"}.get(recipe.mixed_precision, recipe.mixed_precision)
    if precision == "fp32" and device.type == "cuda":
        precision = "fp32 in TF32" if recipe.tf32 else "fp32 without TF32"
    words = [device_name(device), f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"]
    words += [precision, "channels_last" if recipe.channels_last else "contiguous"]
    words += [f"compiled, mode {recipe.compile_mode}"] if recipe.compile else []
    yield "  ".join(words)
    for reason, count in Counter(_kernels(recipe, model, accelerator)).items():
        yield f"kernels of {count} CSC layer{'s' * (count > 1)}: {reason}"


@torch.no_grad()
def _kernels(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> Iterator[str]:
    """Yield which implementation each CSC layer takes for one image, and why."""
    for layer in csc_layers(model).values():
        x = layer.weight.new_zeros(1, layer.in_channels, *layer.power_vector.shape[2:])
        options = {"stride": layer.stride, "padding": layer.padding, "impl": recipe.impl, **vars(recipe.coding)}
        with accelerator.autocast():
            yield explain(x, layer.weight, layer.step_size, layer.lam, **options)


@torch.no_grad()
def layer_scalars(model: nn.Module, images: Tensor, gradient_norm: Tensor) -> dict[str, float]:
    """Return the norm of the gradient, and the state of every CSC layer: one host sync.

    These are the sparsity, the relative residual and, where lambda is learned, its mean over the atoms.

    The layers see a few of the images in evaluation mode, outside of any compiled graph, so nothing of the training
    changes.

    Args:
        model: The bare model.
        images: The images of the last batch.
        gradient_norm: The norm of the last gradient, 0-d.
    """
    scalars = {"gradient_norm": gradient_norm}
    if csc_layers(model):
        with evaluation_mode(model), sdnet.record(model) as recording:
            model.forward(images[:LOOKED_AT])
            for name, layer in recording.diagnose().items():
                scalars[f"sparsity/{name}"] = layer.sparsity.mean()
                scalars[f"relative_residual/{name}"] = layer.relative_residual.mean()
        for name, layer in csc_layers(model).items():
            if layer.learn_lam != "no":
                scalars[f"lambda/{name}"] = layer.lam.mean()
    values = torch.stack([value.float() for value in scalars.values()]).tolist()
    return dict(zip(scalars, values, strict=True))
