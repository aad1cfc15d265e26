"""The public operator `csc_encode`: it checks its arguments and calls the implementation that is asked for."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from sdnet.kernels import checks, reference, step_sizes
from sdnet.kernels.coding import Coding, coding_of, takes_coding
from sdnet.kernels.dispatch import Choice, choose, transform_of
from sdnet.kernels.operators import csc_operator, memory_format_of
from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path import paths

KEEP_RESIDUALS = "SDNET_KEEP_RESIDUALS"


@takes_coding
def csc_encode(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    impl: str = "auto",
    keep_residuals: bool | None = None,
    **coding: Any,
) -> Tensor:
    """Return the sparse codes of x, by unrolled proximal gradient steps.

    The codes approximate argmin_z lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2 (with z >= 0 if nonnegative), where A z is
    the transposed convolution of z with `weight` and A' its adjoint:

        z_1 = P(step_size A'x),   z_{k+1} = P(y_k + step_size A'(x - A p_k)),
        P(v) = shrink(v, step_size lam) / (1 + step_size mu).

    Args:
        x: the input.
        weight: the dictionary. Atoms of unit norm make lam comparable between layers.
        step_size: a float or a 0-d tensor; as a rule 0.9 / L with L the largest eigenvalue of A'A, which is what
            `sdnet.kernels.step_size` returns. With many steps "fista" diverges from 4/3 / L on, "ista" and "sdnet"
            from 2 / L on. It carries no gradient.
        lam: the weight of |z|_1: a float, a 0-d tensor, or one value per sample, [N] or [N, 1, 1, 1]. Numbers and
            tensors on a CPU must be finite and at least 0. On other devices this is not checked, for a check would
            wait for the device; `explain` makes it.
        stride: of the convolution, an int or a (vertical, horizontal) pair.
        padding: of the convolution, an int or a (vertical, horizontal) pair.
        impl: "auto", "torch", "reference" (plain torch, for torch.export, ONNX and every kind of derivative) or
            "triton"; `explain` says what a call would take. The environment variable SDNET_IMPL replaces "auto".
        keep_residuals: whether the forward pass keeps the residuals for the backward pass, n_steps - 1 tensors of the
            size of n_dict x, instead of computing them again, a transposed convolution each. None reads the
            environment variable SDNET_KEEP_RESIDUALS, "1" for yes and "0" for no, and without it keeps them on a CPU,
            where memory is cheaper than convolutions.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - x: [N, C, H, W]
        - weight: [K, n_dict C, kh, kw]
        - Output: the codes [N, K, h, w] in x's dtype (autocast's under autocast), channels_last if x or weight is.

    Gradients reach x, weight and lam. Under the transforms of torch.func (grad, jvp, vmap, ...), in forward mode, for
    batched gradients and for higher derivatives the reference computes the call by itself, unless impl is "triton".

    Raises:
        ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the Triton kernels are asked for and cannot compute this call.
    """
    return encode(x, weight, step_size, lam, coding_of(csc_encode, coding), stride, padding, impl, keep_residuals)


def encode(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    coding: Coding,
    stride: int | Pair,
    padding: int | Pair,
    impl: str = "auto",
    keep_residuals: bool | None = None,
    path: str | None = None,
) -> Tensor:
    """Compute `csc_encode` for a `Coding`.

    `path` is what a benchmark asks of the Triton kernels: "auto", "fused", "cudnn", or an encoded
    `triton_path.paths.Entry`, which gives the tiles too. None reads the environment variable SDNET_TRITON_PATH.
    """
    call = prepared(x, weight, step_size, lam, coding, stride, padding, impl, keep_residuals, path)
    tensors = call.x, call.weight, call.step_size, call.lam
    if call.choice.impl == "reference":
        return reference.csc_encode(*tensors, coding, call.stride, call.padding)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return csc_operator(
        *tensors, coding, call.stride, call.padding, call.choice.impl, call.path, call.keep_residuals, needs_gradient
    )


class Prepared(NamedTuple):
    """A checked call, with the choice of what computes it.

    The tensors are of one type, step_size is 0-d, lam 0-d or dense [N, 1, 1, 1].
    """

    x: Tensor
    weight: Tensor
    step_size: Tensor
    lam: Tensor
    stride: Pair
    padding: Pair
    choice: Choice
    path: str
    keep_residuals: bool


def prepared(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    coding: Coding,
    stride: int | Pair,
    padding: int | Pair,
    impl: str,
    keep_residuals: bool | None,
    path: str | None = None,
) -> Prepared:
    """Check the arguments of a call, bring them into the form that the implementations take, and choose one.

    This is the only place that reads the environment.
    """
    stride, padding = checks.pair("stride", stride, 1), checks.pair("padding", padding, 0)
    _check(x, weight, padding, coding.n_dict)
    transform = transform_of(*(tensor for tensor in (x, weight, step_size, lam) if isinstance(tensor, Tensor)))
    step_size = _scalar_or_per_sample("step_size", step_size, x, per_sample=False)
    lam = _scalar_or_per_sample("lam", lam, x, per_sample=True)
    x, weight = _autocast(x, weight)
    choice = choose(impl, x, weight, transform)
    keep = _keeps_residuals(x) if keep_residuals is None else checks.flag("keep_residuals", keep_residuals)
    if path is None:
        path = paths.requested_path() if choice.impl == "triton" else paths.AUTO
    return Prepared(x, weight, step_size, lam, stride, padding, choice, path, keep)


@takes_coding
def explain(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    impl: str = "auto",
    keep_residuals: bool | None = None,
    **coding: Any,
) -> str:
    """Return which implementation `csc_encode` takes for these arguments, and why; raise what it would raise.

    The values of tensors are checked on every device here, which waits for a GPU. `csc_encode` checks the values of
    step_size and lam only where this costs no wait: numbers, and tensors on a CPU.

    Args:
        x: see `csc_encode`, as all other arguments.
        weight: see `csc_encode`.
        step_size: see `csc_encode`.
        lam: see `csc_encode`.
        stride: see `csc_encode`.
        padding: see `csc_encode`.
        impl: see `csc_encode`.
        keep_residuals: see `csc_encode`.
        **coding: see `csc_encode`.
    """
    options = coding_of(explain, coding)
    call = prepared(x, weight, step_size, lam, options, stride, padding, impl, keep_residuals)
    for name, value in (("step_size", call.step_size), ("lam", call.lam)):
        _check_values(name, value)
    choice = call.choice
    if choice.impl != "triton":
        return f"{choice.impl}: {choice.reason}."
    from sdnet.kernels.triton_path import loop

    layer = loop.layer_of(call.x, call.weight, call.stride, call.padding, memory_format_of(call.x, call.weight))
    chosen = loop.choice_of(layer, call.path)
    if call.path != paths.AUTO:
        chosen = chosen._replace(reason=f"{paths.ENVIRONMENT_VARIABLE} asks for the {chosen.name} path")
    return f"triton: {choice.reason}; {chosen}."


def step_size(
    weight: Tensor, image_size: int | Pair, stride: int | Pair = 1, padding: int | Pair = 0, tolerance: float = 1e-5
) -> Tensor:
    """Return the step size for a dictionary: 0.9 / L, with L the largest eigenvalue of A'A on images of one size.

    It is safe for every solver, and what `CSCConv2d` converges to. Compute it again when the weight, the geometry or
    the size of the images changes.

    Args:
        weight: the dictionary.
        image_size: height and width of the images, an int or a pair.
        stride: of the convolution, an int or a (vertical, horizontal) pair.
        padding: of the convolution, an int or a (vertical, horizontal) pair.
        tolerance: the relative error at which the eigenvalue is accepted.

    Shape:
        - weight: [K, n_dict C, kh, kw]
        - Output: 0-d, fp32, on the device of weight. The host waits for the device.

    Raises:
        ValueError: an argument has a wrong type, shape or value, or weight holds NaN or infinite values.

    Example:
        >>> weight = torch.nn.functional.normalize(torch.randn(16, 27)).view(16, 3, 3, 3)
        >>> x = torch.randn(8, 3, 32, 32)
        >>> codes = csc_encode(x, weight, step_size(weight, 32, padding=1), 0.1, padding=1)
    """
    if not isinstance(weight, Tensor) or weight.ndim != 4 or not weight.is_floating_point():
        given = checks.shown(weight) if not isinstance(weight, Tensor) else f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight is {given}; it must be a floating-point tensor [K, n_dict C, kh, kw].")
    size, stride = checks.pair("image_size", image_size, 1), checks.pair("stride", stride, 1)
    padding = checks.pair("padding", padding, 0)
    if any(n + 2 * p < k for n, p, k in zip(size, padding, weight.shape[2:], strict=True)):
        raise ValueError(
            f"image_size is {list(size)} with padding {list(padding)}, too small for atoms of {list(weight.shape[2:])}."
        )
    start = step_sizes.initial_power_vector((1, weight.shape[1], *size)).to(weight.device)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        _, eigenvalue = step_sizes.largest_eigenvalue(weight, start, stride, padding, tolerance)
        return step_sizes.step_size_of(eigenvalue)


def _scalar_or_per_sample(name: str, value: float | Tensor, x: Tensor, per_sample: bool) -> Tensor:
    """Return `value` as a 0-d tensor, or as a dense [N, 1, 1, 1] where that is allowed, of at least fp32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((), checks.number(name, value), dtype=dtype, device=x.device)
    if value.ndim > 0 and not (per_sample and value.numel() == x.shape[0] and value.shape[0] == x.shape[0]):
        allowed = f"0-d, [{x.shape[0]}] or [{x.shape[0]}, 1, 1, 1]" if per_sample else "0-d"
        raise ValueError(f"{name} has shape {list(value.shape)}; for x of shape {list(x.shape)} it must be {allowed}.")
    if value.is_complex():
        raise ValueError(f"{name} is {value.dtype}; it must be real.")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and _has_values(value):
        _check_values(name, value)
    value = value.to(device=x.device, dtype=dtype)
    return value.reshape(-1, 1, 1, 1).contiguous() if value.ndim else value


def _has_values(tensor: Tensor) -> bool:
    """Whether a value can be read: not within a trace, a transform of torch.func or a mode that watches operators."""
    traced = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return not traced and type(tensor) in (Tensor, Parameter) and transform_of(tensor) is None


def _check_values(name: str, value: Tensor) -> None:
    """Raise a ValueError unless all values are finite and at least 0. Waits for the device of `value`."""
    value = value.detach()
    least, most = (value, value) if value.ndim == 0 else (value.min(), value.max()) if value.numel() else (0.0, 0.0)
    for extreme in (float(least), float(most)):  # a NaN is both
        if not 0 <= extreme < float("inf"):
            raise ValueError(f"{name} holds {extreme:.6g}; its values must be finite and at least 0.")


def _keeps_residuals(x: Tensor) -> bool:
    """Return what the environment asks for, else whether x is on a CPU."""
    asked = os.environ.get(KEEP_RESIDUALS)
    if asked not in (None, "0", "1"):
        raise ValueError(f"The environment variable {KEEP_RESIDUALS} is {asked!r}; it must be 1 or 0.")
    return x.device.type == "cpu" if asked is None else asked == "1"


def _check(x: Tensor, weight: Tensor, padding: Pair, n_dict: int) -> None:
    """Raise a ValueError unless x and weight fit together."""
    for name, value, shape in (("x", x, "[N, C, H, W]"), ("weight", weight, "[K, n_dict C, kh, kw]")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}; it must be a Tensor {shape}.")
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; "
            "they must be [N, C, H, W] and [K, n_dict C, kh, kw]."
        )
    if weight.shape[1] != n_dict * x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels and n_dict is {n_dict}, but the atoms of weight have {weight.shape[1]} "
            "channels; they must have n_dict times as many as x."
        )
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; they must be of one floating-point type.")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; they must be on one device.")
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    if any(n < k for n, k in zip(padded, weight.shape[2:], strict=True)):
        raise ValueError(f"x padded to {padded} is smaller than the atoms of weight, {list(weight.shape[2:])}.")


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in autocast's dtype where it is on, as conv2d would have them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype != torch.float64:
        x = x.to(dtype)
    return x, weight.to(x.dtype)
