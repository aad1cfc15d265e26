"""The second line of defence, in the user's process and under "auto" only: what happens when a Triton kernel fails.

A kernel that does not compile, or asks for more than the GPU has, puts its key into quarantine: the call and all later
ones of the key are computed by PyTorch. A missing C compiler concerns every kernel, so it ends the use of Triton in
this process. An error that breaks the GPU's context, such as an illegal memory access, is raised again; its key is
written to the table, so that the next process leaves the kernel out.
"""

import subprocess
import warnings
from typing import Literal, NoReturn

import torch

from sdnet.kernels.qualify import key

BROKEN_CONTEXT = ("illegal memory access", "misaligned address", "illegal instruction", "unspecified launch failure")
"""Parts of the messages of errors after which every CUDA call of the process fails."""

NO_COMPILER = ("c compiler", "python.h")
"""Parts of the messages of errors that say that Triton cannot build its launchers."""

FAILED_KERNEL = ("passmanager", "out of resource", "ptxas", "triton error [cuda]")
"""Parts of the messages of errors of one kernel, which did not compile or was not launched."""

Kind = Literal["key", "process", "broken"]

KEYS: dict[tuple[str, str], str] = {}
"""The reason for each pair (key, digest of the machine) in quarantine."""

OBSTACLES: list[str] = []
"""Why Triton cannot be used in this process at all, a clause; empty if it can."""


def reason_of(name: str, device: torch.device) -> str:
    """Return why a key is in quarantine, a clause; "" if it is not."""
    return KEYS.get((name, key.digest_of(device)), "") if KEYS else ""


def kind_of(error: BaseException) -> Kind | None:
    """Return what an error concerns: a key, the process, or a GPU whose context is broken; None for other errors."""
    text = f"{error}\n{error.__cause__ or ''}".lower()
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if any(part in text for part in BROKEN_CONTEXT):
        return "broken"
    if isinstance(error, subprocess.CalledProcessError) or any(part in text for part in NO_COMPILER):
        return "process"
    if "triton error [cuda]" in text and "out of memory" in text:
        return None
    from_triton = type(error).__module__.partition(".")[0] == "triton"
    if from_triton or any(part in text for part in FAILED_KERNEL):
        return "key"
    return None


def handle(error: Exception, name: str, device: torch.device, layer: str, several_ranks: bool = False) -> None:
    """Return if PyTorch may compute what failed, after a warning; else raise the error.

    Args:
        error: the error of a call that "auto" gave to Triton.
        name: the key of its verdict.
        device: the device it ran on.
        layer: what failed, for the warning.
        several_ranks: whether other processes would go on with the Triton kernels and get other results.
    """
    kind = kind_of(error)
    if kind not in ("key", "process"):
        raise error
    if capturing(device):
        refuse(error, f"{layer} failed while a CUDA graph was captured, where PyTorch cannot take over: call it once "
                      "before the capture, or set SDNET_IMPL=torch")  # fmt: skip
    if several_ranks:
        refuse(error, f"{layer} failed in one of several processes, whose results would differ if PyTorch took over: "
                      "set SDNET_IMPL=torch in all of them")  # fmt: skip
    reason = one_line(error)
    if kind == "process":
        OBSTACLES.append(f"Triton cannot compile here ({reason})")
        scope = "all Triton kernels"
    else:
        KEYS[name, key.digest_of(device)] = f"its kernels failed to compile ({reason})"
        scope = layer
    warnings.warn(f"PyTorch computes {scope} from now on: {reason}.", stacklevel=3)


def refuse(error: Exception, sentence: str) -> NoReturn:
    """Raise an error that says why PyTorch does not take over."""
    raise RuntimeError(f"{sentence} ({one_line(error)}).") from error


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def one_line(error: BaseException) -> str:
    """Return an exception as one line of at most 300 characters."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}".rstrip(".")
