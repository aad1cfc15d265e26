"""The configurations of `step_sizes` that the compile check compiles: shapes are data to its kernels."""

from collections.abc import Iterator
from typing import Any

from sdnet.bench.compile_check.compile_case import CompileCase
from sdnet.kernels.triton_path import lanczos
from sdnet.kernels.triton_path.step_sizes import (
    ATOMS,
    CHANNELS,
    CHUNK,
    NARROW,
    PIXELS,
    PROJECTED,
    REDUCTION,
    SPAN,
    TILE,
    WIDE,
)


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Yield the kernels of the step sizes; no choice depends on the architecture."""
    del arch
    pointers = {"owner_ptr": "*i64", "table_ptr": "*i64"}
    floor, element = {"floor": "fp32"}, {"BLOCK": CHUNK}
    means = {"BC": CHANNELS, "BP": TILE, "SPAN": SPAN}
    plain: list[tuple[str, Any, dict[str, str], dict[str, int], dict[str, Any]]] = [
        ("project", lanczos.project_kernel, pointers | floor, {}, {"BLOCK": PROJECTED}),
        ("mean", lanczos.mean_kernel, pointers, {}, means),
        ("start", lanczos.start_kernel, pointers, {"source": 0}, element | {"BC": CHANNELS}),
        ("extend", lanczos.extend_kernel, pointers, {"j": 3}, element),
        ("combine", lanczos.combine_kernel, pointers, {}, element),
        ("remove", lanczos.remove_kernel, pointers, {}, element),
        ("finish", lanczos.finish_kernel, pointers | floor, {}, element),
        ("step", lanczos.step_kernel, {"table_ptr": "*i64", "safety": "fp32"} | floor, {}, element),
    ]
    for first in (True, False):
        constexprs = {"FIRST": first, "BK": ATOMS, "BC": CHANNELS}
        plain.append((f"pattern, first {first}", lanczos.pattern_kernel, pointers, {"source": 0}, constexprs))
    for name, kernel, types, integers, constexprs in plain:
        yield CompileCase.of(name, kernel, types, integers, constexprs, tensor_cores=False)
    blocks = {"BM": PIXELS, "BK": REDUCTION, "PRECISION": "tf32"}
    yield CompileCase.of("analysis", lanczos.analysis_kernel, pointers, {"j": 2}, blocks | {"BN": WIDE})
    for block in (NARROW, WIDE):
        name = f"synthesis {block} channels"
        yield CompileCase.of(name, lanczos.synthesis_kernel, pointers, {"j": 2}, blocks | {"BN": block})
