"""The arguments of `csc_encode`: their checks, and the form that the implementations take.

Each check raises a ValueError of one sentence that names the argument, what was given and what is allowed.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from sdnet.kernels import checks
from sdnet.kernels.dispatch import transform_of
from sdnet.kernels.reference import Pair


def check_x_and_weight(x: Tensor, weight: Tensor, padding: Pair, n_dict: int) -> None:
    """Raise a ValueError unless x and weight fit together."""
    for name, value, shape in (("x", x, "[N, C, H, W]"), ("weight", weight, "[K, n_dict C, kh, kw]")):
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is of type {type(value).__name__}; it must be a Tensor {shape}.")
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
    if not x.is_floating_point() or (x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"x is {x.dtype} and weight {weight.dtype}; they must be of one floating-point type.")
    if x.device != weight.device:
        raise ValueError(f"x is on {x.device} and weight on {weight.device}; they must be on one device.")
    padded = [n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True)]
    if any(n < k for n, k in zip(padded, weight.shape[2:], strict=True)):
        raise ValueError(f"x padded to {padded} is smaller than the atoms of weight, {list(weight.shape[2:])}.")


def under_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in autocast's dtype where it is on, as conv2d would have them."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight
    dtype = torch.get_autocast_dtype(x.device.type)
    if x.dtype != torch.float64:
        x = x.to(dtype)
    return x, weight.to(x.dtype)


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
        return torch.full((), checks.number(name, value), dtype=dtype, device=x.device)
    batch = x.shape[0]
    per_sample = value.ndim > 0 and value.numel() == batch and value.shape[0] == batch
    per_atom = value.ndim == 4 and value.shape[0] in (1, batch) and value.shape[1:] == (atoms, 1, 1)
    if value.ndim > 0 and (atoms is None or not (per_sample or per_atom)):
        allowed = "0-d"
        if atoms is not None:
            allowed += (
                f", [{batch}] or [{batch}, 1, 1, 1] with a value per sample, "
                f"[1, {atoms}, 1, 1] per atom, or [{batch}, {atoms}, 1, 1]"
            )
        raise ValueError(f"{name} has shape {list(value.shape)}; for x of shape {list(x.shape)} it must be {allowed}.")
    if value.is_complex():
        raise ValueError(f"{name} is {value.dtype}; it must be real.")
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and _has_values(value):
        check_values(name, value)
    value = value.to(device=x.device, dtype=dtype)
    if value.ndim == 0:
        return value
    return (value if per_atom else value.reshape(-1, 1, 1, 1)).contiguous()


def _has_values(tensor: Tensor) -> bool:
    """Whether a value can be read: not within a trace, a transform of torch.func or a mode that watches operators."""
    traced = torch._C._is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return not traced and type(tensor) in (Tensor, Parameter) and transform_of(tensor) is None


def check_values(name: str, value: Tensor) -> None:
    """Raise a ValueError unless all values are finite and at least 0. Waits for the device of `value`."""
    value = value.detach()
    least, most = (value, value) if value.ndim == 0 else (value.min(), value.max()) if value.numel() else (0.0, 0.0)
    for extreme in (float(least), float(most)):  # a NaN is both
        if not 0 <= extreme < float("inf"):
            raise ValueError(f"{name} holds {extreme:.6g}; its values must be finite and at least 0.")
