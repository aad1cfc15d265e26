"""The arguments of `csc_encode`: their checks, and the form that the implementations take.

Each check raises a ValueError of one sentence that names the argument, what was given and what is allowed.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from sdnet.kernels import checks
from sdnet.kernels.autocast import autocast_dtype
from sdnet.kernels.dispatch import transform_of
from sdnet.kernels.reference import Pair

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""The types of x and weight."""


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise a ValueError if a tensor is sparse, nested or of another layout that has no strides."""
    if tensor.is_nested or tensor.layout != torch.strided:
        given = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        raise ValueError(f"{name} is {given}; it must be a dense tensor, of layout torch.strided.")


def check_x_and_weight(x: Tensor, weight: Tensor, padding: Pair, n_dict: int) -> None:
    """Raise a ValueError unless x and weight fit together."""
    for name, value, shape in (("x", x, "[N, C, H, W]"), ("weight", weight, "[K, n_dict C, kh, kw]")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}; it must be a Tensor {shape}.")
        check_dense(name, value)
    if x.ndim != 4 or weight.ndim != 4:
        raise ValueError(
            f"x has shape {list(x.shape)} and weight {list(weight.shape)}; "
            "they must be [N, C, H, W] and [K, n_dict C, kh, kw]."
        )
    if weight.shape[1] != n_dict * x.shape[1]:
        raise ValueError(
            f"x has {x.shape[1]} channels and n_dict is {n_dict}, but the atoms of weight have {weight.shape[1]} "
            "channels; they must have n_dict times as many as x."
        )
    if (
        x.dtype not in DTYPES
        or weight.dtype not in DTYPES
        or (x.dtype != weight.dtype and not autocast_dtype(x.device))
    ):
        raise ValueError(
            f"x is {x.dtype} and weight {weight.dtype}; they must be of one floating-point type of 16, 32 or 64 bits."
        )
    if 0 in weight.shape:
        raise ValueError(
            f"weight has shape {list(weight.shape)}; it must hold at least one atom of at least one pixel."
        )
    if 0 in x.shape[2:]:
        raise ValueError(f"x has shape {list(x.shape)}; its images must have at least one pixel.")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; they must be on one device.")
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    if any(n < k for n, k in zip(padded, weight.shape[2:], strict=True)):
        raise ValueError(f"x padded to {padded} is smaller than the atoms of weight, {list(weight.shape[2:])}.")


def check_codes(codes: Tensor, atoms: int, batch: int | None = None) -> None:
    """Raise a ValueError unless `codes` is a tensor [N, atoms, h, w], with N = `batch` if that is given."""
    if isinstance(codes, Tensor):
        check_dense("codes", codes)
    if not isinstance(codes, Tensor) or codes.ndim != 4 or codes.shape[1] != atoms or 0 in codes.shape[2:]:
        raise ValueError(f"codes is {checks.shown(codes)}; it must be a tensor [N, {atoms}, h, w].")
    if batch not in (None, codes.shape[0]):
        raise ValueError(
            f"codes has shape {list(codes.shape)}; for {batch} inputs it must be [{batch}, {atoms}, h, w]."
        )
    if codes.dtype not in DTYPES:
        raise ValueError(f"codes is {codes.dtype}; it must be of a floating-point type of 16, 32 or 64 bits.")


def as_tensor(name: str, value: float | Tensor, x: Tensor, atoms: int | None = None) -> Tensor:
    """Return `value` as a dense tensor of at least fp32, 0-d or with four dimensions.

    Args:
        name: the name of the argument.
        value: what was given.
        x: the input.
        atoms: the number of atoms, if one value per sample or per atom is allowed.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        otherwise = "" if atoms is None else ", or a tensor, 0-d or with a value per sample or atom"
        return torch.full((), checks.number(name, value, otherwise), dtype=dtype, device=x.device)
    check_dense(name, value)
    batch = x.shape[0]
    per_atom = value.ndim == 4 and value.shape[0] in (1, batch) and value.shape[1:] == (atoms, 1, 1)
    per_sample = not per_atom and value.ndim > 0 and value.numel() == batch and value.shape[0] == batch
    if value.ndim > 0 and (atoms is None or not (per_sample or per_atom)):
        allowed = "0-d"
        if atoms is not None:
            allowed += (
                f", [{batch}] or [{batch}, 1, 1, 1] with a value per sample, "
                f"[1, {atoms}, 1, 1] per atom, or [{batch}, {atoms}, 1, 1]"
            )
        raise ValueError(f"{name} has shape {list(value.shape)}; for x of shape {list(x.shape)} it must be {allowed}.")
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} is {value.dtype}; it must be real.")
    if value.is_meta and not x.is_meta:
        raise ValueError(f"{name} is on the meta device and has no value; it must be on {x.device}, as x is.")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and _has_values(value):
        check_values(name, value, dtype)
    value = value.to(device=x.device, dtype=dtype)
    if value.ndim == 0:
        return value
    value = value if per_atom else value.reshape(-1, 1, 1, 1)
    if value.shape[1] == 1:  # that of a single atom too, which the kernels then take as one per sample
        value = value.expand(batch, 1, 1, 1)
    return value.contiguous()


def _has_values(tensor: Tensor) -> bool:
    """Whether a value can be read: not within a trace, a transform of torch.func or a mode that watches operators."""
    traced = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return not traced and type(tensor) in (Tensor, Parameter) and transform_of(tensor) is None


def check_values(name: str, value: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise a ValueError unless all values are finite in `dtype` and at least 0. Waits for the device of `value`."""
    if value.is_meta:
        return
    value = value.detach()
    least, most = (value, value) if value.ndim == 0 else (value.min(), value.max()) if value.numel() else (0.0, 0.0)
    for extreme in (float(least), float(most)):  # a NaN is both
        if not 0 <= extreme <= torch.finfo(dtype).max:
            raise ValueError(f"{name} holds {extreme:.6g}; its values must be finite and at least 0.")
