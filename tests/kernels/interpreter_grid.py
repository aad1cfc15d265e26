"""Some programs of a launch alone, under Triton's interpreter, with an eye on their addresses.

What a kernel does at the far end of a tensor of billions of elements shows in its last programs, and memory that nobody
touches costs nothing. Within `only(select)` a launch runs the programs that `select` takes from its grid, which they
see as it is: the executor is given a grid of as many programs, and the builder translates their indices. Integers that
leave their 32 bits are an error, as is an access outside of the launch's tensors, which would otherwise be read, or
kill the process. Tensors lie on the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .interpreter_numerics import builder_with, interpreter

Index = tuple[int, int, int]
Select = Callable[[str, Index], Sequence[Index]]
"""The programs to run, from a kernel's name and its grid."""


def last(programs: int) -> Select:
    """The last programs along the first axis of the grid, in all its other places."""

    def select(_: str, grid: Index) -> list[Index]:
        first = max(0, grid[0] - programs)
        return [(x, y, z) for x in range(first, grid[0]) for y in range(grid[1]) for z in range(grid[2])]

    return select


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor's memory and the one after its last."""
    elements = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.itemsize


class ChosenPrograms(interpreter.InterpreterBuilder):
    """The indices of the chosen programs, and the addresses they may touch."""

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
        assert known.all(), "an access outside of the launch's tensors"


@contextmanager
def only(select: Select) -> Iterator[None]:
    """Launches run the chosen programs, as the docstring above says; afterwards all, as before."""
    builder, run = interpreter.interpreter_builder, interpreter.GridExecutor.__call__

    def run_chosen(executor: Any, *args: Any, **kwargs: Any) -> Any:
        x, y, z, *_ = *executor.grid, 1, 1
        bases = [each.base if isinstance(each, TensorDescriptor) else each for each in (*args, *kwargs.values())]
        chosen = type(builder)
        chosen.grid, chosen.chosen = (x, y, z), select(executor.fn.__name__, (x, y, z))
        chosen.extents = {extent(base) for base in bases if isinstance(base, Tensor)}
        executor.grid = (len(chosen.chosen),)
        return run(executor, *args, **kwargs)

    watching = replace(builder.options, debug=True)  # in which integers are watched
    with (
        builder_with(ChosenPrograms),
        patch.object(interpreter.GridExecutor, "__call__", run_chosen),
        patch.object(builder, "options", watching),
    ):
        yield
