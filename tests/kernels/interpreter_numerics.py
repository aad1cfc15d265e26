"""Triton's interpreter, made true to bf16 and tf32 for the time of a test.

The interpreters of Triton 3.6 and 3.7 keep bf16 as uint16 and compute with these integers, and their dot takes tf32
for fp32. Within `faithful()`

  * a bf16 value is held as the fp32 of the same value from its load to its store, so that NumPy computes with values;
    what becomes a TensorHandle of type bf16 is rounded there, to nearest, ties to even: one seam for every operator;
  * a dot of bf16 has exact products and fp32 sums, as on tensor cores;
  * a dot of fp32 with input_precision "tf32" rounds its operands to 10 bits of mantissa, here to nearest, ties to even.
    GPUs round or truncate, as the instruction has it;
  * `csc_encode` takes bf16 with impl="triton", which it refuses under the interpreter otherwise.

Atomics, fp8 beside bf16, and rounding to bf16 in other ways than to nearest are refused.

`convolutions_in_tf32()` has torch's convolutions round likewise, as cuDNN's do and the CPU's do not.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.runtime import interpreter as installed

from sdnet.kernels import dispatch, reference, torch_path
from sdnet.kernels.triton_path import cudnn

interpreter: Any = installed  # its insides are beyond a type checker

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs interpreted kernels, not compiled ones"
)

TF32_BITS, BF16_BITS = 13, 16
"""How many bits of mantissa they have less than fp32."""


def rounded(data: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """fp32 without the last bits of its mantissa, to nearest, ties to even."""
    data = np.asarray(data, dtype=np.float32)
    pattern = data.view(np.uint32)
    up = ((pattern >> np.uint32(bits)) & np.uint32(1)) + np.uint32((1 << (bits - 1)) - 1)
    kept = (pattern + up) & np.uint32(2**32 - (1 << bits))
    return np.where(np.isnan(data), np.float32(np.nan), kept.view(np.float32))


def packed(data: NDArray[Any]) -> NDArray[np.uint16]:
    """The memory of bf16 values held as fp32."""
    return (np.asarray(data, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def unpacked(memory: NDArray[Any]) -> NDArray[np.float32]:
    """The values of bf16 memory."""
    return (memory.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bf16(handle: Any) -> bool:
    """Whether it holds bf16. A comparison's result bears its operands' type, and holds booleans."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype != np.bool_


def refuse(what: str, *handles: Any) -> None:
    if any(is_bf16(handle) for handle in handles):
        raise NotImplementedError(f"{what} with bfloat16 under the interpreter")


class FaithfulBuilder(interpreter.InterpreterBuilder):
    """The operations that look at the bits of a value, or at its memory. All others compute with what handles hold."""

    def get_bf16(self, value: float) -> Any:
        return interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.bfloat16)

    def create_masked_load(
        self, ptrs: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any, is_volatile: Any
    ) -> Any:
        if ptrs.get_element_ty() != tl.bfloat16:
            return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        fallback = np.zeros(ptrs.data.shape, np.uint16) if other is None else packed(other.data)
        memory = interpreter._interpreter.load(ptrs.data, mask.data, fallback, np.dtype(np.uint16))
        return interpreter.TensorHandle(unpacked(memory), tl.bfloat16)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any) -> Any:
        if ptrs.get_element_ty() == tl.bfloat16:
            value = interpreter.TensorHandle(packed(value.data), tl.uint16)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def create_bitcast(self, src: Any, dst_type: Any) -> Any:
        if is_bf16(src):
            src = interpreter.TensorHandle(packed(src.data), tl.uint16)
        if dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(unpacked(src.data.view(np.uint16)), tl.bfloat16)
        return super().create_bitcast(src, dst_type)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        return interpreter.TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)

    def create_fabs(self, arg: Any) -> Any:
        return self.unary_op(arg, np.abs) if is_bf16(arg) else super().create_fabs(arg)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (interpreter.TensorHandle(rounded(x.data, TF32_BITS), tl.float32) for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        refuse("another rounding, or fp8,", src)
        if dst_type.scalar == tl.bfloat16:
            raise NotImplementedError("another rounding, or fp8, with bfloat16 under the interpreter")
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, sem: Any, scope: Any) -> Any:
        refuse("an atomic", cmp, val)
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, sem: Any, scope: Any) -> Any:
        refuse("an atomic", val)
        return super().create_atomic_rmw(op, ptr, val, mask, sem, scope)


@contextmanager
def builder_with(methods: type) -> Iterator[None]:
    """The interpreter's builder has these methods before its own."""
    builder = interpreter.interpreter_builder
    before = builder.__class__
    builder.__class__ = type(methods.__name__, (methods, before), {})
    try:
        yield
    finally:
        builder.__class__ = before


@contextmanager
def faithful() -> Iterator[None]:
    """The installed interpreter behaves as the docstring above says, and afterwards as before."""
    handle, np_dtype, obstacle = interpreter.TensorHandle, interpreter._get_np_dtype, dispatch.obstacle_to_triton
    validate = handle.__post_init__

    def hold(self: Any) -> None:
        if is_bf16(self):
            assert np.issubdtype(self.data.dtype, np.floating), "the memory of a bf16 value, not the value"
            self.data = rounded(self.data, BF16_BITS)
        else:
            validate(self)

    def np_dtype_of(dtype: Any) -> np.dtype[Any]:
        return np.dtype(np.float32) if dtype.scalar == tl.bfloat16 else np_dtype(dtype)

    def obstacle_to_half(x: Tensor, weight: Tensor) -> str | None:
        return obstacle(x.view(torch.float16) if x.dtype == torch.bfloat16 else x, weight)

    with (
        patch.object(handle, "__post_init__", hold),
        patch.object(interpreter, "_get_np_dtype", np_dtype_of),
        patch.object(dispatch, "obstacle_to_triton", obstacle_to_half),
        builder_with(FaithfulBuilder),
    ):
        yield


def to_tf32(argument: Any) -> Any:
    """An fp32 tensor rounded to tf32, anything else as it is."""
    if not isinstance(argument, Tensor) or argument.dtype != torch.float32:
        return argument
    return torch.from_numpy(rounded(argument.detach().cpu().numpy(), TF32_BITS)).to(argument.device)


def in_tf32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of rounded tensors."""

    def of_rounded(*arguments: Any, **options: Any) -> Tensor:
        return function(*map(to_tf32, arguments), **options)

    return of_rounded


@contextmanager
def convolutions_in_tf32() -> Iterator[None]:
    """The convolutions that `kernels/` asks torch for round fp32 operands to tf32; fp64 ones stay exact."""
    functional = SimpleNamespace(conv2d=in_tf32(F.conv2d), conv_transpose2d=in_tf32(F.conv_transpose2d))
    with (
        patch.object(reference, "F", functional),
        patch.object(torch_path, "F", functional),
        patch.object(cudnn, "F", functional),
        patch.object(torch_path, "weight_correlation", in_tf32(torch_path.weight_correlation)),
    ):
        yield
