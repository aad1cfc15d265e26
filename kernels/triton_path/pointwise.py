"""The kernels between the convolutions of the cudnn path: one pass over memory each.

    shrink_step   z' = P(y + s v),   y = z + beta (z - z_prev),   P(u) = shrink(u, s lam) / (1 + s mu)
    subtract      r = x - A p, x once for each of n_dict dictionaries
    mask          m = [z != 0] (g - h)

v = A'r is not scaled. Tensors are dense, all contiguous or all channels_last (others are copied to the memory format of
the first), so a program takes BLOCK neighbouring elements whatever the format. The step size s and lambda are read on
the device; sums are fp32. NaNs stay NaNs.
"""

import torch
import triton.language as tl
from torch import Tensor

from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path.jit import constexpr, jit
from sdnet.kernels.triton_path.launch import launch

BLOCK = 2048
"""Elements of a program: 16 for each of 128 threads, 32 bytes of a 16-bit type."""


@jit
def elements_of_program(numel, BLOCK: constexpr):
    """Return the first element of this program, 64-bit, the offsets from it, and which of them there are."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offset = tl.arange(0, BLOCK)
    return start, offset, offset < numel - start


@jit
def shrink_step_kernel(
    v_ptr, z_ptr, previous_ptr, step_size_ptr, lam_ptr, out_ptr, numel, sample, beta, mu,
    CODES: constexpr, MOMENTUM: constexpr, PER_SAMPLE: constexpr, NONNEGATIVE: constexpr,
    BLOCK: constexpr,
):  # fmt: skip
    """Write out = P(y + s v); y = 0 unless CODES, y = z unless MOMENTUM. A sample has `sample` elements."""
    start, offset, kept = elements_of_program(numel, BLOCK)
    step_size = tl.load(step_size_ptr)
    u = step_size * tl.load(v_ptr + start + offset, mask=kept).to(tl.float32)
    if CODES:
        z = tl.load(z_ptr + start + offset, mask=kept).to(tl.float32)
        if MOMENTUM:
            z += beta * (z - tl.load(previous_ptr + start + offset, mask=kept).to(tl.float32))
        u += z
    if PER_SAMPLE:
        first = start // sample  # one division of 64 bits for the program, then of 32 bits for its elements
        index = (start - first * sample + offset).to(tl.int32) // sample
        threshold = step_size * tl.load(lam_ptr + first + index, mask=kept)
    else:
        threshold = step_size * tl.load(lam_ptr)
    # Comparisons that a NaN fails keep it: a maximum with zero would hide it.
    if NONNEGATIVE:
        u -= threshold
        u = tl.where(u < 0, 0.0, u)
    else:
        u = tl.where(tl.abs(u) <= threshold, 0.0, tl.where(u < 0, u + threshold, u - threshold))
    tl.store(out_ptr + start + offset, (u / (1 + step_size * mu)).to(out_ptr.dtype.element_ty), mask=kept)


@jit
def subtract_kernel(
    x_ptr, reconstruction_ptr, out_ptr, numel, inner, COPIES: constexpr, BLOCK: constexpr
):  # fmt: skip
    """Write out = x - reconstruction, with COPIES runs of the reconstruction for each run of `inner` elements of x."""
    start, offset, kept = elements_of_program(numel, BLOCK)
    if COPIES == 1:
        x = tl.load(x_ptr + start + offset, mask=kept)
    else:
        element = start + offset
        x = tl.load(x_ptr + element // (COPIES * inner) * inner + element % inner, mask=kept)
    r = x.to(tl.float32) - tl.load(reconstruction_ptr + start + offset, mask=kept).to(tl.float32)
    tl.store(out_ptr + start + offset, r.to(out_ptr.dtype.element_ty), mask=kept)


@jit
def mask_kernel(grad_ptr, minus_ptr, codes_ptr, out_ptr, numel, MINUS: constexpr, BLOCK: constexpr):
    """Write out = [codes != 0] (grad - minus); minus = 0 unless MINUS."""
    start, offset, kept = elements_of_program(numel, BLOCK)
    g = tl.load(grad_ptr + start + offset, mask=kept)
    if MINUS:
        g = g.to(tl.float32) - tl.load(minus_ptr + start + offset, mask=kept).to(tl.float32)
    z = tl.load(codes_ptr + start + offset, mask=kept)
    tl.store(out_ptr + start + offset, tl.where(z == 0, 0.0, g).to(out_ptr.dtype.element_ty), mask=kept)


def in_layout_of(first: Tensor, *others: Tensor | None) -> list[Tensor]:
    """Return the tensors in the memory format of the first, copied if need be; the first in the place of None."""
    last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    return [(first if tensor is None else tensor).contiguous(memory_format=layout) for tensor in (first, *others)]


def launch_grid(numel: int) -> tuple[int]:
    """Return the launch grid for so many elements."""
    return (-(-numel // BLOCK),)


def shrink_step(
    v: Tensor,
    problem: Problem,
    z: Tensor | None = None,
    previous: Tensor | None = None,
    beta: float = 0.0,
    in_place: bool = False,
) -> Tensor:
    """Return P(y + s v) with y = z + beta (z - z_prev), s the step size.

    Args:
        v: A'r, codes [N, K, h, w].
        problem: gives s, lambda and mu.
        z: the codes before the step; None stands for zero.
        previous: z_prev, read only if beta is not 0.
        beta: the extrapolation.
        in_place: whether the result takes the memory of v.
    """
    momentum = z is not None and previous is not None and beta != 0
    dense, z_dense, previous_dense = in_layout_of(v, z, previous if momentum else None)
    out = dense if in_place else torch.empty_like(dense)
    if v.numel() == 0:
        return out
    arguments = (
        dense, z_dense, previous_dense, problem.step_size, problem.lam.contiguous(), out,
        v.numel(), v[0].numel(), float(beta), float(problem.coding.mu),
        z is not None, momentum, problem.lam.ndim > 0, problem.coding.nonnegative, BLOCK,
    )  # fmt: skip
    launch(shrink_step_kernel, launch_grid(v.numel()), arguments)
    return out


def subtract(x: Tensor, reconstruction: Tensor, n_dict: int = 1, in_place: bool = False) -> Tensor:
    """Return x [N, C, H, W] minus each of n_dict reconstructions [N, n_dict C, H, W], in their memory if asked."""
    dense, x = in_layout_of(reconstruction, x)
    out = dense if in_place else torch.empty_like(dense)
    if out.numel() == 0:
        return out
    inner = x.shape[1] if dense.stride(1) == 1 else x[0].numel()
    launch(subtract_kernel, launch_grid(out.numel()), (x, dense, out, out.numel(), inner, n_dict, BLOCK))
    return out


def mask(grad: Tensor, codes: Tensor, minus: Tensor | None = None) -> Tensor:
    """Return [codes != 0] (grad - minus), all [N, K, h, w], in the codes' memory format; `minus` is zero if None."""
    dense, g, h = in_layout_of(codes, grad, minus)
    out = torch.empty_like(dense, dtype=grad.dtype)
    if out.numel() == 0:
        return out
    launch(mask_kernel, launch_grid(out.numel()), (g, h, dense, out, out.numel(), minus is not None, BLOCK))
    return out
