"""The public operator `csc_encode`: it checks its arguments and calls the implementation that is asked for."""

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdnet.kernels import checks, reference
from sdnet.kernels.coding import Coding, coding_of, takes_coding
from sdnet.kernels.dispatch import choose, requested
from sdnet.kernels.operators import memory_format_of
from sdnet.kernels.reference import Pair

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
        step_size: a float or a 0-d tensor (which is not read on the host); below 2 / (largest eigenvalue of A'A), 0.9
            of its inverse as a rule (`sdnet.kernels.step_sizes`). It carries no gradient.
        lam: the weight of |z|_1: a float, a 0-d tensor, or one value per sample, [N] or [N, 1, 1, 1].
        stride: of the convolution, an int or a (vertical, horizontal) pair.
        padding: of the convolution, an int or a (vertical, horizontal) pair.
        impl: "auto", "torch", "reference" (undecorated, for torch.export and higher derivatives) or "triton"
            (`explain` says what a call would take).
        keep_residuals: whether the forward pass keeps the residuals for the backward pass, n_steps - 1 tensors of the
            size of n_dict x, instead of computing them again, a transposed convolution each. None reads the
            environment variable SDNET_KEEP_RESIDUALS, "1" for yes and "0" for no, and without it keeps them on a CPU,
            where memory is cheaper than convolutions.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - x: [N, C, H, W]
        - weight: [K, n_dict C, kh, kw]
        - Output: the codes [N, K, h, w] in x's dtype (autocast's under autocast), channels_last if x or weight is.

    Gradients reach x, weight and lam, once; use impl="reference" for higher derivatives.

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
) -> Tensor:
    """Compute `csc_encode` for a `Coding`."""
    x, weight, step_size, lam, stride, padding = prepared(x, weight, step_size, lam, coding, stride, padding)
    impl, _ = requested(impl)
    if impl == "reference":
        return reference.csc_encode(x, weight, step_size, lam, coding, stride, padding)
    if keep_residuals is None:
        keep_residuals = _keeps_residuals(x)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or lam.requires_grad)
    options = (*coding.values(), stride, padding, impl, keep_residuals, needs_gradient)
    return torch.ops.sdnet.csc_forward(x, weight, step_size, lam, *options)[-1]


class Prepared(NamedTuple):
    """The checked arguments of a call: tensors of one type, step_size 0-d, lam 0-d or [N, 1, 1, 1], pairs."""

    x: Tensor
    weight: Tensor
    step_size: Tensor
    lam: Tensor
    stride: Pair
    padding: Pair


def prepared(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    coding: Coding,
    stride: int | Pair,
    padding: int | Pair,
) -> Prepared:
    """Return the checked arguments of a call, in the form that the implementations take."""
    stride, padding = checks.pair("stride", stride, 1), checks.pair("padding", padding, 0)
    _check(x, weight, padding, coding.n_dict)
    step_size = _scalar_or_per_sample("step_size", step_size, x, per_sample=False)
    lam = _scalar_or_per_sample("lam", lam, x, per_sample=True)
    x, weight = _autocast(x, weight)
    return Prepared(x, weight, step_size, lam, stride, padding)


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
    """Return which implementation `csc_encode` takes for these arguments, and why; raise what it would raise."""
    options = coding_of(explain, coding)
    x, weight, _, _, stride, padding = prepared(x, weight, step_size, lam, options, stride, padding)
    choice = choose(impl, x, weight)
    if choice.impl != "triton":
        return f"{choice.impl}: {choice.reason}."
    from sdnet.kernels.triton_path import loop

    layer = loop.layer_of(x, weight, stride, padding, memory_format_of(x, weight))
    return f"triton: {choice.reason}; {loop.choice_of(layer)}."


def _scalar_or_per_sample(name: str, value: float | Tensor, x: Tensor, per_sample: bool) -> Tensor:
    """`value` as a 0-d tensor, or [N, 1, 1, 1] where that is allowed, of at least fp32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value}; it must be a finite number of at least 0.")
        return torch.full((), value, dtype=dtype, device=x.device)
    if value.ndim > 0 and not (per_sample and value.numel() == x.shape[0] and value.shape[0] == x.shape[0]):
        allowed = f"0-d, [{x.shape[0]}] or [{x.shape[0]}, 1, 1, 1]" if per_sample else "0-d"
        raise ValueError(f"{name} has shape {list(value.shape)}; for x of shape {list(x.shape)} it must be {allowed}.")
    value = value.to(device=x.device, dtype=dtype)
    return value.reshape(-1, 1, 1, 1) if value.ndim else value


def _keeps_residuals(x: Tensor) -> bool:
    """What the environment asks for, else whether x is on a CPU."""
    asked = os.environ.get(KEEP_RESIDUALS)
    if asked not in (None, "0", "1"):
        raise ValueError(f"The environment variable {KEEP_RESIDUALS} is {asked!r}; it must be 1 or 0.")
    return x.device.type == "cpu" if asked is None else asked == "1"


def _check(x: Tensor, weight: Tensor, padding: Pair, n_dict: int) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; "
            "they must be [N, C, H, W] and [K, n_dict C, kh, kw]."
        )
    if weight.shape[1] != n_dict * x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels and n_dict is {n_dict}, so the atoms of weight must have "
            f"{n_dict * x.shape[1]} channels; they have {weight.shape[1]}."
        )
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; they must be of one floating-point type.")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; they must be on one device.")
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    if any(n < k for n, k in zip(padded, weight.shape[2:], strict=True)):
        raise ValueError(f"x padded to {padded} is smaller than the atoms of weight, {list(weight.shape[2:])}.")


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as conv2d would have them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype != torch.float64:
        x = x.to(dtype)
    return x, weight.to(x.dtype)
