"""What a verdict depends on: the call as its kernels see it, the flags of PyTorch, and the machine.

Batches are grouped into classes: the class of a batch is the least power of two that is at least as large.
"""

import hashlib
import json
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.reference import Pair
from sdnet.kernels.step_sizes import DictionaryState
from sdnet.kernels.torch_path import Problem

Machine = dict[str, Any]
"""The facts of a machine, by name; their values are strings and numbers."""

INTERPRETER = "Triton's interpreter"

KERNELS = Path(__file__).resolve().parents[1]

SOURCES = ("triton_path", "torch_path.py", "reference.py", "step_sizes.py")
"""The files and folders whose text decides what kernels compute, and how fast."""


def batch_class(batch: int) -> int:
    """Return the class of a batch: the least power of two that is at least `batch`."""
    return 1 << max(batch - 1, 0).bit_length()


class Call(NamedTuple):
    """A call of the operator, as its kernels see it.

    Attributes:
        channels: channels of the dictionary's atoms, n_dict C.
        atoms: number of atoms.
        kernel_size: height and width of the atoms.
        stride: vertical and horizontal stride.
        padding: vertical and horizontal padding.
        image_size: height and width of the images.
        batch: number of images.
        dtype: the type of images, dictionary and codes, such as "bfloat16".
        channels_last: the memory format.
        n_steps: see `Coding`.
        solver: see `Coding`.
        data_term: see `Coding`.
        nonnegative: see `Coding`.
        has_mu: whether mu is above 0.
        n_dict: see `Coding`.
        lam_per_sample: whether lambda has one value per sample.
    """

    channels: int
    atoms: int
    kernel_size: Pair
    stride: Pair
    padding: Pair
    image_size: Pair
    batch: int
    dtype: str
    channels_last: bool
    n_steps: int = 2
    solver: str = "fista"
    data_term: str = "squared"
    nonnegative: bool = True
    has_mu: bool = False
    n_dict: int = 1
    lam_per_sample: bool = False

    @staticmethod
    def of(x: Tensor, weight: Tensor, problem: Problem, layout: torch.memory_format) -> "Call":
        """Return the call of these tensors."""
        (atoms, channels, *kernel_size), coding = weight.shape, problem.coding
        return Call(
            channels=channels,
            atoms=atoms,
            kernel_size=(kernel_size[0], kernel_size[1]),
            stride=problem.stride,
            padding=problem.padding,
            image_size=(x.shape[2], x.shape[3]),
            batch=x.shape[0],
            dtype=str(x.dtype).removeprefix("torch."),
            channels_last=layout == torch.channels_last,
            n_steps=coding.n_steps,
            solver=coding.solver,
            data_term=coding.data_term,
            nonnegative=coding.nonnegative,
            has_mu=coding.mu != 0,
            n_dict=coding.n_dict,
            lam_per_sample=problem.lam.ndim > 0,
        )

    @property
    def layer(self) -> str:
        """The call without its batch, as tables show it."""
        sides = [f"{a}x{b}" for a, b in (self.kernel_size, self.stride, self.padding, self.image_size)]
        layer = f"{self.channels}->{self.atoms} {sides[0]} stride {sides[1]} padding {sides[2]} @ {sides[3]}"
        memory = "channels_last" if self.channels_last else "contiguous"
        options = [f"{self.n_steps} steps of {self.solver}", "z >= 0" if self.nonnegative else "signed"]
        options += ["norm"] * (self.data_term == "norm") + ["mu"] * self.has_mu
        options += [f"n_dict {self.n_dict}"] * (self.n_dict > 1) + ["lambda per sample"] * self.lam_per_sample
        return f"{layer} {self.dtype} {memory}, {', '.join(options)}"

    def key(self, flags: "Flags", batch: int | None = None) -> str:
        """Return the key of the call's verdict, for its own batch class or that of another batch."""
        to = batch_class(self.batch if batch is None else batch)
        return f"{self.layer}, batches to {to}, {flags.text(self.dtype == 'float32')}"

    def encoded(self) -> list[Any]:
        """Return the call as a list that `json` can write."""
        return list(self)

    @staticmethod
    def decoded(values: Sequence[Any]) -> "Call":
        """Return the call that `encoded` described."""
        pairs: list[Any] = [tuple(value) if isinstance(value, list) else value for value in values]
        return Call(*pairs)


class Update(NamedTuple):
    """An update of the dictionaries of a network, as its kernels see it.

    Attributes:
        layers: for each dictionary channels, atoms, size of the atoms, stride, padding, size of the images, and whether
            dictionary and power vector are channels_last; sorted.
    """

    layers: tuple[tuple[Any, ...], ...]

    @staticmethod
    def of(dictionaries: Sequence[DictionaryState]) -> "Update":
        """Return the update of these dictionaries, of type fp32."""
        rows = []
        for weight, power_vector, _, stride, padding in dictionaries:
            atoms, channels, height, width = weight.shape
            size = (power_vector.shape[2], power_vector.shape[3])
            formats = (not weight.is_contiguous(), not power_vector.is_contiguous())
            rows.append((channels, atoms, (height, width), tuple(stride), tuple(padding), size, *formats))
        return Update(tuple(sorted(rows)))

    def key(self, flags: "Flags") -> str:
        """Return the key of the update's verdict."""
        digest = hashlib.sha256(json.dumps(self.layers).encode()).hexdigest()[:12]
        return f"update of {len(self.layers)} dictionaries {digest}, {flags.text(precision=True)}"

    def encoded(self) -> list[Any]:
        """Return the update as a list that `json` can write."""
        return [list(row) for row in self.layers]

    @staticmethod
    def decoded(rows: Sequence[Sequence[Any]]) -> "Update":
        """Return the update that `encoded` described."""
        return Update(tuple(tuple(tuple(v) if isinstance(v, list) else v for v in row) for row in rows))


class Flags(NamedTuple):
    """The flags of PyTorch that choose algorithms.

    Attributes:
        convolutions: the precision of fp32 convolutions, "tf32" or "ieee".
        products: the precision of fp32 matrix products, "tf32" or "ieee".
        benchmark: whether cuDNN times its algorithms.
        deterministic: whether deterministic algorithms are asked for, of cuDNN or of all operators.
        enabled: whether cuDNN is used at all.
    """

    convolutions: str
    products: str
    benchmark: bool
    deterministic: bool
    enabled: bool = True

    @staticmethod
    def now() -> "Flags":
        """Return the flags of this process."""
        cudnn: Any = torch.backends.cudnn
        matmul: Any = torch.backends.cuda.matmul
        return Flags(
            convolutions="tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee",
            products="tf32" if matmul.fp32_precision == "tf32" else "ieee",
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic or torch.are_deterministic_algorithms_enabled(),
            enabled=cudnn.enabled,
        )

    def set(self) -> None:
        """Set the flags of this process."""
        cudnn: Any = torch.backends.cudnn
        matmul: Any = torch.backends.cuda.matmul
        cudnn.conv.fp32_precision, matmul.fp32_precision = self.convolutions, self.products
        cudnn.benchmark, cudnn.deterministic, cudnn.enabled = self.benchmark, self.deterministic, self.enabled

    def text(self, precision: bool) -> str:
        """Return what a key says of the flags; `precision` includes that of fp32 convolutions."""
        words = [self.convolutions] * precision + ["cudnn.benchmark" if self.benchmark else "no cudnn.benchmark"]
        return ", ".join([*words, *["deterministic"] * self.deterministic, *["without cuDNN"] * (not self.enabled)])


@cache
def machine_of(device: torch.device) -> Machine:
    """Return the facts of a device and its software on which verdicts depend.

    On a CPU they are those of Triton's interpreter, which can stand for a device.
    """
    facts: Machine = {"gpu": INTERPRETER, "capability": "0.0", "multiprocessors": 1, "memory_mib": 0, "driver": ""}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts = {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_mib": gpu.total_memory >> 20,
            "driver": driver_version() or "unknown",
        }
    return facts | {
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": installed_version("triton"),
        "kernels": source_hash(),
    }


@cache
def digest_of(device: torch.device) -> str:
    """Return a short name of `machine_of(device)`."""
    return digest(machine_of(device))


def digest(machine: Machine) -> str:
    """Return a short name of a machine: equal facts have equal names."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]


@cache
def source_hash() -> str:
    """Return a hash of the sources of the kernels."""
    total = hashlib.sha256()
    for name in SOURCES:
        path = KERNELS / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            total.update(file.relative_to(KERNELS).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def driver_version() -> str | None:
    """Return the version of the NVIDIA driver; None if neither the driver nor `nvidia-smi` tells it."""
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found.group()
    except OSError:
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout
        return output.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def installed_version(package: str) -> str:
    """Return the version of a package; "none" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
