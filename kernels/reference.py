"""The mathematics of convolutional sparse coding in plain torch: any device, any dtype, differentiable by autograd.

Everything here is written to be obviously right. It is the oracle of every test and benchmark, and the path for
``torch.export`` and for differentiating through the loop; `torch_path` is its fast twin.

With the dictionary A z = conv_transpose2d(z, W) and its adjoint A'x = conv2d(x, W), a layer looks for the codes

    z* = argmin_z  lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2        (z >= 0 if nonnegative)

by unrolled proximal steps from z_0 = 0, with z_1 = P(step_size A'x) and

    z_{k+1} = P(y_k + step_size A'(x - A p_k)),   y_k = z_k + beta_k (z_k - z_{k-1}),
    P(v) = shrink(v, step_size lam) / (1 + step_size mu).

The gradient point p_k tells the solvers apart: "ista" has beta = 0 and p = z; "fista" is the textbook method with
p = y (Beck and Teboulle 2009); "sdnet" is the official loop with p = z. For two steps beta_1 = 0 and all three agree.
"""

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from sdnet.kernels.coding import PLAIN_ITERATION, Coding, DataTerm, Iteration, Solver

Pair = tuple[int, int]

NORM_FLOOR = 1e-12
"""The least residual norm that the norm data term divides by."""


def codes_size(size: Pair, kernel_size: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return height and width of the codes of an input of height and width `size`."""
    height, width = ((n + 2 * p - k) // s + 1 for n, k, s, p in zip(size, kernel_size, stride, padding, strict=True))
    return height, width


def analysis(residual: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    """Return A'r, the correlation of a residual [N, C, H, W] with every atom of a dictionary [K, C, kh, kw]."""
    return F.conv2d(residual, weight, stride=stride, padding=padding)


def synthesis(codes: Tensor, weight: Tensor, size: Pair, stride: Pair, padding: Pair) -> Tensor:
    """Return A z, the sum of atoms that codes [N, K, h, w] stand for, as images of height and width `size`.

    Images of up to `stride` different sizes have codes of the same size, so the size must be given.
    """
    kernel_size = weight.shape[2:]
    bare = tuple(
        (n - 1) * s - 2 * p + k for n, s, p, k in zip(codes.shape[2:], stride, padding, kernel_size, strict=True)
    )
    output_padding = [n - b for n, b in zip(size, bare, strict=True)]
    if any(isinstance(n, torch.SymInt) for n in output_padding):
        # A program that is traced for images of any size: the padding has to be a number, so the largest and a cut.
        largest = [s - 1 for s in stride]
        images = F.conv_transpose2d(codes, weight, stride=stride, padding=padding, output_padding=largest)
        return images if not any(largest) else images[:, :, : size[0], : size[1]]
    return F.conv_transpose2d(codes, weight, stride=stride, padding=padding, output_padding=output_padding)


def shrink(v: Tensor, threshold: Tensor, nonnegative: bool) -> Tensor:
    """Return v after soft thresholding: sign(v) max(|v| - threshold, 0), or max(v - threshold, 0) if nonnegative."""
    if nonnegative:
        return (v - threshold).clamp_min(0)
    return v.sign() * (v.abs() - threshold).clamp_min(0)


def proximal(v: Tensor, step_size: Tensor, lam: Tensor, mu: float, nonnegative: bool) -> Tensor:
    """Return P(v), the proximal map of step_size (lam |.|_1 + mu/2 |.|^2), in v's dtype.

    `lam` broadcasts against v. The threshold is rounded to v's dtype once: lam may be too large for fp16 where
    step_size lam is not.
    """
    return shrink(v, (step_size * lam).to(v.dtype), nonnegative) / (1 + step_size * mu)


def momentum(n_steps: int, solver: Solver) -> list[float]:
    """Return beta_0 .. beta_{n_steps - 1}, with beta_0 = beta_1 = 0; all are zero for "ista".

    t_1 = 1, t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2, beta_k = (t_k - 1) / t_{k+1}.
    """
    betas, t = [0.0], 1.0
    while len(betas) < n_steps:
        t_next = (1 + (1 + 4 * t * t) ** 0.5) / 2
        betas.append(0.0 if solver == "ista" else (t - 1) / t_next)
        t = t_next
    return betas


def copies_of(x: Tensor, n_dict: int) -> Tensor:
    """Return x [N, C, H, W] repeated for each dictionary, [N, n_dict C, H, W]."""
    return x if n_dict == 1 else torch.cat([x] * n_dict, dim=1)


def residual_scale(residual: Tensor, data_term: DataTerm) -> Tensor | None:
    """Return what the data term multiplies a residual by: None (one), or 1/2 / |r| of each sample for the norm.

    The norm is detached. It is computed in at least fp32, in which the factor is returned, [N, 1, 1, 1]: in fp16 the
    squares of a picture of 224 pixels overflow, and so does the factor of a small residual.
    """
    if data_term == "squared":
        return None
    dtype = torch.promote_types(residual.dtype, torch.float32)
    norm = torch.linalg.vector_norm(residual.detach(), dim=(1, 2, 3), keepdim=True, dtype=dtype)
    return 0.5 / norm.clamp_min(NORM_FLOOR)


def csc_encode(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    coding: Coding,
    stride: Pair,
    padding: Pair,
) -> Tensor:
    """Return the codes [N, K, h, w] of x [N, C, H, W] over a dictionary [K, n_dict C, kh, kw].

    Autograd differentiates it by its own rules. `step_size` is 0-d, `lam` 0-d or of a shape that broadcasts against the
    codes. `step_size` and the norm of `data_term="norm"` carry no gradient. With n_dict > 1 one code has n_dict
    reconstructions, each compared with the whole input.
    """
    return solve(x, weight, step_size, lam, coding, stride, padding)[0]


def solve(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    lam: Tensor,
    coding: Coding,
    stride: Pair,
    padding: Pair,
    iteration: Iteration = PLAIN_ITERATION,
) -> tuple[Tensor, int]:
    """Return the codes as `csc_encode`, and the number of steps that were made.

    From codes z_0 the first step is z_1 = P(z_0 + step_size A'(x - A z_0)). Gradients reach z_0 and pass through
    `iteration.prox`. The tolerance looks at values only, which waits for the device after each step. The callback and
    `prox` get copies, so that what they do in place changes nothing.
    """
    step_size = step_size.detach()  # 0-d, and so products with it keep the dtype of x
    target = copies_of(x, coding.n_dict)
    size = (x.shape[2], x.shape[3])
    codes = previous = None if iteration.z0 is None else iteration.z0.to(x.dtype)
    step = 0
    for step, beta in enumerate(momentum(coding.n_steps, coding.solver), start=1):
        if codes is None or previous is None:
            v = step_size * analysis(target, weight, stride, padding)
        else:
            extrapolated = codes + beta * (codes - previous)
            gradient_point = extrapolated if coding.solver == "fista" else codes
            residual = target - synthesis(gradient_point, weight, size, stride, padding)
            scale = residual_scale(residual, coding.data_term)
            if scale is not None:
                residual = (residual * scale).to(x.dtype)
            v = extrapolated + step_size * analysis(residual, weight, stride, padding)
        if iteration.prox is None:
            found = proximal(v, step_size, lam, coding.mu, coding.nonnegative)
        else:
            copies = step_size.to(v.dtype, copy=True), lam.to(v.dtype, copy=True)
            found = checked_codes(iteration.prox(v, *copies), v, codes)
        previous, codes = found if codes is None else codes, found
        if iteration.callback is not None:
            iteration.callback(step, codes.clone())
        first = step == 1 and iteration.z0 is None  # there are no codes before it to compare with
        if iteration.tolerance is not None and not first and has_converged(codes, previous, iteration.tolerance):
            break
    assert codes is not None
    return codes, step


def checked_codes(codes: Tensor, v: Tensor, last: Tensor | None) -> Tensor:
    """Return what a `prox` returned.

    Args:
        codes: what it returned.
        v: what it was given.
        last: the codes of the step before.

    Raises:
        ValueError: it is no tensor of the shape and type of v, or the tensor that it returned in the step before, whose
            values are needed and have been overwritten.
    """
    if not isinstance(codes, Tensor) or codes.shape != v.shape or codes.dtype != v.dtype:
        given = f"{codes.dtype} {list(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
        raise ValueError(f"prox returned {given}; it must return a tensor like v, {v.dtype} {list(v.shape)}.")
    if codes is last:
        raise ValueError("prox returned the tensor of the step before; it must return a new one at every step.")
    return codes


def has_converged(codes: Tensor, previous: Tensor, tolerance: float) -> bool:
    """Return whether |z - z_prev| <= tolerance |z| for every sample. Waits for the device.

    Raises:
        ValueError: the values cannot be read, under vmap or in a trace.
    """
    dtype = torch.promote_types(codes.dtype, torch.float32)
    change, norm = (
        torch.linalg.vector_norm(tensor.detach(), dim=(1, 2, 3), dtype=dtype) for tensor in (codes - previous, codes)
    )
    try:
        return bool((change <= tolerance * norm).all())
    except RuntimeError as error:
        if "data-dependent" not in str(error):
            raise
        raise ValueError(
            f"tolerance is {tolerance}; under torch.vmap and in a trace, where no value can be read, it must be None."
        ) from error


def objective(x: Tensor, codes: Tensor, reconstruction: Tensor, lam: Tensor, coding: Coding) -> Tensor:
    """Return the objective of each sample, [N], in at least fp32.

    It is lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2, or with |x - A z| as the last term for the norm. With one lambda per
    atom lam |z|_1 is the sum over the atoms of lam_k |z_k|_1. The official steps descend the norm with half its
    gradient: the codes that they converge to minimise the objective with 1/2 |x - A z| as the last term, and so not
    quite this one.
    """
    dtype = torch.promote_types(codes.dtype, torch.float32)
    target = copies_of(x, coding.n_dict)
    codes, lam = codes.to(dtype), lam.to(dtype)
    squares = reduce((target.to(dtype) - reconstruction).square(), "n c h w -> n", "sum")
    data = 0.5 * squares if coding.data_term == "squared" else squares.sqrt()
    weights = rearrange(lam.expand(*codes.shape[:2], 1, 1), "n k 1 1 -> n k")
    sparsity = (weights * reduce(codes.abs(), "n k h w -> n k", "sum")).sum(1)
    return sparsity + 0.5 * coding.mu * reduce(codes.square(), "n k h w -> n", "sum") + data
