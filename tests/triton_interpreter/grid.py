"""Run a few programs of a launch under Triton's interpreter, and check the addresses that they access.

An overflow of 32-bit offsets in a tensor of more than 2^31 elements shows in the last programs of a launch, and memory
that no program touches costs nothing. Inside `only(select)` a launch runs the programs that `select` chooses from its
grid. They see the original grid: the executor receives a grid of as many programs as were chosen, and the builder
translates their indices. An integer that leaves 32 bits is an error, and so is an access outside the tensors of the
launch, which would otherwise read other memory or end the process. Tensors must be on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .numerics import builder_with, interpreter, refuse_untested_version

Index = tuple[int, int, int]
Select = Callable[[str, Index], Sequence[Index]]
"""Chooses the programs to run, given the name of a kernel and its grid."""


def last(programs: int) -> Select:
    """Choose the last programs along the first axis of the grid, at every position of the other axes."""

    def select(_: str, grid: Index) -> list[Index]:
        first = max(0, grid[0] - programs)
        return [(x, y, z) for x in range(first, grid[0]) for y in range(grid[1]) for z in range(grid[2])]

    return select


def extent(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the address after its last element."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.itemsize


class ChosenPrograms(interpreter.InterpreterBuilder):
    """Give the chosen programs their original indices, and check every address that they access."""

    grid: Index
    chosen: Sequence[Index]
    extents: set[tuple[int, int]]

    def set_grid_dim(self, *_: int) -> None:
        super().set_grid_dim(*self.grid)

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(*self.chosen[x])

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        self.check(ptrs, mask)
        return super().create_masked_load(ptrs, mask, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        self.check(ptrs, mask)
        return super().create_masked_store(ptrs, value, mask, *options)

    def check(self, ptrs: Any, mask: Any) -> None:
        addresses = ptrs.data[np.broadcast_to(np.asarray(mask.data, dtype=bool), ptrs.data.shape)]
        known = np.zeros(addresses.shape, dtype=bool)
        for first, end in self.extents:
            known |= (addresses >= first) & (addresses < end)
        assert known.all(), "an access outside the tensors of the launch"


@contextmanager
def only(select: Select) -> Iterator[None]:
    """Restrict every launch to the chosen programs, as the head of this file says.

    Raises:
        RuntimeError: If the installed version of Triton was not tested.
    """
    refuse_untested_version()
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def run_chosen(executor: Any, *args: Any, **kwargs: Any) -> Any:
        x, y, z, *_ = *executor.grid, 1, 1
        bases = [each.base if isinstance(each, TensorDescriptor) else each for each in (*args, *kwargs.values())]
        chosen = type(builder)
        chosen.grid, chosen.chosen = (x, y, z), select(executor.fn.__name__, (x, y, z))
        chosen.extents = {extent(base) for base in bases if isinstance(base, Tensor)}
        executor.grid = (len(chosen.chosen),)
        return run(executor, *args, **kwargs)

    checking = replace(builder.options, debug=True)  # checks integers for overflow
    with (
        builder_with(ChosenPrograms),
        patch.object(interpreter.GridExecutor, "__call__", run_chosen),
        patch.object(builder, "options", checking),
    ):
        yield
