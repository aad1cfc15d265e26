"""The configurations of the pointwise kernels that the compile check compiles."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from sdnet.bench.compile_check.compile_case import DTYPES, EVERY_LAYER_ON, CompileCase
from sdnet.kernels.triton_path.pointwise import BLOCK, mask_kernel, shrink_step_kernel, subtract_kernel


def compile_cases(arch: int) -> Iterator[CompileCase]:
    """Every combination of the flags, in every type."""
    names = ("CODES", "MOMENTUM", "PER_SAMPLE", "NONNEGATIVE")
    for dtype in DTYPES if arch in EVERY_LAYER_ON else ("bf16",):
        for flags in product((False, True), repeat=4):
            chosen: dict[str, Any] = dict(zip(names, flags, strict=True))
            if chosen["CODES"] or not chosen["MOMENTUM"]:
                yield pointwise_case(shrink_step_kernel, dtype, chosen)
        for copies in (1, 2):
            yield pointwise_case(subtract_kernel, dtype, {"COPIES": copies})
        for minus in (False, True):
            yield pointwise_case(mask_kernel, dtype, {"MINUS": minus})


def pointwise_case(kernel: Any, dtype: str, chosen: dict[str, Any]) -> CompileCase:
    """A kernel of this file with the given flags."""
    scalars = {"step_size_ptr": "*fp32", "lam_ptr": "*fp32", "beta": "fp32", "mu": "fp32"}
    integers = {"numel": 2**25, "sample": 2**17, "inner": 64}
    names = set(kernel.arg_names)
    types = {name: scalars.get(name, f"*{dtype}") for name in kernel.arg_names if name in scalars or "_ptr" in name}
    text = " ".join(f"{name.lower()}={int(value)}" for name, value in chosen.items())
    return CompileCase.of(
        f"{kernel.__name__.removesuffix('_kernel')} {text} {dtype}",
        kernel,
        types,
        {name: value for name, value in integers.items() if name in names},
        chosen | {"BLOCK": BLOCK},
        tensor_cores=False,
    )
