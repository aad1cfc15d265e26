"""The public operator `csc_encode`: it checks its arguments and calls the implementation that is asked for."""

import os
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from sdnet.kernels import checks, reference, step_sizes
from sdnet.kernels.arguments import (
    DTYPES,
    as_tensor,
    check_dense,
    check_values,
    check_x_and_weight,
)
from sdnet.kernels.autocast import under_autocast
from sdnet.kernels.coding import (
    PLAIN_ITERATION,
    Callback,
    Coding,
    Iteration,
    Prox,
    coding_of,
    takes_coding,
)
from sdnet.kernels.dispatch import Choice, choose, transform_of
from sdnet.kernels.operators import csc_operator, memory_format_of
from sdnet.kernels.qualify import job
from sdnet.kernels.qualify.key import Call
from sdnet.kernels.reference import Pair, codes_size
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path import paths

KEEP_RESIDUALS = "SDNET_KEEP_RESIDUALS"


class Solution(NamedTuple):
    """What `csc_encode` returns if it is given a tolerance.

    Attributes:
        codes: the codes, [N, K, h, w].
        n_steps: how many steps were made, at most the n_steps that were asked for.
    """

    codes: Tensor
    n_steps: int


@overload
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
    z0: Tensor | None = None,
    tolerance: None = None,
    callback: Callback | None = None,
    prox: Prox | None = None,
    **coding: Any,
) -> Tensor: ...


@overload
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
    z0: Tensor | None = None,
    tolerance: float,
    callback: Callback | None = None,
    prox: Prox | None = None,
    **coding: Any,
) -> Solution: ...


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
    z0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
    prox: Prox | None = None,
    **coding: Any,
) -> Tensor | Solution:
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
        lam: the weight of |z|_1: a float, a 0-d tensor, one value per sample, [N] or [N, 1, 1, 1], per atom,
            [1, K, 1, 1], or for both, [N, K, 1, 1]. Numbers and tensors on a CPU must be finite and at least 0. On
            other devices this is not checked, because a check would wait for the device; `explain` makes it.
        stride: of the convolution, an int or a (vertical, horizontal) pair.
        padding: of the convolution, an int or a (vertical, horizontal) pair.
        impl: "auto", "torch", "reference" (plain torch, for torch.export, ONNX and every kind of derivative) or
            "triton"; `explain` returns what a call would take. The environment variable SDNET_IMPL replaces "auto".
        keep_residuals: whether the forward pass keeps the residuals for the backward pass, n_steps - 1 tensors of the
            size of n_dict x, instead of computing them again, a transposed convolution each. None reads the
            environment variable SDNET_KEEP_RESIDUALS, "1" for yes and "0" for no, and without it keeps them.
        z0: the codes to start from in place of zero (a warm start): z_1 = P(z_0 + step_size A'(x - A z_0)).
        tolerance: stop as soon as |z_{k+1} - z_k| <= tolerance |z_{k+1}| for every sample, after n_steps at the latest,
            and return a `Solution`: the codes and the number of steps. The test waits for the device, and cannot be
            made under torch.vmap.
        callback: called as callback(step, codes) after each step, 1, 2, ..., with a copy of the codes; what it returns
            is ignored.
        prox: takes the place of P, for other penalties: prox(v, step_size, lam) returns
            argmin_z step_size penalty(z) + 1/2 |z - v|^2 in the shape of v. mu must be 0, and nonnegative has no
            effect. step_size is 0-d, and lam 0-d or with four dimensions, both in x's dtype.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - x: [N, C, H, W]
        - weight: [K, n_dict C, kh, kw]
        - z0: [N, K, h, w]
        - Output: the codes [N, K, h, w] in x's dtype (autocast's under autocast), in the memory format of z0 if it is
          given, otherwise channels_last if x or weight is.

    Gradients reach x, weight, lam and z0, and pass through prox. Under the transforms of torch.func (grad, jvp, vmap,
    ...), in forward mode, for batched gradients and for higher derivatives the reference computes the call by itself,
    and so it does with z0, tolerance, callback or prox; with impl="triton" all these are refused. The Triton kernels do
    not take a lambda per atom either, for which "auto" takes the torch path.

    Returns:
        The codes; with a tolerance, a `Solution`.

    Raises:
        ValueError: an argument has a wrong type, shape or value.
        NotImplementedError: the Triton kernels are asked for and cannot compute this call.

    Example:
        >>> codes, n_steps = csc_encode(x, weight, step_size, 0.1, n_steps=1000, tolerance=1e-4)
        >>> codes = csc_encode(x, weight, step_size, 0.09, n_steps=20, z0=codes)
    """
    options, iteration = coding_of(csc_encode, coding), Iteration(z0, tolerance, callback, prox)
    found = solve(x, weight, step_size, lam, options, stride, padding, impl, keep_residuals, iteration)
    return found.codes if tolerance is None else found


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
    """Compute `csc_encode` for a `Coding` and without an `Iteration`.

    `path` is what a benchmark asks of the Triton kernels: "auto", "fused", "cudnn", or an encoded
    `triton_path.paths.Entry`, which gives the tiles too. None reads the environment variable SDNET_TRITON_PATH.
    """
    call = prepared(x, weight, step_size, lam, coding, stride, padding, impl, keep_residuals, path)
    tensors = call.x, call.weight, call.step_size, call.lam
    if call.choice.impl == "reference":
        return reference.csc_encode(*tensors, coding, call.stride, call.padding)
    # torch.jit.trace checks its graph by a second trace, without gradients, which must be the same.
    traced = not torch.compiler.is_compiling() and torch._C._is_tracing()
    needs_gradient = (torch.is_grad_enabled() or traced) and any(tensor.requires_grad for tensor in tensors)
    return csc_operator(
        *tensors, coding, call.stride, call.padding, call.choice.impl, call.path, call.keep_residuals, needs_gradient
    )


def solve(
    x: Tensor,
    weight: Tensor,
    step_size: float | Tensor,
    lam: float | Tensor,
    coding: Coding,
    stride: int | Pair,
    padding: int | Pair,
    impl: str = "auto",
    keep_residuals: bool | None = None,
    iteration: Iteration = PLAIN_ITERATION,
) -> Solution:
    """Compute `csc_encode` for a `Coding` and an `Iteration`, and say how many steps were made."""
    if iteration.given is None:
        codes = encode(x, weight, step_size, lam, coding, stride, padding, impl, keep_residuals)
        return Solution(codes, coding.n_steps)
    call = prepared(x, weight, step_size, lam, coding, stride, padding, impl, keep_residuals, None, iteration)
    tensors = call.x, call.weight, call.step_size, call.lam
    return Solution(*reference.solve(*tensors, coding, call.stride, call.padding, iteration))


class Prepared(NamedTuple):
    """A checked call, with the choice of what computes it.

    The tensors are of one type, step_size is 0-d, lam 0-d or dense [N, 1, 1, 1], [1, K, 1, 1] or [N, K, 1, 1].
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
    iteration: Iteration = PLAIN_ITERATION,
) -> Prepared:
    """Check the arguments of a call, bring them into the form that the implementations take, and choose one.

    This is the only place that reads the environment.
    """
    stride, padding = checks.pair("stride", stride, 1), checks.pair("padding", padding, 0)
    check_x_and_weight(x, weight, padding, coding.n_dict)
    transform = transform_of(*(tensor for tensor in (x, weight, step_size, lam) if isinstance(tensor, Tensor)))
    step_size = as_tensor("step_size", step_size, x).detach()  # no gradient reaches it
    lam = as_tensor("lam", lam, x, atoms=weight.shape[0])
    x, weight = under_autocast(x, weight)
    if iteration.given is not None:
        if iteration.z0 is not None:
            check_dense("z0", iteration.z0)
        (height, width), (kernel_h, kernel_w) = x.shape[2:], weight.shape[2:]
        size = codes_size((height, width), (kernel_h, kernel_w), stride, padding)
        iteration.check_fits(coding, (x.shape[0], weight.shape[0], *size), x)
    choice = choose(impl, x, weight, iteration.given or transform, lam.ndim > 0 and lam.shape[1] > 1, padding)
    keep = _keeps_residuals() if keep_residuals is None else checks.flag("keep_residuals", keep_residuals)
    if path is None:
        path = paths.requested_path() if choice.impl in ("auto", "triton") else paths.AUTO
    if path != paths.AUTO and choice.impl == "auto":
        choice = Choice("triton", f"the {path} path is asked for")
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
    z0: Tensor | None = None,
    tolerance: float | None = None,
    callback: Callback | None = None,
    prox: Prox | None = None,
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
        z0: see `csc_encode`.
        tolerance: see `csc_encode`.
        callback: see `csc_encode`.
        prox: see `csc_encode`.
        **coding: see `csc_encode`.

    Returns:
        The name of the implementation, a colon, and the reason.

    Raises:
        ValueError: as for `csc_encode`.
        NotImplementedError: as for `csc_encode`.

    Example:
        >>> sdnet.kernels.explain(x, weight, 0.1, 0.1, padding=1)
        'torch: auto takes the torch path for tensors on cpu.'
    """
    options, iteration = coding_of(explain, coding), Iteration(z0, tolerance, callback, prox)
    call = prepared(x, weight, step_size, lam, options, stride, padding, impl, keep_residuals, None, iteration)
    for name, value in (("step_size", call.step_size), ("lam", call.lam)):
        check_values(name, value)
    choice, layout = call.choice, memory_format_of(call.x, call.weight)
    impl, reason, path = choice.impl, choice.reason, call.path
    if impl == "auto":
        problem = Problem(call.step_size, call.lam, options, call.stride, call.padding)
        impl, path, reason = job.decide(Call.of(call.x, call.weight, problem, layout), call.x.device)
        reason = f"{choice.reason}: {reason}"
    if impl != "triton":
        return f"{impl}: {reason}."
    from sdnet.kernels.triton_path import loop

    chosen = loop.choice_of(loop.layer_of(call.x, call.weight, call.stride, call.padding, layout), path)
    if call.path != paths.AUTO:
        chosen = chosen._replace(reason=f"{paths.ENVIRONMENT_VARIABLE} asks for the {chosen.name} path")
    elif choice.impl == "auto":
        chosen = chosen._replace(reason=f"the {chosen.name} path")
    return f"triton: {reason}; {chosen}."


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
    if isinstance(weight, Tensor):
        check_dense("weight", weight)
    if not isinstance(weight, Tensor) or weight.ndim != 4 or weight.dtype not in DTYPES or 0 in weight.shape:
        given = checks.shown(weight) if not isinstance(weight, Tensor) else f"{weight.dtype} {list(weight.shape)}"
        raise ValueError(f"weight is {given}; it must be a floating-point tensor [K, n_dict C, kh, kw].")
    size, stride = checks.pair("image_size", image_size, 1), checks.pair("stride", stride, 1)
    padding = checks.pair("padding", padding, 0)
    if checks.number("tolerance", tolerance) >= 1:
        raise ValueError(f"tolerance is {tolerance}; it must be a number of at least 0 and below 1.")
    if weight.is_meta:
        raise ValueError("weight is on the meta device and has no values; give it memory first.")
    if any(n + 2 * p < k for n, p, k in zip(size, padding, weight.shape[2:], strict=True)):
        raise ValueError(
            f"image_size is {list(size)} with padding {list(padding)}, too small for atoms of {list(weight.shape[2:])}."
        )
    with torch.inference_mode(False), torch.no_grad():  # so that a gradient can pass through calls that take it
        start = step_sizes.initial_power_vector((1, weight.shape[1], *size)).to(weight.device)
        _, eigenvalue = step_sizes.largest_eigenvalue(weight, start, stride, padding, tolerance)
        return step_sizes.step_size_of(eigenvalue)


def _keeps_residuals() -> bool:
    """Return what the environment asks for; by default residuals are kept."""
    asked = os.environ.get(KEEP_RESIDUALS)
    if asked not in (None, "0", "1"):
        raise ValueError(f"The environment variable {KEEP_RESIDUALS} is {asked!r}; it must be 1 or 0.")
    return asked != "0"
