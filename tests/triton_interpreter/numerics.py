"""bfloat16 and tf32 arithmetic under Triton's interpreter, for the duration of a test.

The interpreters of Triton 3.6 and 3.7 store bfloat16 as uint16 and compute with these integers, and their `tl.dot`
treats tf32 as fp32. Inside `faithful()`

  * a bfloat16 value is held as an fp32 array of the same value between its load and its store, so that NumPy computes
    with values; every TensorHandle of type bfloat16 is rounded when it is created, to nearest, ties to even, which
    covers all operators in one place;
  * a dot of bfloat16 operands has exact products and fp32 sums, as on tensor cores;
  * a dot of fp32 operands with input_precision "tf32" rounds its operands to 10 bits of mantissa, here to nearest, ties
    to even; GPUs round or truncate, depending on the instruction;
  * `csc_encode` accepts bfloat16 with impl="triton", which it otherwise refuses under the interpreter.

Atomics, fp8 together with bfloat16, and conversions to bfloat16 with another rounding mode are refused.

`convolutions_in_tf32()` rounds the operands of torch's convolutions likewise, as cuDNN does and the CPU does not.
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
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor
from triton._C.libtriton import ir  # pyright: ignore[reportMissingImports]
from triton.runtime import interpreter as installed

from sdnet.kernels import dispatch, reference, torch_path
from sdnet.kernels.triton_path import cudnn

interpreter: Any = installed  # its private parts have no type hints

TESTED_TRITON = ("3.6.0", "3.7.1")
"""The versions of Triton whose interpreter these patches were tested with."""

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs interpreted kernels, not compiled ones"
)

TF32_BITS, BF16_BITS = 13, 16
"""Number of mantissa bits that tf32 and bfloat16 have fewer than fp32."""


def refuse_untested_version(version: str = triton.__version__) -> None:
    """Raise if the interpreter of this version of Triton was not tested: the patches replace private functions.

    Raises:
        RuntimeError: If the version is not in `TESTED_TRITON`.
    """
    if version not in TESTED_TRITON:
        raise RuntimeError(
            f"tests/triton_interpreter patches private functions of Triton's interpreter and was tested with Triton "
            f"{' and '.join(TESTED_TRITON)}, not with {version}: add the version to TESTED_TRITON in numerics.py, and "
            "run the tests of that folder."
        )


def rounded(data: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Round fp32 to nearest, ties to even, such that the last `bits` bits of the mantissa are zero."""
    data = np.asarray(data, dtype=np.float32)
    pattern = data.view(np.uint32)
    up = ((pattern >> np.uint32(bits)) & np.uint32(1)) + np.uint32((1 << (bits - 1)) - 1)
    kept = (pattern + up) & np.uint32(2**32 - (1 << bits))
    return np.where(np.isnan(data), np.float32(np.nan), kept.view(np.float32))


def packed(data: NDArray[Any]) -> NDArray[np.uint16]:
    """Return the bfloat16 memory (uint16) of values held as fp32."""
    return (np.asarray(data, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def unpacked(memory: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values of bfloat16 memory (uint16) as fp32."""
    return (memory.astype(np.uint32) << np.uint32(16)).view(np.float32)


def is_bf16(handle: Any) -> bool:
    """Return whether a handle holds bfloat16 values. The result of a comparison has that type, but holds booleans."""
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype != np.bool_


def refuse(what: str, *handles: Any) -> None:
    """Raise NotImplementedError if one of the handles holds bfloat16."""
    if any(is_bf16(handle) for handle in handles):
        raise NotImplementedError(f"{what} with bfloat16 under the interpreter")


class FaithfulBuilder(interpreter.InterpreterBuilder):
    """Override the operations that read the bits or the memory of a value; the others compute with values."""

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
    """Put the methods of a class before those of the interpreter's builder."""
    builder = interpreter.interpreter_builder
    before = builder.__class__
    builder.__class__ = type(methods.__name__, (methods, before), {})
    try:
        yield
    finally:
        builder.__class__ = before


@contextmanager
def faithful() -> Iterator[None]:
    """Make the interpreter compute with bfloat16 and tf32 as the head of this file says.

    Raises:
        RuntimeError: If the installed version of Triton was not tested.
    """
    refuse_untested_version()
    handle, np_dtype, obstacle = interpreter.TensorHandle, interpreter._get_np_dtype, dispatch.obstacle_to_triton
    validate = handle.__post_init__

    def hold(self: Any) -> None:
        if is_bf16(self):
            assert np.issubdtype(self.data.dtype, np.floating), "a bfloat16 handle holds memory (uint16), not values"
            self.data = rounded(self.data, BF16_BITS)
        else:
            validate(self)

    def np_dtype_of(dtype: Any) -> np.dtype[Any]:
        return np.dtype(np.float32) if dtype.scalar == tl.bfloat16 else np_dtype(dtype)

    def obstacle_to_half(x: Tensor, *others: Any) -> str | None:
        return obstacle(x.view(torch.float16) if x.dtype == torch.bfloat16 else x, *others)

    with (
        patch.object(handle, "__post_init__", hold),
        patch.object(interpreter, "_get_np_dtype", np_dtype_of),
        patch.object(dispatch, "obstacle_to_triton", obstacle_to_half),
        builder_with(FaithfulBuilder),
    ):
        yield


def to_tf32(argument: Any) -> Any:
    """Round an fp32 tensor to tf32; return anything else unchanged."""
    if not isinstance(argument, Tensor) or argument.dtype != torch.float32:
        return argument
    return torch.from_numpy(rounded(argument.detach().cpu().numpy(), TF32_BITS)).to(argument.device)


def in_tf32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that rounds its fp32 tensors to tf32 and calls the given one."""

    def of_rounded(*arguments: Any, **options: Any) -> Tensor:
        return function(*map(to_tf32, arguments), **options)

    return of_rounded


@contextmanager
def convolutions_in_tf32() -> Iterator[None]:
    """Round the fp32 operands of the convolutions in `sdnet.kernels` to tf32; fp64 operands stay exact."""
    functional = SimpleNamespace(conv2d=in_tf32(F.conv2d), conv_transpose2d=in_tf32(F.conv_transpose2d))
    with (
        patch.object(reference, "F", functional),
        patch.object(torch_path, "F", functional),
        patch.object(cudnn, "F", functional),
        patch.object(torch_path, "weight_correlation", in_tf32(torch_path.weight_correlation)),
    ):
        yield
