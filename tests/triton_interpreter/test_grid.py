"""Tests of `only`: exactly the chosen programs run, and accesses or integers out of range are errors."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import Index, last, only
from .numerics import faithful, interpreter, needs_interpreter

pytestmark = needs_interpreter

jit: Any = triton.jit


@jit
def write_kernel(out_ptr, N: tl.constexpr):
    """out[x, y] = x of how many."""
    x, y = tl.program_id(0), tl.program_id(1)
    tl.store(out_ptr + x * N + y, x * 100 + tl.num_programs(0))


@jit
def read_kernel(x_ptr, out_ptr, shift, limit, factor):
    e = tl.arange(0, 4)
    tl.store(out_ptr + e, tl.load(x_ptr + e + shift * factor, mask=e < limit, other=0.0))


def written() -> Tensor:
    out = torch.zeros(5, 2, dtype=torch.int32)
    write_kernel[(5, 2)](out, N=2)
    return out


def read(shift: int, limit: int, factor: int = 1) -> Tensor:
    memory, out = torch.arange(12.0), torch.empty(4)
    read_kernel[(1,)](memory[4:8], out, shift, limit, factor)
    return out


def test_the_last_programs_run_and_see_the_original_grid() -> None:
    with only(last(2)):
        found = written()
    torch.testing.assert_close(found[:, 0].tolist(), [0, 0, 0, 305, 405])
    assert torch.equal(found[:, 0], found[:, 1])
    assert written().all()


def test_programs_can_be_chosen_by_kernel_and_grid() -> None:
    def select(kernel: str, grid: Index) -> list[Index]:
        assert (kernel, grid) == ("write_kernel", (5, 2, 1))
        return [(1, 1, 0), (0, 0, 0)]

    with only(select):
        assert written().nonzero().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("shift", [-1, 1])
def test_an_access_outside_the_tensors_is_an_error(shift: int) -> None:
    read(shift, 4)  # without `only`, neighbouring memory is read
    with only(last(1)):
        assert read(1, 3).tolist() == [5, 6, 7, 0]
        with pytest.raises(interpreter.InterpreterError, match="an access outside the tensors of the launch"):
            read(shift, 4)


def test_an_integer_past_32_bits_is_an_error() -> None:
    with only(last(1)), pytest.raises(interpreter.InterpreterError, match="int32 overflow detected"):
        read(2**16, 0, factor=2**15)


def test_only_and_faithful_can_be_combined() -> None:
    for first, second in ((faithful(), only(last(2))), (only(last(2)), faithful())):
        with first, second:
            found = torch.zeros(5, 2, dtype=torch.bfloat16)
            write_kernel[(5, 2)](found, N=2)
        assert found[:, 0].tolist() == [0, 0, 0, 304, 404]  # 305 and 405 rounded


def test_only_restores_the_interpreter() -> None:
    builder = interpreter.interpreter_builder
    before = type(builder), builder.options, interpreter.GridExecutor.__call__
    with only(last(1)):
        assert type(builder) is not before[0]
    assert (type(builder), builder.options, interpreter.GridExecutor.__call__) == before
