"""What the compile check compiles: a kernel with the arguments of one launch, and how launches are recorded.

`recorded` replaces the kernels of a module by recorders, so that the launchers themselves say what they would launch:
on tensors of the meta device, for a GPU that need not be there. Triton's own binder turns the arguments into the types,
constants and alignments that the kernel is compiled for.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile, make_backend
from triton.runtime.jit import create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from sdnet.kernels.triton_path import hardware
from sdnet.kernels.triton_path.tiles import Tile

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The types that kernels are compiled for, by Triton's names. fp32 multiplies in tf32."""

EVERY_LAYER = ("bf16", "fp32")
"""The types that every layer is compiled for; fp16 differs from bf16 in the type of the instructions alone."""

POINTERS = {**DTYPES, "i32": torch.int32, "i64": torch.int64}
"""What a pointer may point to."""

EVERY_LAYER_ON = (80, 90)
"""The architectures that every layer is compiled for."""

PROCESSORS = 132
"""Multiprocessors of the GPU that launches are recorded for: an H100's."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel with the arguments of one launch.

    Attributes:
        name: kernel, layer, type and tile, as the report shows them; unique.
        kernel: the function under `triton.jit`.
        arguments: the arguments by name; tensors of the meta device stand for pointers.
        options: of the launch, `num_warps` and `num_stages`.
        tensor_cores: whether the code must hold matrix instructions.
    """

    name: str
    kernel: Any
    arguments: Mapping[str, Any]
    options: Mapping[str, int] = field(default_factory=dict)
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
        """Return the case of a launch with pointers ("*bf16") and floats ("fp32") of these types and these integers."""
        values = {argument: _value_of(kind) for argument, kind in types.items()}
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return CompileCase(name, kernel, {**values, **integers, **constexprs}, options, tensor_cores)

    @property
    def tile(self) -> Tile | None:
        """The tile among the arguments, if there is one."""
        return next((value for value in self.arguments.values() if isinstance(value, Tile)), None)

    @property
    def in_bf16(self) -> bool:
        """Whether an operand is in bf16."""
        operands = (v.base if isinstance(v, TensorDescriptor) else v for v in self.arguments.values())
        return any(isinstance(operand, Tensor) and operand.dtype == torch.bfloat16 for operand in operands)

    def source(self, arch: int) -> ASTSource:
        """Return what a launch on sm_`arch` would compile."""
        backend = make_backend(GPUTarget("cuda", arch, 32))
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, rest = bind(**self.arguments)
        _, *parts = self.kernel._pack_args(backend, rest, bound, specialization, rest)
        return ASTSource(self.kernel, *parts)

    def key(self, arch: int) -> str:
        """Return a digest of all that the compiled code depends on."""
        parts = [self.source(arch).hash(), arch, sorted(self.options.items()), self.tensor_cores, triton.__version__]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def compiled(self, arch: int) -> CompiledKernel:
        """Return the kernel compiled for sm_`arch`."""
        return compile(self.source(arch), target=GPUTarget("cuda", arch, 32), options=dict(self.options))


def _value_of(kind: str) -> Any:
    """Return an argument of a type."""
    return torch.empty(1, dtype=POINTERS[kind[1:]], device="meta") if kind.startswith("*") else 0.5


class Recorder:
    """Stands for a kernel and keeps the arguments of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[tuple[dict[str, Any], dict[str, int]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        del grid

        def launch(*positional: Any, **keywords: Any) -> None:
            options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
            arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | keywords
            self.launches.append((arguments, options))

        return launch


@contextmanager
def recorded(arch: int, *kernels: tuple[ModuleType, str]) -> Iterator[list[Recorder]]:
    """Within, launches of the named kernels of modules are recorded, chosen as on an sm_`arch` GPU."""
    convolutions: Any = torch.backends.cudnn.conv  # pyright: ignore[reportAttributeAccessIssue]
    before = convolutions.fp32_precision
    recorders = [Recorder(getattr(module, name)) for module, name in kernels]
    with ExitStack() as stack:
        for (module, name), recorder in zip(kernels, recorders, strict=True):
            stack.enter_context(patch.object(module, name, recorder))
        stack.enter_context(patch.object(hardware, "arch_of", lambda device: arch))
        stack.enter_context(patch.object(hardware, "processors_of", lambda device: PROCESSORS))
        stack.callback(setattr, convolutions, "fp32_precision", before)
        convolutions.fp32_precision = "tf32"
        yield recorders


def fullest(cases: list[CompileCase]) -> list[CompileCase]:
    """Return the cases of which no other of the same kernel has all operands and more."""

    def present(case: CompileCase) -> set[str]:
        return {name for name, value in case.arguments.items() if value is not None}

    return [
        case
        for case in cases
        if not any(case.kernel is other.kernel and present(case) < present(other) for other in cases)
    ]


def cases_of_launches(recorders: list[Recorder], name: str, tensor_cores: bool = True) -> Iterator[CompileCase]:
    """Return a case for each distinct launch.

    Its name is the kernel's, the given one, the tile, the flags, and the arguments that are None.
    """
    found: dict[str, CompileCase] = {}
    for recorder in recorders:
        for arguments, options in recorder.launches:
            words = [recorder.kernel.__name__.removesuffix("_kernel"), name]
            words += [f"{value.form} {value.sides}" for value in arguments.values() if isinstance(value, Tile)]
            flags = {key: value for key, value in arguments.items() if key.isupper() and isinstance(value, int)}
            flags.pop("N", None)  # the number of images, which is no constant
            words += [f"{key.lower()}={int(value)}" for key, value in flags.items()]
            absent = [key.removesuffix("_ptr") for key, value in arguments.items() if value is None]
            words += [f"without {' '.join(absent)}"] if absent else []
            full = " ".join(words)
            found.setdefault(full, CompileCase(full, recorder.kernel, arguments, options, tensor_cores))
    yield from found.values()
