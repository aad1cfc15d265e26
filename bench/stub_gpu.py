"""A GPU that is not there: launches of Triton kernels are recorded instead of run, and nothing is compiled.

It shows what a launch costs the host, how many there are, and how many kernels a GPU would have to compile for them.
Python runs all that it runs for a GPU, up to the C functions of Triton that make a descriptor and launch a kernel.
Triton's interpreter must be off. The launcher is Triton 3.7's.
"""

from types import SimpleNamespace
from typing import Any

import triton
import triton.backends.nvidia.driver as nvidia
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from sdnet.kernels.triton_path import hardware
from sdnet.train.errors import UserError

PROCESSORS = 132
"""Multiprocessors of the GPU: an H100's."""

TENSOR_MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1], "fp4_padded": False}
METADATA = {
    "num_ctas": 1,
    "global_scratch_size": 0,
    "global_scratch_align": 1,
    "profile_scratch_size": 0,
    "profile_scratch_align": 1,
    "launch_cooperative_grid": False,
    "launch_pdl": False,
}
"""What the launcher reads of a kernel."""


class StubGpu:
    """Stands for Triton's driver of a GPU.

    Attributes:
        launches: the name of the kernel, its grid and its arguments, of each launch since `clear`.
        compilations: the kernels that were compiled since `clear`, one for each set of specialisations.
        keeps_arguments: whether launches are recorded; else they are counted by their kernel alone.
    """

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.launches: list[tuple[str, tuple[int, int], Any]] = []
        self.compilations: list[str] = []
        self.keeps_arguments = True

    def get_current_device(self) -> int:
        """Return the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        del device
        return 0

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return self.target

    @property
    def utils(self) -> "StubGpu":
        """The C functions of the driver, which this class stands for too."""
        return self

    def build_signature_metadata(self, signature: Any) -> bytes:
        """Return what a launcher keeps of the signature."""
        del signature
        return b""

    def fill_tma_descriptor_tiled(self, address: int, *description: Any) -> Any:
        """Return what stands for a descriptor: its address and sizes."""
        return address, *(tuple(part) if isinstance(part, list) else part for part in description)

    def launch(self, *arguments: Any) -> None:
        """Record a launch. The first three arguments are the grid, the fifth is the kernel, the last holds its own."""
        self.launches.append((arguments[4], arguments[:2], arguments[-1] if self.keeps_arguments else None))

    def clear(self) -> None:
        """Forget all launches and compilations."""
        self.launches.clear()
        self.compilations.clear()


def compiled_stub(gpu: StubGpu, kernel: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
    """Return what stands for a compiled kernel, with Triton's own launcher.

    It takes the arguments of `JITFunction._do_compile`.
    """
    constants, options, attributes, _ = rest
    descriptors = sum(isinstance(kind, str) and kind.startswith("tensordesc") for kind in signature.values())
    metadata = SimpleNamespace(**METADATA, tensordesc_meta=[TENSOR_MAP] * descriptors)
    launcher = nvidia.CudaLauncher(ASTSource(kernel, signature, constants, attributes), metadata)
    compiled = SimpleNamespace(
        run=launcher, function=kernel.__name__, packed_metadata=None, launch_metadata=lambda *arguments: None
    )
    kernel.device_caches[device][0][key] = compiled
    gpu.compilations.append(f"{kernel.__name__} {key} {options.num_warps}")
    return compiled


def use_stub_gpu(arch: int = 90, processors: int = PROCESSORS) -> StubGpu:
    """Launch Triton kernels of this process on a stub from now on, chosen as on a GPU of this architecture.

    Kernels keep what they were launched on, so a process that has used the stub can launch no kernel on a GPU.

    Raises:
        UserError: This version of Triton has another launcher.
    """
    if not hasattr(nvidia, "PyKernelArg"):
        raise UserError(
            f"A stub of a GPU needs the launcher of Triton 3.7; Triton {triton.__version__} has another one."
        )
    gpu = StubGpu(arch)

    def compile_stub(kernel: Any, *arguments: Any) -> Any:
        return compiled_stub(gpu, kernel, *arguments)

    nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = 0, 1, 2
    nvidia.PyKernelArg = SimpleNamespace
    JITFunction._do_compile = compile_stub  # pyright: ignore[reportAttributeAccessIssue]
    hardware.arch_of = lambda device: arch
    hardware.processors_of = lambda device: processors
    driver.set_active(gpu)  # pyright: ignore[reportArgumentType]
    return gpu
