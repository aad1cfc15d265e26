"""The public operator `csc_encode`: it checks its arguments and calls the implementation that is asked for."""

import os
from typing import get_args

import torch
from torch import Tensor

from sdnet.kernels import reference
from sdnet.kernels.dispatch import choose, requested
from sdnet.kernels.operators import csc_forward, memory_format_of
from sdnet.kernels.reference import DataTerm, Pair, Solver

KEEP_RESIDUALS = "SDNET_KEEP_RESIDUALS"


def csc_encode(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    mu: float = 0.0,
    n_steps: int = 2,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    nonnegative: bool = True,
    solver: Solver = "fista",
    data_term: DataTerm = "squared",
    n_dict: int = 1,
    impl: str = "auto",
    keep_residuals: bool | None = None,
) -> Tensor:
    """Sparse codes of x by unrolled proximal steps.

    Approximates argmin_z lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2 (z >= 0 if nonnegative), with A z the transposed
    convolution of z with `weight` and A' its adjoint:

        z_1 = P(step A'x),   z_{k+1} = P(y_k + step A'(x - A p_k)),   P(v) = shrink(v, step lam) / (1 + step mu).

    Args:
        x: the input [N, C, H, W].
        weight: the dictionary [K, n_dict C, kh, kw]; atoms of unit norm make lam comparable between layers.
        step: the step size, a float or 0-d tensor (no host sync); below 2 / (largest eigenvalue of A'A), 0.9 of its
            inverse as a rule (`sdnet.kernels.step_sizes`). Carries no gradient.
        lam: the weight of |z|_1: a float, a 0-d tensor, or one per sample, [N] or [N, 1, 1, 1].
        mu: the weight of 1/2 |z|^2.
        n_steps: the number of unrolled steps.
        stride, padding: of the convolution, an int or a (vertical, horizontal) pair.
        nonnegative: one-sided shrinkage, codes >= 0.
        solver: "ista"; "fista", the gradient at the extrapolated point (Beck and Teboulle 2009); or "sdnet", the
            official loop, the gradient at the last codes. They agree up to two steps.
        data_term: "squared", or "norm", the official SQUARE_NOISE: False: from the second step on the residual is
            multiplied by 1/2 / |x - A p|, per sample, without gradient through the norm.
        n_dict: how many reconstructions one code has, each compared with x (the official EXPANSION_FACTOR).
        impl: "auto", "torch", "reference" (undecorated, for torch.export and higher derivatives) or "triton"
            (`explain` says what a call would take).
        keep_residuals: whether the backward pass finds the residuals, n_steps - 1 tensors of the size of n_dict x, kept
            by the forward pass instead of computing them again, a transposed convolution each. None asks the
            environment variable SDNET_KEEP_RESIDUALS, "1" for yes and "0" for no, and without it keeps them on a CPU,
            where memory is cheaper than convolutions.

    Returns:
        The codes [N, K, h, w] in x's dtype (autocast's under autocast), channels_last if x or weight is.

    Gradients reach x, weight and lam, once; use impl="reference" for higher derivatives.
    """
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    _check(x, weight, mu, n_steps, padding, solver, data_term, n_dict)
    step_size = _scalar_or_per_sample("step_size", step_size, x, per_sample=False)
    lam = _scalar_or_per_sample("lam", lam, x, per_sample=True)
    x, weight = _autocast(x, weight)
    impl, _ = requested(impl)
    if impl == "reference":
        return reference.csc_encode(
            x, weight, step_size, lam, mu, n_steps, stride, padding, nonnegative, solver, data_term, n_dict
        )
    if keep_residuals is None:
        keep_residuals = _keeps_residuals(x)
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or lam.requires_grad)
    return csc_forward(
        x,
        weight,
        step_size,
        lam,
        mu,
        n_steps,
        stride,
        padding,
        nonnegative,
        solver,
        data_term,
        n_dict,
        impl,
        keep_residuals,
        needs_gradient,
    )[-1]


def explain(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    mu: float = 0.0,
    n_steps: int = 2,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    nonnegative: bool = True,
    solver: Solver = "fista",
    data_term: DataTerm = "squared",
    n_dict: int = 1,
    impl: str = "auto",
    keep_residuals: bool | None = None,
) -> str:
    """Which implementation `csc_encode` takes for these arguments, and why; it raises what `csc_encode` would raise."""
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    _check(x, weight, mu, n_steps, padding, solver, data_term, n_dict)
    _scalar_or_per_sample("step_size", step_size, x, per_sample=False)
    _scalar_or_per_sample("lam", lam, x, per_sample=True)
    x, weight = _autocast(x, weight)
    choice = choose(impl, x, weight)
    if choice.impl != "triton":
        return f"{choice.impl}: {choice.reason}."
    from sdnet.kernels.triton_path import loop

    layer = loop.layer_of(x, weight, stride, padding, memory_format_of(x, weight))
    path = loop.path_of(layer)
    tiles = f"; A' in tiles of {layer.tiles.analysis}, A of {layer.tiles.synthesis}" if path.fused else ""
    return f"triton: {choice.reason}; {path.reason}{tiles}."


def _pair(name: str, value: int | Pair, least: int) -> Pair:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(n, int) and n >= least for n in pair):
        raise ValueError(f"{name} is {value}; it must be an int or a pair of ints of at least {least}.")
    return pair[0], pair[1]


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


def _check(
    x: Tensor, weight: Tensor, mu: float, n_steps: int, padding: Pair, solver: str, data_term: str, n_dict: int
) -> None:
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; "
            "they must be [N, C, H, W] and [K, n_dict C, kh, kw]."
        )
    if n_dict < 1:
        raise ValueError(f"n_dict is {n_dict}; it must be at least 1.")
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
    if n_steps < 1:
        raise ValueError(f"n_steps is {n_steps}; it must be at least 1.")
    if not 0 <= mu < float("inf"):
        raise ValueError(f"mu is {mu}; it must be a finite number of at least 0.")
    if solver not in get_args(Solver):
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(get_args(Solver))}.")
    if data_term not in get_args(DataTerm):
        raise ValueError(f"data_term is {data_term!r}; it must be one of {', '.join(get_args(DataTerm))}.")


def _autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in autocast's dtype where it is on, as conv2d would have them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype != torch.float64:
        x = x.to(dtype)
    return x, weight.to(x.dtype)
