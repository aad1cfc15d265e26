"""Launches without Triton's search for the compiled kernel.

Before each launch `triton.jit` binds the arguments by name, works out what the kernel is specialised for, and looks up
the compiled kernel. This takes the host longer than a small kernel takes on the GPU. `launch` keeps each compiled
kernel by a key that Python makes more quickly. The key holds all that Triton specialises a kernel for: the type of
every tensor and whether its address is a multiple of 16, the blocks of every descriptor, integers, and constants.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from triton import JITFunction, knobs
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

MOST_KEPT = 4096
"""Kept kernels; with more, all are given up. Triton keeps its own."""

NONE: Mapping[str, int] = {}

kept_kernels: dict[Any, Any] = {}

places_of_kernels: dict[int, tuple[int, ...]] = {}


def trait(argument: Any) -> Any:
    """Return what a kernel is compiled for of an argument."""
    kind = type(argument)
    if kind is TensorDescriptor:
        return argument.base.dtype, tuple(argument.block_shape)
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return float if kind is float else argument


def has_hooks(kernel: JITFunction[Any]) -> bool:
    """Return whether somebody watches launches, as profilers do."""
    chains = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(kernel.pre_run_hooks) or any(getattr(chain, "calls", chain) for chain in chains)


def unspecialised(kernel: JITFunction[Any]) -> tuple[int, ...]:
    """Return the places of the integers that a kernel is not compiled for."""
    places = places_of_kernels.get(id(kernel))
    if places is None:
        names = [name for name in kernel.do_not_specialize if name in kernel.arg_names]
        places = places_of_kernels[id(kernel)] = tuple(kernel.arg_names.index(name) for name in names)
    return places


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, int] = NONE) -> None:
    """Do what `kernel[grid](*arguments, **options)` does.

    Args:
        kernel: a function under `triton.jit`. Anything else, as the interpreter's functions, is called as it is.
        grid: the launch grid, of one or two axes.
        arguments: all arguments of the kernel in their order, constants too.
        options: num_warps and num_stages; none for Triton's defaults.
    """
    if not isinstance(kernel, JITFunction) or has_hooks(kernel):
        kernel[grid](*arguments, **options)
        return
    active: Any = driver.active
    device = active.get_current_device()
    traits = [trait(argument) for argument in arguments]
    for place in unspecialised(kernel):
        traits[place] = arguments[place] < 2**31
    key = (id(kernel), device, *options.values(), *traits)
    compiled = kept_kernels.get(key)
    if compiled is None:
        if len(kept_kernels) >= MOST_KEPT:
            kept_kernels.clear()
        kept_kernels[key] = kernel[grid](*arguments, **options)
        return
    stream = active.get_current_stream(device)
    rows, columns = grid if len(grid) == 2 else (grid[0], 1)
    compiled.run(rows, columns, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
