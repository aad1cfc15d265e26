"""Arithmetic of the kernels of `lanczos`: bounds that keep NaN, sums in a fixed order, vectors of 4 elements."""

import triton.language as tl

from sdnet.kernels import step_sizes
from sdnet.kernels.triton_path.jit import jit

SQUARINGS, TINY = tl.constexpr(step_sizes.SQUARINGS), tl.constexpr(step_sizes.TINY)


@jit
def at_least(x, floor):
    """Return max(x, floor); a NaN stays one."""
    return tl.where(x < floor, floor, x)


@jit
def is_finite(x):
    """Return whether x is neither infinite nor NaN."""
    return x - x == 0


@jit
def sum_every(ptr, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of `count` numbers that lie STRIDE apart."""
    e = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, count, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(ptr + (start + e) * STRIDE, mask=e < count - start, other=0.0)
    return tl.sum(total, axis=0)


@jit
def sum_rows(ptr, rows, columns, c):
    """Return the sums of the columns c of a matrix [rows, columns], zeros past its columns."""
    total = tl.zeros(c.shape, tl.float32)
    for row in tl.range(0, rows):  # pyright: ignore[reportGeneralTypeIssues]
        total += tl.load(ptr + row * columns + c, mask=c < columns, other=0.0)
    return total


@jit
def top_eigenvector(matrix):
    """Return the unit eigenvector [4] of the largest eigenvalue, as `step_sizes.top_eigenvector`."""
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    power = matrix
    for _ in tl.range(0, SQUARINGS):  # pyright: ignore[reportGeneralTypeIssues]
        power = power / at_least(tl.sum(tl.where(row == column, power, 0.0)), TINY)
        power = tl.sum(power[:, :, None] * power[None, :, :], axis=1)
    longest = tl.argmax(tl.sum(tl.where(row == column, power, 0.0), axis=1), axis=0)
    vector = tl.sum(tl.where(column == longest, power, 0.0), axis=1)
    return vector / at_least(tl.sqrt(tl.sum(vector * vector, axis=0)), TINY)


@jit
def element(vector, i):
    """Return the element i of a vector [4]."""
    return tl.sum(tl.where(tl.arange(0, 4) == i, vector, 0.0), axis=0)
