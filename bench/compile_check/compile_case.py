"""What a kernel file tells the compile check: every configuration that its launcher can choose.

Each kernel module offers `compile_cases(arch) -> Iterator[CompileCase]`, and `compile_check` compiles them all without
a GPU. A case must name what the launcher would pass, or the code that is checked is not the code that runs:
`CompileCase.of` specialises integers by their value as Triton does at a launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""The types that kernels are compiled for, by Triton's names, and their bytes. fp32 multiplies in tf32."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with one set of compile-time choices.

    Attributes:
        name: kernel, layer, type and tile, as the table shows them; unique.
        kernel: the function under `triton.jit`.
        signature: the types of the arguments at run time ("*bf16", "i32", "fp32", "tensordesc<bf16[1, 64]>"); every
            argument that is not named here is a constexpr.
        constexprs: their values.
        divisible: arguments known to be multiples of 16, pointers among them.
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

    @staticmethod
    def of(
        name: str,
        kernel: Any,
        types: Mapping[str, str],
        integers: Mapping[str, int],
        constexprs: Mapping[str, Any],
        num_warps: int = 4,
        num_stages: int = 3,
        tensor_cores: bool = True,
    ) -> "CompileCase":
        """The case of a launch with pointers, descriptors and floats of these types and these integers.

        As at a launch, an integer of 1 becomes a constexpr, one of 2^31 and more is 64-bit, and multiples of 16 are
        known to be such; pointers are aligned.
        """
        ones = {argument: value for argument, value in integers.items() if value == 1}
        others = {argument: value for argument, value in integers.items() if value != 1}
        signature = dict(types) | {argument: "i64" if v >= 2**31 else "i32" for argument, v in others.items()}
        divisible = [argument for argument, kind in types.items() if kind.startswith("*")]
        divisible += [argument for argument, value in others.items() if value % 16 == 0]
        constants = dict(constexprs) | ones
        return CompileCase(name, kernel, signature, constants, tuple(divisible), num_warps, num_stages, tensor_cores)
