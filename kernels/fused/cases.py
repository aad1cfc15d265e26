"""What a kernel file tells the compile check: every configuration that its launcher can choose.

Each kernel module offers `compile_cases(arch) -> Iterator[CompileCase]`, and `compile_check` compiles them all without
a GPU. A case must name what the launcher would pass: unit strides as constexprs, and in `divisible` the arguments that
are multiples of 16 (pointers among them), or the code that is checked is not the code that runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = ("bf16", "fp16", "fp32")
"""Triton's names of the types that are compiled for; fp32 stands for tf32 multiplication."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of compile-time choices.

    Attributes:
        name: kernel, layer, type and tile, as the table shows them; unique.
        kernel: the function under `triton.jit`.
        signature: the types of the arguments at run time ("*bf16", "i32", "fp32", "tensordesc<bf16[1, 64]>"); every
            argument that is not named here is a constexpr.
        constexprs: their values.
        divisible: arguments known to be multiples of 16.
        num_warps, num_stages: options of the launch.
        tensor_cores: whether the code must hold matrix instructions.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = True
