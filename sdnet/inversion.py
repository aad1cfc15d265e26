"""`invert`: the picture that the codes of a layer stand for, rebuilt layer by layer down to the input.

A CSC layer reconstructs its input from its codes z as A z. Below it stands, in a network without shortcuts, a batch
normalisation y = gamma (z' - mean) / sqrt(var + eps) + beta of the codes z' of the layer before, which can be undone:

    z' = (y - beta) sqrt(var + eps) / gamma + mean,      x' = B z',

where B is the dictionary of that layer. Repeated down to the first layer this gives an image. The modules between the
image and the layer are recorded in one forward pass in evaluation mode:

| module                 | undone by                                                                                  |
|------------------------|--------------------------------------------------------------------------------------------|
| `CSCConv2d`            | A z for the size of its input, whatever its stride; codes below zero are first set to zero |
|                        | if the layer is nonnegative; with `n_dict` reconstructions, their mean                     |
| `BatchNorm2d`          | the formula above, with its eps; a channel with gamma = 0 gets the running mean            |
| `MaxPool2d`, `AvgPool2d` | bilinear interpolation to the size of its input                                          |
| a module that changes nothing (`Identity`, `Dropout` in evaluation mode, `ReLU` after codes) | nothing to undo      |

With `restore_contrast=True` the estimate y of the output of a batch normalisation is first multiplied by

    sqrt(mean over channels of (gamma^2 + beta^2) / mean over channels and pixels of y^2),

one number for each sample, so that it has the mean square that the batch normalisation gives. A z of a few steps is too
small, by a factor that multiplies from layer to layer; this undoes it without looking at the image.

A sum with a shortcut, and every other module or function, cannot be undone: later layers are refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from sdnet.examples import run_example
from sdnet.kernels import checks
from sdnet.layers import CSCConv2d
from sdnet.linear import CSCLinear
from sdnet.state import persistent_state
from sdnet.step_size import csc_layers

Kind = Literal["exact", "approximate", "refused"]

EXACT = 1e-4
"""The largest relative error of a picture that is called exact: rounding in fp32 over many layers stays below it."""

NORM_FLOOR = 1e-12
"""The least norm that an error is divided by."""


@dataclass(frozen=True)
class Inversion:
    """The image rebuilt from the codes of one CSC layer, with its errors. Unpacks as `picture, error`.

    Attributes:
        layer: the name of the layer.
        kind: "exact" if the relative error of the picture is at most `EXACT` for every sample, "approximate" if it is
            larger, "refused" if no picture can be computed.
        reason: one clause that says why `kind` is not "exact"; empty if it is.
        picture: the image rebuilt from the codes, [N, C, H, W]; None if refused.
        error: |picture - image| / |image|, [N]; None if refused.
        psnr: the peak signal-to-noise ratio of the picture in dB, with max - min of the image as the peak, [N]; None if
            refused.
        layer_error: |x - A z| / |x| for the input x and the codes z of this layer alone, [N].
        layer_psnr: the peak signal-to-noise ratio of A z against x, [N].
    """

    layer: str
    kind: Kind
    reason: str
    picture: Tensor | None
    error: Tensor | None
    psnr: Tensor | None
    layer_error: Tensor
    layer_psnr: Tensor

    def __iter__(self) -> Any:
        """Iterate over the picture and its error."""
        return iter((self.picture, self.error))


@persistent_state()
def invert(model: nn.Module, image: Tensor, layer: str, *, restore_contrast: bool = False) -> Inversion:
    """Rebuild an image from the codes of one CSC layer.

    Every layer of an `_all` model without shortcuts can be inverted, and in any model the CSC layers that are reached
    from the image through CSC layers, batch normalisation and pooling alone. The forward runs in evaluation mode; the
    model is left as it is.

    Args:
        model: a network with CSC layers.
        image: a batch of images, as `model` takes it.
        layer: the module name of a CSC layer, such as "stem.conv".
        restore_contrast: whether to multiply every estimate by one number per sample, so that it has the mean square
            that the batch normalisation gives. This shows more of deep layers whose codes come from few steps.

    Shape:
        - image: [N, C, H, W].
        - picture of the result: [N, C, H, W].
        - error of the result: [N].

    Returns:
        The inversion, which unpacks as `picture, error`.

    Raises:
        ValueError: an argument has a wrong type, there is no such CSC layer, or something between the image and the
            layer cannot be undone, such as a sum with a shortcut; the message names it.

    Example:
        >>> model = sdnet.create_model("sdnet18_all", num_classes=10, stem="cifar", shortcut=False)
        >>> picture, error = sdnet.invert(model, torch.rand(2, 3, 32, 32), "stages.0.0.conv1")
        >>> picture.shape
        torch.Size([2, 3, 32, 32])
    """
    layers = csc_layers(model)
    if not isinstance(layer, str) or layer not in layers:
        names = ", ".join(layers) or "none, as model has no CSC layers"
        raise ValueError(f"layer is {checks.shown(layer)}; it must be the name of a CSC layer of model: {names}.")
    restore_contrast, image = checks.flag("restore_contrast", restore_contrast), _checked_image(image)
    found = _inverted(layer, _record(model, image), image, restore_contrast)
    if found.kind == "refused":
        raise ValueError(f"{layer} cannot be inverted: {found.reason}.")
    return found


@persistent_state()
def invert_layers(model: nn.Module, image: Tensor, *, restore_contrast: bool = False) -> dict[str, Inversion]:
    """Rebuild an image from the codes of every CSC layer, with one forward pass.

    Args:
        model: a network with CSC layers.
        image: a batch of images, as `model` takes it.
        restore_contrast: see `invert`.

    Returns:
        The inversion of every CSC layer that the forward reaches, by its name, in the order of the calls. Layers that
        cannot be inverted are included, with `kind` "refused" and the reason.

    Raises:
        ValueError: an argument has a wrong type, or `model` has no CSC layers.

    Example:
        >>> for name, found in sdnet.invert_layers(model, images).items():
        ...     print(name, found.kind, found.error)
    """
    layers = csc_layers(model)
    if not layers:
        raise ValueError("model has no CSC layers, so there is nothing to invert.")
    restore_contrast, image = checks.flag("restore_contrast", restore_contrast), _checked_image(image)
    calls = _record(model, image)
    return {call.name: _inverted(call.name, calls, image, restore_contrast) for call in calls if call.name in layers}


def match_contrast(picture: Tensor, image: Tensor) -> Tensor:
    """Return the picture with the gain and offset of every sample and channel that come closest to the image.

    Two steps of an unrolled solver leave reconstructions with too little contrast. This shows how much of the error is
    contrast alone. It uses the image itself, so it is for display and no inversion.

    Args:
        picture: the rebuilt image.
        image: the image.

    Shape:
        - picture: [N, C, H, W].
        - image: [N, C, H, W].
        - Output: [N, C, H, W].
    """
    centred, target = (p - reduce(p, "n c h w -> n c 1 1", "mean") for p in (picture, image))
    gain = reduce(centred * target, "n c h w -> n c 1 1", "sum")
    gain = gain / reduce(centred.square(), "n c h w -> n c 1 1", "sum").clamp_min(NORM_FLOOR)
    return gain * centred + reduce(image, "n c h w -> n c 1 1", "mean")


def relative_error(estimate: Tensor, truth: Tensor) -> Tensor:
    """Return |estimate - truth| / |truth| of every sample, [N], in at least fp32.

    Args:
        estimate: the estimate, [N, ...].
        truth: the true values, [N, ...].

    Raises:
        ValueError: the shapes differ.
    """
    estimate, truth = _samples(estimate, truth)
    return (estimate - truth).norm(dim=1) / truth.norm(dim=1).clamp_min(NORM_FLOOR)


def psnr(estimate: Tensor, truth: Tensor, peak: float | None = None) -> Tensor:
    """Return the peak signal-to-noise ratio of every sample in dB, [N]: 10 log10(peak^2 / mean squared error).

    It is infinite for a sample without error, and minus infinity for one with an error and a peak of 0.

    Args:
        estimate: the estimate, [N, ...].
        truth: the true values, [N, ...].
        peak: the range of the values; None is max - min of `truth`, sample by sample, which is 0 for a constant image.

    Raises:
        ValueError: the shapes differ, or `peak` is no number of at least 0.
    """
    estimate, truth = _samples(estimate, truth)
    if peak is None:
        span = truth.amax(1) - truth.amin(1)
    else:
        span = truth.new_full((len(truth),), checks.number("peak", peak, ", or None"))
    squares = (estimate - truth).square().mean(1)
    return torch.where(squares == 0, float("inf"), 10 * torch.log10(span.square() / squares))


def _samples(estimate: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Return both as rows [N, n] in at least fp32: differences of small integers or half precision overflow."""
    if estimate.shape != truth.shape or truth.ndim < 2:
        raise ValueError(
            f"estimate has shape {list(estimate.shape)} and truth {list(truth.shape)}; they must have one shape "
            "[N, ...]."
        )
    dtype = torch.promote_types(torch.promote_types(estimate.dtype, truth.dtype), torch.float32)
    return estimate.to(dtype).flatten(1), truth.to(dtype).flatten(1)


class Call(NamedTuple):
    """One call of a module in the forward: its first tensor, its output, and a copy of the output of a CSC layer."""

    name: str
    module: nn.Module
    x: Tensor
    output: Tensor
    codes: Tensor | None
    in_place: bool


def _checked_image(image: Tensor) -> Tensor:
    """Return the image, copied if it was made under `torch.inference_mode`: such tensors do not count their changes.

    Raises:
        ValueError: it is no tensor [N, C, H, W] of a floating-point type.
    """
    if not isinstance(image, Tensor) or image.ndim != 4:
        raise ValueError(f"image is {checks.shown(image)}; it must be a tensor [N, C, H, W].")
    if not image.is_floating_point():
        raise ValueError(f"image is {image.dtype}; it must be floating point.")
    return image.clone() if image.is_inference() else image


def _record(model: nn.Module, image: Tensor) -> list[Call]:
    """Return the calls of the modules without children in one forward in evaluation mode, in their order."""
    calls: list[Call] = []
    versions: dict[int, int] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        versions[id(module)] = _first_tensor(args, kwargs)._version

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = _first_tensor(args, kwargs)
            if isinstance(output, Tensor):
                codes = output.clone() if isinstance(module, CSCConv2d) else None
                calls.append(Call(name, module, x, output, codes, x._version != versions[id(module)]))

        return hook

    inner = getattr(model, "_orig_mod", model)
    layers = set(csc_layers(inner).values())
    within = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    handles = []
    for name, module in inner.named_modules():
        if module in layers or (id(module) not in within and not any(True for _ in module.children())):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(note(name), with_kwargs=True))
    try:
        run_example(inner, image)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the first tensor among the arguments of a call, an empty one if there is none."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), torch.empty(0))


def _inverted(layer: str, calls: list[Call], image: Tensor, restore_contrast: bool) -> Inversion:
    """Return the inversion of one layer."""
    own = [index for index, call in enumerate(calls) if call.name == layer]
    if not own:
        raise ValueError(f"{layer} is not reached by the forward of model with this image.")
    call = calls[own[0]]
    assert isinstance(call.module, CSCConv2d)
    assert call.codes is not None
    estimate = _without_bias(call.module, call.codes)
    estimate = _synthesis(call.module, estimate, call.x)
    own_error, own_psnr = relative_error(estimate, call.x), psnr(estimate, call.x)
    try:
        if len(own) > 1:
            raise _CannotUndoError(f"the forward calls it {len(own)} times")
        picture = _down_to_the_image(own[0], estimate, calls, image, restore_contrast)
    except _CannotUndoError as refused:
        return Inversion(layer, "refused", str(refused), None, None, None, own_error, own_psnr)
    error = relative_error(picture, image)
    exact = bool((error <= EXACT).all())
    reason = "" if exact else f"A z differs from the input of {layer} or of a layer below it"
    kind: Kind = "exact" if exact else "approximate"
    return Inversion(layer, kind, reason, picture, error, psnr(picture, image), own_error, own_psnr)


class _CannotUndoError(Exception):
    """Its text says what cannot be undone."""


def _down_to_the_image(
    index: int, estimate: Tensor, calls: list[Call], image: Tensor, restore_contrast: bool
) -> Tensor:
    """Undo the modules from the input of call `index` down to the image."""
    while calls[index].x is not image:
        above = calls[index]
        makers = [
            j for j in range(index) if calls[j].output is above.x and not isinstance(calls[j].module, nn.Identity)
        ]
        if not makers:
            raise _CannotUndoError(
                f"the input of {above.name} is not the output of one module alone, but for instance a sum with a "
                "shortcut, which cannot be undone"
            )
        index = makers[-1]
        module = calls[index].module
        if restore_contrast and isinstance(module, nn.BatchNorm2d):
            estimate = _with_mean_square_of(module, estimate)
        estimate = _undo(calls[index], estimate)
    return estimate


def _undo(call: Call, output: Tensor) -> Tensor:
    """Return an estimate of the input of a call from an estimate of its output."""
    module, x = call.module, call.x
    if call.in_place:
        raise _CannotUndoError(f"{call.name} ({type(module).__name__}) changes its input in place")
    if isinstance(module, CSCConv2d):
        codes = _without_bias(module, output)
        return _synthesis(module, codes.clamp_min(0) if module.coding.nonnegative else codes, x)
    if isinstance(module, nn.BatchNorm2d):
        return _undo_batch_norm(call.name, module, output)
    if isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)):
        return F.interpolate(output, size=x.shape[2:], mode="bilinear", align_corners=False)
    if call.output.shape == x.shape and torch.equal(call.output, x):
        return output
    raise _CannotUndoError(f"{call.name} ({type(module).__name__}) cannot be undone")


def _without_bias(layer: CSCConv2d, output: Tensor) -> Tensor:
    """Return the codes in the output of a layer, to which `sdnet.convert` may have added a bias."""
    bias = getattr(layer, "bias", None)
    return output if bias is None else output - bias.view(-1, 1, 1)


def _synthesis(layer: CSCConv2d, codes: Tensor, x: Tensor) -> Tensor:
    """Return A z for the size of x; of `n_dict` reconstructions, their mean."""
    if isinstance(layer, CSCLinear):
        return layer.reconstruct(codes).unflatten(-1, (layer.coding.n_dict, -1)).mean(-2)
    reconstructions = layer.reconstruct(codes, (x.shape[2], x.shape[3]))
    return reduce(reconstructions, "n (d c) h w -> n c h w", "mean", d=layer.coding.n_dict)


def _with_mean_square_of(norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """Return y with the mean square that a batch normalisation gives its output, sample by sample."""
    gamma = torch.ones(norm.num_features).to(y) if norm.weight is None else norm.weight
    square = gamma.square().mean() + (0 if norm.bias is None else norm.bias.square().mean())
    found = reduce(y.square(), "n c h w -> n 1 1 1", "mean")
    return y * (square / found.clamp_min(NORM_FLOOR)).sqrt()


def _undo_batch_norm(name: str, norm: nn.BatchNorm2d, y: Tensor) -> Tensor:
    """Return z of y = gamma (z - mean) / sqrt(var + eps) + beta, with the running statistics."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise _CannotUndoError(f"{name} (BatchNorm2d) keeps no running statistics")
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    mean, scale, gamma, beta = (rearrange(v, "c -> c 1 1") for v in (mean, (var + norm.eps).sqrt(), gamma, beta))
    return torch.where(gamma == 0, mean, (y - beta) * scale / gamma + mean)
