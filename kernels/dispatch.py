"""Which implementation a call takes, and why.

"torch" is the quick loop of `torch_path`, "triton" the kernels of `fused`, behind one custom operator; "reference" is
the undecorated maths of `reference`, for torch.export and for autograd through the loop. "auto" takes triton for CUDA
tensors where it can, and torch otherwise. The environment variable SDNET_IMPL overrides "auto".

Nothing here imports Triton, and a GPU is asked about only when a call brings tensors that lie on it.
"""

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "torch", "reference", "triton"]
IMPLEMENTATIONS = get_args(Impl)
ENVIRONMENT_VARIABLE = "SDNET_IMPL"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the Triton kernels compute in."""

MOST_TAPS = 16
"""The highest and widest atoms of the Triton kernels: a tap is a bit of half a word."""

MOST_ELEMENTS = 2**30
"""The largest sample of codes or images: within one, offsets are of 32 bits."""


class Choice(NamedTuple):
    """An implementation and the sentence that gives the reason for it."""

    impl: Literal["torch", "reference", "triton"]
    reason: str


def requested(impl: str) -> tuple[str, str]:
    """The implementation that is asked for, the environment heard, and by what. ValueError for an unknown one."""
    asked_by = "the argument impl"
    if impl == "auto" and ENVIRONMENT_VARIABLE in os.environ:
        impl, asked_by = os.environ[ENVIRONMENT_VARIABLE], f"the environment variable {ENVIRONMENT_VARIABLE}"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{asked_by} is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
    return impl, asked_by


def choose(impl: str, x: Tensor, weight: Tensor) -> Choice:
    """The implementation for x [N, C, H, W] and weight [K, n_dict C, kh, kw], of one type.

    ValueError for an unknown one, NotImplementedError for a call that Triton is asked for and cannot do.
    """
    impl, asked_by = requested(impl)
    if impl == "torch" or impl == "reference":
        return Choice(impl, f"{asked_by} asks for it")
    obstacle = obstacle_to_triton(x, weight)
    if impl == "triton":
        if obstacle:
            raise NotImplementedError(f"{asked_by} is 'triton', but {obstacle}.")
        return Choice("triton", f"{asked_by} asks for it")
    if not x.is_cuda:
        return Choice("torch", f"auto takes the torch path for tensors on {x.device.type}")
    if obstacle:
        _warn_once(f"auto takes the torch path: {obstacle}.")
        return Choice("torch", f"auto takes the torch path: {obstacle}")
    return Choice("triton", "auto takes the Triton kernels for CUDA tensors")


def obstacle_to_triton(x: Tensor, weight: Tensor) -> str | None:
    """Why the Triton kernels cannot compute this call; None if they can."""
    kernel_h, kernel_w = weight.shape[2:]
    sample = x.shape[2] * x.shape[3] * max(weight.shape[0], weight.shape[1])  # of images; codes are hardly larger
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not _is_installed("triton"):
        return "Triton is not installed"
    if x.dtype not in DTYPES:
        return f"its kernels compute in {', '.join(map(_name, DTYPES))}, not in {_name(x.dtype)}"
    if interpreted and x.dtype == torch.bfloat16:
        return "Triton's interpreter gets bfloat16 wrong"
    if not x.is_cuda and not interpreted:
        return (
            f"x is on {x.device}: its kernels need a CUDA device, "
            "or TRITON_INTERPRET=1 in the environment before Triton is imported"
        )
    if x.is_cuda and torch.version.hip:
        return "its kernels are for NVIDIA GPUs, and this is an AMD one"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name(x.device)} has less"
    if max(kernel_h, kernel_w) > MOST_TAPS:
        return f"atoms are {kernel_h}x{kernel_w}, and its kernels reach {MOST_TAPS}x{MOST_TAPS}"
    if sample > MOST_ELEMENTS:
        return f"a sample of {sample} elements is over its kernels' {MOST_ELEMENTS}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
