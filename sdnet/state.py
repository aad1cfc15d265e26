"""What a CSC layer keeps beside its dictionary: the step size, the power vector and lambda.

| name           | kind             | precision                    | in the state dict |
|----------------|------------------|------------------------------|-------------------|
| `step_size`    | buffer           | fp32                         | yes               |
| `power_vector` | tensor attribute | fp32, contiguous             | yes               |
| `lam`          | tensor attribute | fp32, fp64 in a double layer | no                |
| `raw_lam`      | parameter        | that of the weight           | yes, if learned   |

All move with the module (`to`, `cuda`, `share_memory`), and the first three keep their precision under `half()` and
`bfloat16()`. The power vector and lambda are not registered buffers, because DistributedDataParallel (DDP) broadcasts
the registered buffers of rank 0 before every forward, and averages of models average them. The power vector is equal on
all ranks without that and as large as an input of the layer (600 kB at 224 pixels); lambda can hold one value per
sample, which differs from rank to rank.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdnet.kernels import checks, step_sizes
from sdnet.kernels.arguments import check_dense
from sdnet.kernels.reference import Pair

LearnLam = Literal["no", "layer", "atom"]

LAMBDA_SHAPES = (
    "a finite number of at least 0, or a tensor of such numbers that is 0-d, [N] or [N, 1, 1, 1], or [1, K, 1, 1] with "
    "a value per atom"
)


@contextmanager
def persistent_state() -> Iterator[None]:
    """Create tensors that autograd can use later, even under `torch.inference_mode`, and record no gradient."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def checked_lambda(value: Any) -> float | Tensor:
    """Return a value of lambda as a float, or as a tensor that is 0-d or has four dimensions, with no gradient.

    The numbers of a tensor on a GPU are not checked: that would make the host wait for the device.

    Args:
        value: a number, or a tensor that is 0-d, [N], [N, 1, 1, 1], [1, K, 1, 1] or [N, K, 1, 1].

    Raises:
        ValueError: `value` has another type or shape, is negative or not finite, or requires a gradient.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, (str, bool)) or not hasattr(value, "__float__"):
            raise ValueError(f"lam is {checks.shown(value)}; it must be {LAMBDA_SHAPES}.")
        return checks.number("lam", value)
    if value.requires_grad:
        raise ValueError(
            "lam is a tensor that requires a gradient, and a layer's lambda carries none; "
            "give it to the forward, layer(x, lam=lam), or assign lam.detach()."
        )
    check_dense("lam", value)
    if value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"lam is a tensor of {value.dtype}; it must be {LAMBDA_SHAPES}.")
    if value.is_meta:
        raise ValueError(f"lam is a tensor on the meta device; it must be {LAMBDA_SHAPES}.")
    if value.ndim and (value.ndim not in (1, 4) or value.numel() == 0 or value.shape[2:].numel() != 1):
        raise ValueError(f"lam has shape {list(value.shape)}; it must be {LAMBDA_SHAPES}.")
    if value.device.type == "cpu" and not bool(((value >= 0) & (value <= checks.LARGEST_NUMBER)).all()):
        raise ValueError(f"lam is {checks.shown(value.squeeze().tolist())}; it must be {LAMBDA_SHAPES}.")
    return value.reshape(-1, 1, 1, 1) if value.ndim == 1 else value


class CodingState(nn.Module):
    """A module with a dictionary `weight` that keeps a step size, a power vector and lambda.

    Subclasses create `weight`, then call `create_state`.

    Attributes:
        step_size: the step size of the proximal steps, 0-d.
        power_vector: the unit vector from which the largest eigenvalue of A'A is estimated, [1, C, H, W].
        lam: the weight of |z|_1. Read it as a tensor; assign a number or a tensor.
    """

    out_channels: int
    learn_lam: LearnLam
    weight: nn.Parameter
    raw_lam: nn.Parameter | None
    step_size: Tensor
    power_vector: Tensor
    _lam: Tensor
    _exact_lam: float | Tensor

    def create_state(self, lam: float, channels: int, size: Pair, learn_lam: LearnLam = "no") -> None:
        """Create the state beside `weight`, on its device.

        Args:
            lam: lambda.
            channels: the channels of the power vector.
            size: the height and width of the inputs on which the step size is estimated.
            learn_lam: whether lambda is learned, and how many values: "no", "layer" or "atom".

        Raises:
            ValueError: `learn_lam` is none of these, or lambda is to be learned and is 0.
        """
        self.learn_lam = checks.choice("learn_lam", learn_lam, get_args(LearnLam))
        self.register_parameter("raw_lam", None)
        if learn_lam != "no":  # at least one dimension, which sharding needs
            values = self.weight.new_empty(1 if learn_lam == "layer" else self.out_channels)
            self.raw_lam = nn.Parameter(values)
        device = self.weight.device
        self.register_buffer("step_size", torch.full((), float("nan"), dtype=torch.float32, device=device))
        power_vector = torch.empty(1, channels, *size, dtype=torch.float32, device=device)
        if power_vector.is_meta:  # a buffer at first, because what fills empty models looks for buffers (accelerate)
            self.register_buffer("power_vector", power_vector)
        else:
            self.power_vector = power_vector
        # Lambda is never on the meta device: nothing that loads weights would bring its value back.
        device = torch.device("cpu") if device.type == "meta" else device
        self._lam = torch.zeros((), dtype=_lambda_dtype(self.weight.dtype), device=device)
        self.lam = lam

    def __prepare_scriptable__(self) -> "CodingState":
        """Refuse torch.jit.script, which calls this method."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be compiled by torch.jit.script; use torch.compile or sdnet.export."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the geometry is checked, and kept as pairs.

        `lam` goes to its property even if the value is a parameter, which the property refuses.
        """
        if name in ("kernel_size", "stride", "padding"):
            value = checks.pair(name, value, 0 if name == "padding" else 1)
        if name == "prox":
            self._modules.pop(name, None)  # a function may follow a module
        if name == "lam":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    def lam(self) -> Tensor:
        """Lambda, 0-d, per sample [N, 1, 1, 1] or per atom [1, K, 1, 1]: a copy, which assignments do not change.

        Assign a number, or a tensor that is 0-d, [N], [N, 1, 1, 1], [1, K, 1, 1] or [N, K, 1, 1]; the next forward
        uses it, compiled or not. While
        the shape stays the same the assignment writes to the memory that the forward reads, so that a compiled forward
        is not compiled again and a captured CUDA graph uses the new value.

        Lambda is a hyperparameter, not state: it is not saved in the state dict, and loading one does not change it.
        Store it with the arguments of your model. A tensor that requires a gradient is refused: give it to the forward.
        The numbers of a tensor on a GPU are not checked; `sdnet.check_lambda(model)` checks them.

        A lambda that is learned (`learn_lam`) is read as softplus(raw_lam), with its gradient, and is saved in the
        state dict. Assign a number above 0, or a tensor that is 0-d or, if learned per atom, [1, K, 1, 1].
        """
        return self._lam.clone() if self.raw_lam is None else self.forward_lambda()

    @lam.setter
    def lam(self, value: float | Tensor) -> None:
        lam = self.check_assignable(value)
        with persistent_state():
            self._exact_lam = lam.clone(memory_format=torch.contiguous_format) if isinstance(lam, Tensor) else lam
            shape = lam.shape if isinstance(lam, Tensor) else torch.Size(())
            if shape != self._lam.shape:
                self._lam = self._lam.new_empty(shape)
            if isinstance(lam, Tensor):
                self._lam.copy_(lam)
            else:
                self._lam.fill_(lam)
        self.reset_learned_lambda()

    def check_assignable(self, value: Any) -> float | Tensor:
        """Return what `checked_lambda` returns for a value that can be assigned to `lam`.

        Raises:
            ValueError: it cannot.
        """
        lam = checked_lambda(value)
        shape = lam.shape if isinstance(lam, Tensor) else torch.Size(())
        if shape and shape[1] not in (1, self.out_channels):
            raise ValueError(
                f"lam has shape {list(shape)}; this layer has {self.out_channels} atoms, and so a lambda per atom has "
                f"the shape [1, {self.out_channels}, 1, 1]."
            )
        if self.learn_lam == "no":
            return lam
        if shape and (self.learn_lam == "layer" or shape[0] != 1):
            raise ValueError(
                f"lam has shape {list(shape)}, but it is learned per {self.learn_lam}: assign a number, or give lambda "
                "to the forward, layer(x, lam=lam)."
            )
        if lam == 0 if not isinstance(lam, Tensor) else lam.device.type == "cpu" and not bool(lam.all()):
            raise ValueError("lam is 0; a lambda that is learned must be above 0, as softplus(raw_lam) is.")
        return lam

    def __copy__(self) -> "CodingState":
        """Return a shallow copy, which shares parameters and buffers, as with other modules, and has its own lambda."""
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        copied._lam = self._lam.clone()
        return copied

    @torch.no_grad()
    def reset_learned_lambda(self) -> None:
        """Set `raw_lam`, if there is one, such that lambda is the last assigned value."""
        if self.raw_lam is not None and not self.raw_lam.is_meta:
            lam = torch.as_tensor(self._exact_lam, dtype=torch.float64, device=self.raw_lam.device).flatten()
            self.raw_lam.copy_(lam + torch.log(-torch.expm1(-lam)))  # the inverse of softplus

    def forward_lambda(self) -> Tensor:
        """Return the lambda that a forward uses, 0-d or with four dimensions; not a copy."""
        if self.raw_lam is None:
            return self._lam
        raw = self.raw_lam if self.raw_lam.dtype == torch.float64 else self.raw_lam.float()
        return F.softplus(raw).view(() if self.learn_lam == "layer" else (1, -1, 1, 1))

    @torch.no_grad()
    def reset_power_vector(self, size: Pair | None = None) -> None:
        """Set the power vector to a random unit vector that is the same in every process.

        Args:
            size: its height and width; None keeps them.
        """
        shape = (*self.power_vector.shape[:2], *(self.power_vector.shape[2:] if size is None else size))
        with persistent_state():
            if self.power_vector.is_meta:
                self.power_vector = self.power_vector.new_empty(shape)
            else:
                self.power_vector = step_sizes.initial_power_vector(shape).to(self.power_vector.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CodingState":
        """Move the state with the weights. `half()` and `double()` change the precision of the weights alone."""
        step_size, power_vector, lam = self.step_size, self.power_vector, self._lam
        with persistent_state():
            self._unregister_power_vector()
            super()._apply(fn, recurse)
            if self.step_size.dtype != torch.float32:
                self.step_size = step_size.to(self.step_size.device)
            moved = fn(power_vector)
            exact = moved if moved.dtype == torch.float32 else power_vector.to(moved.device)
            self.power_vector = exact.contiguous()
            if power_vector.is_meta and not moved.is_meta:
                # to_empty() leaves memory as it is. A vector can be made again; a step size cannot without weights, and
                # NaN shows at once that neither load_state_dict() nor reset_parameters() followed.
                self.reset_power_vector()
                self.reset_learned_lambda()
                self.step_size.fill_(float("nan"))
            moved = fn(lam)
            if moved is not lam:
                self._place_lambda(moved.device, moved.dtype)
        return self

    def _place_lambda(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move lambda beside a weight of `device` and `dtype`, converted from the exact value."""
        device = self._lam.device if device.type == "meta" else device
        dtype = _lambda_dtype(dtype)
        if (device, dtype) == (self._lam.device, self._lam.dtype):
            return
        if isinstance(self._exact_lam, Tensor):
            self._lam = self._exact_lam.to(device, dtype, copy=True)
        else:
            self._lam = torch.full((), self._exact_lam, device=device, dtype=dtype)

    def _unregister_power_vector(self) -> None:
        """Make the power vector of a module that was built on the meta device an attribute outside the buffers."""
        power_vector = self._buffers.pop("power_vector", None)
        if power_vector is not None:
            self.power_vector = power_vector

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "power_vector"] = self.power_vector

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._unregister_power_vector()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "power_vector"
        saved = state_dict.get(key)
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        if saved is None:
            missing_keys.append(key)
        elif not isinstance(saved, Tensor) or saved.ndim != 4 or saved.shape[:2] != self.power_vector.shape[:2]:
            shape = list(saved.shape) if isinstance(saved, Tensor) else type(saved).__name__
            error_msgs.append(f"{key} is {shape}; it must be [1, {self.power_vector.shape[1]}, H, W].")
        elif saved.numel() == 0 or (saved.is_meta and not self.power_vector.is_meta):
            error_msgs.append(f"{key} has shape {list(saved.shape)} on {saved.device}; it must hold values.")
        else:
            self._load_power_vector(saved, assign=bool(local_metadata.get("assign_to_params_buffers")))
        with persistent_state():
            if self.step_size.dtype != torch.float32:
                self.step_size = self.step_size.float()
            weight = self._parameters.get("weight")
            if weight is not None:
                self._place_lambda(weight.device, weight.dtype)

    def _load_power_vector(self, saved: Tensor, assign: bool) -> None:
        """Take over a saved power vector, whose height and width may differ from those of this layer."""
        with persistent_state():
            saved = saved.detach().to(saved.device if assign else self.power_vector.device, torch.float32)
            if assign or saved.shape != self.power_vector.shape:
                self.power_vector = saved.clone(memory_format=torch.contiguous_format)
            else:
                self.power_vector.copy_(saved)


def _lambda_dtype(weight: torch.dtype) -> torch.dtype:
    """Return the precision of lambda beside a weight of this dtype."""
    return torch.float64 if weight == torch.float64 else torch.float32
