"""Which implementation a call takes, and why.

"torch" is the loop of `torch_path` and "triton" the loop of `triton_path`, both behind one custom operator. "reference"
is the plain mathematics of `reference`, for torch.export and for autograd through the loop. "auto" takes for CUDA
tensors what this machine's verdict says (`qualify.job`), and torch for others. The environment variable SDNET_IMPL
overrides "auto".

`csc_encode` chooses once per call and hands the choice to the forward and the backward pass. A function compiled by
torch.compile keeps the choice that was made when it was traced.

Nothing here imports Triton, and a GPU is queried only when a call brings tensors that lie on it.
"""

import os
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sdnet.kernels.qualify.quarantine import OBSTACLES
from sdnet.kernels.reference import Pair

Impl = Literal["auto", "torch", "reference", "triton"]
IMPLEMENTATIONS = get_args(Impl)

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
ENVIRONMENT_VARIABLE = "SDNET_IMPL"

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""The types that the Triton kernels compute in."""

MOST_TAPS = 16
"""The largest height and width of the Triton kernels' atoms: a tap is a bit of half a word."""

MOST_ELEMENTS = 2**30
"""The largest sample of codes or images of the Triton kernels: within one, offsets have 32 bits."""


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_a_trace(function: Function) -> Function:
    """Let torch.compile call the function while it traces, and take its result as a constant.

    This is torch.compiler.assume_constant_result, which imports the whole compiler to set one attribute.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


class Choice(NamedTuple):
    """An implementation and the reason for it, a clause. "auto" stands for what the verdict of the call says."""

    impl: Impl
    reason: str


def requested(impl: str) -> tuple[str, str]:
    """Return the implementation that is asked for, and by what; the environment variable replaces "auto".

    Raises:
        ValueError: there is no such implementation.
    """
    asked_by = "the argument impl"
    if impl == "auto" and ENVIRONMENT_VARIABLE in os.environ:
        impl, asked_by = os.environ[ENVIRONMENT_VARIABLE], f"the environment variable {ENVIRONMENT_VARIABLE}"
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"{asked_by} is {impl!r}; it must be one of {', '.join(IMPLEMENTATIONS)}.")
    return impl, asked_by


def choose(
    impl: str,
    x: Tensor,
    weight: Tensor,
    transform: str | None = None,
    lam_per_atom: bool = False,
    padding: Pair = (0, 0),
) -> Choice:
    """Return the implementation for x [N, C, H, W] and weight [K, n_dict C, kh, kw], of one type.

    Args:
        impl: what the caller asks for.
        x: the input.
        weight: the dictionary.
        transform: what `transform_of` found, or the options of an `Iteration`. Only the reference takes these.
        lam_per_atom: whether lambda has a value per atom.
        padding: of the convolution.

    Raises:
        ValueError: there is no such implementation.
        NotImplementedError: Triton is asked for and cannot compute this call, or torch.onnx.export traces it.
    """
    impl, asked_by = requested(impl)
    if impl == "reference":
        return Choice("reference", f"{asked_by} asks for it")
    if transform is not None:
        if impl == "triton":
            raise NotImplementedError(
                f"{asked_by} is 'triton', but its kernels have no rule for {transform}; use impl='reference'."
            )
        return Choice("reference", f"only the reference has a rule for {transform}")
    if _exports_to_onnx():
        raise NotImplementedError(
            f"{asked_by} is {impl!r}, which ONNX has no operator for; use sdnet.export(model, path, example), or "
            'sdnet.set_impl(model, "reference") before torch.onnx.export.'
        )
    if impl == "torch":
        return Choice("torch", f"{asked_by} asks for it")
    if impl == "auto" and not x.is_cuda:
        return Choice("torch", f"auto takes the torch path for tensors on {x.device.type}")
    obstacle = obstacle_to_triton(x, weight, padding)
    if lam_per_atom and obstacle is None:
        obstacle = "lam has a value per atom, and its kernels take one for all atoms"
    if impl == "triton":
        if obstacle:
            raise NotImplementedError(f"{asked_by} is 'triton', but {obstacle}.")
        return Choice("triton", f"{asked_by} asks for it")
    if obstacle:
        _warn(f"auto takes the torch path: {obstacle}.")
        return Choice("torch", f"auto takes the torch path: {obstacle}")
    return Choice("auto", "auto takes what has been qualified on this GPU")


@constant_in_a_trace
def _exports_to_onnx() -> bool:
    """Return whether torch.onnx.export traces this call; the module is not imported for the question."""
    onnx = sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()


def transform_of(*tensors: Tensor) -> str | None:
    """Return what is being done to these tensors that a custom operator has no rule for; None in ordinary calls.

    Such are the transforms of torch.func (grad, vmap, jvp and all that is made of them) and forward-mode derivatives.
    """
    if torch.compiler.is_compiling():
        return TRANSFORM if _inside_transform() else None
    if functorch.peek_interpreter_stack() is not None or any(map(functorch.is_functorch_wrapped_tensor, tensors)):
        return TRANSFORM
    if any(map(functorch.is_legacy_batchedtensor, tensors)):
        return "batched gradients"
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "forward-mode derivatives"
    return None


TRANSFORM = "the transforms of torch.func"


@constant_in_a_trace
def _inside_transform() -> bool:
    # The compiler enters the levels of torch.func while it traces, and guards on them.
    return functorch.peek_interpreter_stack() is not None


def obstacle_to_triton(x: Tensor, weight: Tensor, padding: Pair = (0, 0)) -> str | None:
    """Return why the Triton kernels cannot compute this call; None if they can."""
    kernel_h, kernel_w = weight.shape[2:]
    height, width = (n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True))  # at least those of the codes
    largest = height * width * max(weight.shape[0], weight.shape[1])
    if obstacle := obstacle_of(x.device, x.dtype):
        return obstacle
    if max(kernel_h, kernel_w) > MOST_TAPS:
        return f"atoms are {kernel_h}x{kernel_w}, and its kernels reach {MOST_TAPS}x{MOST_TAPS}"
    if largest > MOST_ELEMENTS:
        return f"a sample has more than the {MOST_ELEMENTS} elements that its kernels reach"
    return None


@constant_in_a_trace
def obstacle_of(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why no Triton kernel of this package can run on a device with tensors of a type; None if one can."""
    if OBSTACLES:
        return OBSTACLES[0]
    if not _is_installed("triton"):
        return "Triton is not installed"
    if dtype not in DTYPES:
        return f"its kernels compute in {', '.join(map(_name, DTYPES))}, not in {_name(dtype)}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted and dtype == torch.bfloat16:
        return "Triton's interpreter gets bfloat16 wrong"
    if device.type != "cuda":
        if interpreted:
            return None
        return (
            f"x is on {device}: its kernels need a CUDA device, "
            "or TRITON_INTERPRET=1 in the environment before Triton is imported"
        )
    if torch.version.hip:
        return "its kernels are for NVIDIA GPUs, and this is an AMD one"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"its kernels need compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@constant_in_a_trace
def _warn(sentence: str) -> None:
    _warn_once(sentence)


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
