"""The configurations of `step_sizes` that the compile check compiles: shapes are data to its kernels."""

from collections.abc import Iterator

from sdnet.bench.compile_check.compile_case import CompileCase
from sdnet.kernels.triton_path.step_sizes import (
    CHUNK,
    NARROW,
    PIXELS,
    REDUCTION,
    WIDE,
    analysis_kernel,
    finish_kernel,
    project_kernel,
    synthesis_kernel,
)


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """The kernels of this file: shapes are data to them."""
    del arch
    pointers = {"owner_ptr": "*i64", "table_ptr": "*i64"}
    blocks = {"BM": PIXELS, "BK": REDUCTION, "PRECISION": "tf32"}
    floats = {"floor": "fp32", "safety": "fp32"}
    yield CompileCase.of(
        "project", project_kernel, pointers | {"floor": "fp32"}, {}, {"BLOCK": 1024}, tensor_cores=False
    )
    yield CompileCase.of("analysis", analysis_kernel, pointers, {}, blocks | {"BN": WIDE})
    for block in (NARROW, WIDE):
        yield CompileCase.of(f"synthesis {block} channels", synthesis_kernel, pointers, {}, blocks | {"BN": block})
    constexprs = {"BLOCK": CHUNK, "PARTS": 1024}
    yield CompileCase.of("finish", finish_kernel, pointers | floats, {}, constexprs, tensor_cores=False)
