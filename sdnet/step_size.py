"""Step sizes computed to convergence, and their margins: step size times largest eigenvalue.

`sdnet.attach` keeps them up to date during training.
"""

from numbers import Integral

import torch
from torch import Tensor, nn

from sdnet.examples import Example, checked_example, run_example
from sdnet.kernels import checks, step_sizes
from sdnet.kernels.reference import Pair
from sdnet.layers import CSCConv2d
from sdnet.recorder import Recorder, recorded
from sdnet.stored_weight import effective_weight, project_layer, refusal


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


@torch.no_grad()
def refresh_step_size(
    model: nn.Module, example: Example | int | None = None, *, image_size: int | Pair | None = None
) -> None:
    """Set every step size of a model to 0.9 / (largest eigenvalue of A'A), computed to convergence.

    With `example` or `image_size`, one forward pass in evaluation mode gives the input sizes of the layers, and the
    step sizes are computed for these; without them, for the present sizes. Under torch.distributed call it in every
    process.

    Args:
        model: a network with CSC layers.
        example: a batch that the model takes, a tuple of its positional or a dict of its keyword arguments. An int or
            a pair of ints means `image_size`.
        image_size: height and width of the images, an int or a pair. The model must take one tensor
            [1, C, height, width], with as many channels as its first convolution or CSC layer has.

    Raises:
        ValueError: an argument has a wrong type or value, the model does not take such images, or a dictionary is not
            finite; the model is then unchanged.

    Example:
        >>> sdnet.refresh_step_size(model)  # before an evaluation
        >>> sdnet.refresh_step_size(model, image_size=256)  # for larger images than before
    """
    layers = csc_layers(model)
    require_finite(layers)
    for name, size in input_sizes(model, example, image_size).items():
        if size != tuple(layers[name].power_vector.shape[2:]):
            layers[name].reset_power_vector(size)
    for layer in layers.values():
        layer.step_size.copy_(step_sizes.step_size_of(converge(layer)))


@torch.no_grad()
def project(model: nn.Module) -> None:
    """Scale all atoms of a model to unit norm and compute its step sizes to convergence.

    Call it after anything but an attached optimizer has changed the weights: after averaging them (exponential moving
    averages, stochastic weight averaging), editing, or initialising them. All layers are projected, frozen ones too.

    Args:
        model: a network with CSC layers.

    Raises:
        ValueError: a dictionary is not finite, or stored where it cannot be projected; the model is then unchanged.

    Example:
        >>> averaged = torch.optim.swa_utils.AveragedModel(model)
        >>> averaged.update_parameters(model)
        >>> sdnet.project(averaged)
    """
    layers = csc_layers(model)
    require_finite(layers)
    for name, layer in layers.items():
        if reason := refusal(name, layer):
            raise ValueError(reason)
    for layer in layers.values():
        project_layer(layer)
    refresh_step_size(model)


@torch.no_grad()
def converge_power_vectors(model: nn.Module) -> None:
    """Converge the power vector of every CSC layer, as a start for later estimates; the step sizes stay as they are.

    Args:
        model: a network with CSC layers.

    Raises:
        ValueError: a dictionary is not finite; the model is then unchanged.
    """
    layers = csc_layers(model)
    require_finite(layers)
    for layer in layers.values():
        converge(layer, tolerance=1e-3)


@torch.no_grad()
def step_margins(
    model: nn.Module, example: Example | int | None = None, *, image_size: int | Pair | None = None
) -> dict[str, float]:
    """Return step size times largest eigenvalue of A'A of every CSC layer, and change nothing.

    0.9 is the target, which `refresh_step_size` gives. Above 1 a step may overshoot. FISTA diverges from 4/3 on, ISTA
    from 2 on.

    Args:
        model: a network with CSC layers.
        example: see `refresh_step_size`; the eigenvalues are then those of the input sizes that it leads to.
        image_size: see `refresh_step_size`.

    Returns:
        The products by the name of the layer.

    Raises:
        ValueError: as for `refresh_step_size`.

    Example:
        >>> max(sdnet.step_margins(model).values())  # above 4/3 FISTA diverges
    """
    layers = csc_layers(model)
    require_finite(layers)
    sizes = input_sizes(model, example, image_size)
    margins = {}
    for name, layer in layers.items():
        power_vector = layer.power_vector
        size = sizes.get(name, tuple(power_vector.shape[2:]))
        if size != tuple(power_vector.shape[2:]):
            initial = step_sizes.initial_power_vector((1, power_vector.shape[1], *size))
            power_vector = initial.to(power_vector.device)
        weight = effective_weight(layer)
        _, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector, layer.stride, layer.padding)
        margins[name] = float(layer.step_size * eigenvalue)
    return margins


def converge(layer: CSCConv2d, tolerance: float = 1e-5) -> Tensor:
    """Converge the power vector of a layer, wherever its weight is stored, and return the eigenvalue, 0-d."""
    weight = effective_weight(layer)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(
        weight, layer.power_vector, layer.stride, layer.padding, tolerance
    )
    layer.power_vector.copy_(power_vector)
    return eigenvalue


def require_finite(layers: dict[str, CSCConv2d]) -> None:
    """Check the dictionaries of layers.

    Raises:
        ValueError: one has no values, or holds NaN, infinite or very large ones; the message names the first layer.
    """
    for name, layer in layers.items():
        place, weight = f"{name}.weight" if name else "weight", effective_weight(layer)
        if weight.is_meta:
            raise ValueError(f"{place} is on the meta device and has no values; give it memory and load it first.")
        if not weight.isfinite().all():
            raise ValueError(f"{place} holds NaN or infinite values; load or initialise finite weights first.")
        if (largest := float(weight.abs().max())) > step_sizes.LARGEST_WEIGHT:
            raise ValueError(
                f"{place} holds values of up to {largest:.6g}; they must be at most {step_sizes.LARGEST_WEIGHT:.6g}."
            )


class SizeRecorder(Recorder):
    """Keeps the input size of a layer: the largest height and the largest width of its calls.

    The largest eigenvalue grows with both, so the step size is safe for all calls.
    """

    size: Pair | None = None

    def keep(self, x: Tensor, codes: Tensor, lam: float | Tensor) -> None:
        """Keep the size of x."""
        del codes, lam
        height, width = self.size or (0, 0)
        self.size = (max(height, x.shape[2]), max(width, x.shape[3]))


def input_sizes(
    model: nn.Module, example: Example | int | None = None, image_size: int | Pair | None = None
) -> dict[str, Pair]:
    """Return the input size of each CSC layer in one forward in evaluation mode; nothing without an argument.

    Layers that the forward does not reach are left out.

    Args:
        model: a network.
        example: see `refresh_step_size`.
        image_size: see `refresh_step_size`.

    Raises:
        ValueError: both arguments are given, one has a wrong type or value, or the model does not take zeros of
            `image_size`.
    """
    if example is not None and image_size is not None:
        raise ValueError("example and image_size are both given; give one of them.")
    if isinstance(example, Integral) or (
        isinstance(example, (tuple, list)) and all(isinstance(n, Integral) for n in example)
    ):
        example, image_size = None, example  # pyright: ignore[reportAssignmentType]
    layers = csc_layers(model)
    if (example is None and image_size is None) or not layers:
        return {}
    if example is None:
        size = checks.pair("image_size", image_size, 1)
        first = next(module for module in model.modules() if isinstance(module, (CSCConv2d, nn.Conv2d)))
        example = next(first.parameters()).new_zeros(1, first.in_channels, *size)
    example = checked_example("example", example)
    recorders = {name: SizeRecorder() for name in layers}
    try:
        with recorded({layer: recorders[name] for name, layer in layers.items()}):
            run_example(model, example)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if image_size is None:
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"The model does not take one tensor of the shape that image_size {image_size} asks for: give an example "
            f"batch instead ({reason})."
        ) from error
    return {name: recorder.size for name, recorder in recorders.items() if recorder.size is not None}
