"""Tests of `faithful()`: each feature against torch's bfloat16, with the patches and without them.

`test_the_interpreter_alone_is_wrong` fails once Triton corrects its interpreter: then the patches can be reduced.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sdnet.kernels import dispatch

from .numerics import (
    TESTED_TRITON,
    TF32_BITS,
    faithful,
    interpreter,
    needs_interpreter,
    refuse_untested_version,
    rounded,
)

pytestmark = needs_interpreter

jit: Any = triton.jit
N = 32
"""A tensor has N x N elements."""


@jit
def square(N: tl.constexpr):
    """The offsets of all elements, [N, N]."""
    return tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]


@jit
def add_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + square(N), tl.load(x_ptr + square(N)) + tl.load(y_ptr + square(N)))


@jit
def polynomial_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """Every operation rounds; constants are of type bf16."""
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    tl.store(out_ptr + square(N), (x * y - x + 1.5) * 0.375 - (-y))


@jit
def divide_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + square(N), tl.load(x_ptr + square(N)) / tl.load(y_ptr + square(N)))


@jit
def compare_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """With NaNs, and zeros of both signs."""
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    bits = (x < y).to(tl.int32) + 2 * (x >= y) + 4 * (x == 0) + 8 * (x != 0) + 16 * (x == y)
    tl.store(out_ptr + square(N), bits.to(tl.float32))


@jit
def select_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    tl.store(out_ptr + square(N), tl.where(tl.abs(x) > y, tl.minimum(x, y), tl.where(y != 0, tl.maximum(x, y), 0.0)))


@jit
def widen_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + square(N), tl.load(x_ptr + square(N)).to(tl.float32) + tl.load(y_ptr + square(N)).to(tl.float32))


@jit
def narrow_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """fp32 to bf16, ties to even; and an integer to bf16."""
    y = (tl.load(y_ptr + square(N)) * 100).to(tl.int32)
    tl.store(out_ptr + square(N), tl.load(x_ptr + square(N)).to(tl.bfloat16) + y.to(tl.bfloat16))


@jit
def masked_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    kept = square(N) % 3 != 0
    x = tl.load(x_ptr + square(N), mask=kept, other=-2.5) + tl.load(y_ptr + square(N), mask=kept, other=0.0)
    tl.store(out_ptr + square(N), x)
    tl.store(out_ptr + square(N), tl.full((N, N), 7.25, tl.bfloat16), mask=square(N) % 5 == 0)


@jit
def turn_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    tl.store(out_ptr + square(N), x.T + tl.trans(y.reshape(N // 2, 2 * N)).reshape(N, N))


@jit
def total_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    tl.store(out_ptr + square(N), tl.max(x, axis=1)[:, None] + tl.sum(y.to(tl.float32), axis=0)[None, :])


@jit
def dot_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + square(N), tl.dot(tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N)).T))


@jit
def bits_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    """The sign of x on y."""
    x = tl.load(x_ptr + square(N)).to(tl.int16, bitcast=True) & -32768
    y = tl.load(y_ptr + square(N)).to(tl.int16, bitcast=True) & 32767
    tl.store(out_ptr + square(N), (x | y).to(tl.bfloat16, bitcast=True))


@jit
def descriptor_kernel(x, y, out_ptr, N: tl.constexpr):
    """Rows from -1 on: the first is padding."""
    tl.store(out_ptr + square(N), x.load([-1, 0]) * y.load([-1, 0]))


class Feature(NamedTuple):
    """A kernel of bf16, what torch makes of the same, and whether the interpreter gets it wrong by itself."""

    kernel: Any
    expected: Callable[[Tensor, Tensor], Tensor]
    out: torch.dtype = torch.bfloat16
    wrong: bool = True
    x: torch.dtype = torch.bfloat16


def compared(x: Tensor, y: Tensor) -> Tensor:
    conditions = (x < y, x >= y, x == 0, x != 0, x == y)
    return torch.stack([condition * 2.0**n for n, condition in enumerate(conditions)]).sum(dim=0)


def selected(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(x.abs() > y, torch.minimum(x, y), torch.where(y != 0, torch.maximum(x, y), 0))


def with_masks(x: Tensor, y: Tensor) -> Tensor:
    offset = torch.arange(N * N).view(N, N)
    return torch.where(offset % 5 == 0, 7.25, torch.where(offset % 3 != 0, x + y, -2.5)).bfloat16()


def below(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:1]), x[:-1]])


FEATURES = {
    "addition": Feature(add_kernel, lambda x, y: x + y),
    "a polynomial": Feature(polynomial_kernel, lambda x, y: (x * y - x + 1.5) * 0.375 - (-y)),
    "division": Feature(divide_kernel, lambda x, y: x / y),
    "comparisons": Feature(compare_kernel, compared, torch.float32),
    "choices": Feature(select_kernel, selected),
    "bf16 to fp32": Feature(widen_kernel, lambda x, y: x.float() + y.float(), torch.float32, wrong=False),
    "fp32 to bf16": Feature(narrow_kernel, lambda x, y: x.bfloat16() + (y * 100).int().bfloat16(), x=torch.float32),
    "masks": Feature(masked_kernel, with_masks),
    "transposition": Feature(turn_kernel, lambda x, y: x.T + y.reshape(N // 2, 2 * N).T.reshape(N, N)),
    "reductions": Feature(
        total_kernel,
        lambda x, y: x.amax(dim=1, keepdim=True).float() + y.float().sum(dim=0),
        torch.float32,
        wrong=False,
    ),
    "dot": Feature(dot_kernel, lambda x, y: x.float() @ y.float().T, torch.float32),
    "bits": Feature(bits_kernel, lambda x, y: torch.copysign(y, x), wrong=False),
    "descriptors": Feature(descriptor_kernel, lambda x, y: below(x) * below(y)),
}


def operands(feature: Feature) -> tuple[Tensor, Tensor]:
    """Normal values; where no sum or division meets them, NaNs and zeros of both signs; in fp32 ties of bf16 too."""
    x, y = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0)).to(feature.x)
    if feature.x == torch.float32:
        x[0] = torch.from_numpy(rounded(x[0].numpy(), 16) * (1 + 2.0**-8))  # halfway between two
        x[1] = torch.tensor([3.4e38, -3.4e38, torch.inf, torch.nan] * (N // 4))
        y = y.bfloat16()
    if feature.kernel is compare_kernel:
        x[0], y[0] = torch.nan, 0.0
        x[1], y[1] = -0.0, 0.0
        x[2] = y[2]
    return x, y


def run(feature: Feature, *operands: Tensor) -> Tensor:
    out = torch.full((N, N), torch.nan, dtype=feature.out)
    descriptors = [TensorDescriptor(x, [N, N], [N, 1], [N, N]) for x in operands]
    feature.kernel[(1,)](*(descriptors if feature.kernel is descriptor_kernel else operands), out, N=N)
    return out


def test_an_untested_version_of_triton_is_refused() -> None:
    refuse_untested_version()  # the installed one
    for version in TESTED_TRITON:
        refuse_untested_version(version)
    with pytest.raises(RuntimeError, match=r"was tested with Triton 3\.6\.0 and 3\.7\.1, not with 3\.9\.0"):
        refuse_untested_version("3.9.0")


@pytest.mark.parametrize("name", FEATURES)
def test_bf16_equals_that_of_torch(name: str) -> None:
    feature = FEATURES[name]
    x, y = operands(feature)
    with faithful():
        actual = run(feature, x, y)
    tolerance = 1e-5 if feature.kernel in (dot_kernel, total_kernel) else 0  # sums in another order
    torch.testing.assert_close(actual, feature.expected(x, y), rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_interpreter_alone_is_wrong(name: str) -> None:
    feature = FEATURES[name]
    x, y = operands(feature)
    try:
        right = torch.allclose(run(feature, x, y).float(), feature.expected(x, y).float(), 1e-5, 1e-5, equal_nan=True)
    except interpreter.InterpreterError:
        right = False
    assert right != feature.wrong


@jit
def product_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    x, y = tl.load(x_ptr + square(N)), tl.load(y_ptr + square(N))
    tl.store(out_ptr + square(N), tl.dot(x, y, input_precision=PRECISION))


def product(x: Tensor, y: Tensor, precision: str) -> Tensor:
    out = torch.empty(N, N)
    product_kernel[(1,)](x, y, out, N=N, PRECISION=precision)
    return out


@pytest.mark.parametrize(("precision", "least", "most"), [("tf32", 1e-4, 1e-3), ("ieee", 0, 1e-6)])
def test_a_dot_in_tf32_rounds_its_operands(precision: str, least: float, most: float) -> None:
    x, y = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0))
    exact = x.double() @ y.double()
    with faithful():
        error = (product(x, y, precision) - exact).norm() / exact.norm()
    assert least <= error <= most


@pytest.mark.parametrize("patched", [True, False])
def test_the_interpreter_alone_treats_tf32_as_fp32(patched: bool) -> None:
    x, y = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0))
    with faithful() if patched else nullcontext():
        assert torch.equal(product(x, y, "tf32"), product(x, y, "ieee")) != patched


def test_tf32_keeps_ten_bits_of_mantissa_with_ties_to_even() -> None:
    unit = 2.0**-10
    values = [1 + unit, 1 + unit / 2, 1 + 1.5 * unit, 1 + 0.5001 * unit, -1 - unit / 2, 0.0, np.inf, np.nan]
    found = rounded(np.array(values), TF32_BITS)
    np.testing.assert_array_equal(found, [1 + unit, 1, 1 + 2 * unit, 1 + unit, -1, 0, np.inf, np.nan])


def test_bf16_rounds_as_torch_does() -> None:
    values = torch.randn(10000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-40, 38, 10000)
    torch.testing.assert_close(torch.from_numpy(rounded(values.numpy(), 16)), values.bfloat16().float(), rtol=0, atol=0)


def test_faithful_restores_the_interpreter() -> None:
    x = torch.empty(1, 1, 1, 1, dtype=torch.bfloat16)
    parts = [
        lambda: interpreter.TensorHandle.__post_init__,
        lambda: interpreter._get_np_dtype(tl.bfloat16),
        lambda: type(interpreter.interpreter_builder),
        lambda: dispatch.obstacle_to_triton(x, x),
    ]
    before = [part() for part in parts]
    with faithful():
        assert all(part() != was for part, was in zip(parts, before, strict=True))
    assert [part() for part in parts] == before
    with pytest.raises(interpreter.InterpreterError), faithful():
        run(Feature(truncate_kernel, torch.add), x, x)
    assert [part() for part in parts] == before


@jit
def atomic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    tl.atomic_add(out_ptr + square(N), tl.load(x_ptr + square(N)))


@jit
def truncate_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + square(N)).to(tl.float32)
    tl.store(out_ptr + square(N), x.to(tl.bfloat16, fp_downcast_rounding="rtz"))


@pytest.mark.parametrize("kernel", [atomic_kernel, truncate_kernel], ids=["atomics", "truncation"])
def test_uncovered_operations_are_refused(kernel: Any) -> None:
    feature = Feature(kernel, lambda x, _: x)
    with faithful(), pytest.raises(interpreter.InterpreterError, match="with bfloat16 under the interpreter"):
        run(feature, *operands(feature))
