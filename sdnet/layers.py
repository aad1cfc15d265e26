"""The CSC layer: a drop-in for a convolution whose output is the sparse code of its input."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sdnet.kernels import checks, reference, step_sizes
from sdnet.kernels.coding import CODING_FIELDS, Coding, coding_of, takes_coding
from sdnet.kernels.csc import encode
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.kernels.reference import Pair, codes_size
from sdnet.kernels.step_sizes import DictionaryState

DEFAULT_INPUT_SIZE = 32
FIRST_ITERATIONS = 10
"""Power iterations at construction: enough for a safe first step (0.9 leaves room for a low estimate)."""


class CSCConv2d(nn.Module):
    """Convolutional sparse coding: x [N, C, H, W] -> codes [N, K, h, w].

    The codes approximate argmin_z lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2 by `n_steps` proximal steps from zero, where
    A z = conv_transpose2d(z, weight) and the atoms weight[k] have unit norm. One step shrinks by lam * step.

    A forward changes nothing. The atoms are projected and the step size follows the dictionary when an optimiser takes
    a step, once `sdnet.attach(model, optimizer)` has been called; `sdnet.refresh_step_size(model)` converges it.

    Args:
        in_channels, out_channels: C and the number of atoms K.
        kernel_size, stride, padding: of the convolution, ints or pairs; padding None is kernel_size // 2.
        lam: the weight of |z|_1, at least 0.
        adaptive_lam: multiply lam once by numel(x) / numel(z), at the input size below.
        input_size: height and width (int or pair) on which the step size is estimated; 32 unless told. The forward
            takes other sizes with the step as it is.
        impl: which implementation computes the codes, see `sdnet.kernels.csc_encode`.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Attributes:
        coding: the `Coding` in force. Its fields are attributes of the layer too: `layer.n_steps = 50` replaces it.
        weight: the dictionary [K, n_dict C, kh, kw], a parameter.
        step: the step size in force, 0-d, 0.9 / (largest eigenvalue of A'A); a buffer, always fp32.
        vector: the power iteration's unit vector [1, n_dict C, H, W]; a buffer, always fp32.
        lam: lambda in force, fp32, 0-d or [N, 1, 1, 1]; assign a float or a tensor. Not saved.
    """

    coding: Coding
    weight: nn.Parameter
    step_size: Tensor
    power_vector: Tensor
    _lam: Tensor

    @takes_coding
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | None = None,
        *,
        lam: float = 0.1,
        adaptive_lam: bool = False,
        input_size: int | Pair | None = None,
        impl: str = "auto",
        **coding: Any,
    ) -> None:
        super().__init__()
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        self.out_channels = checks.integer("out_channels", out_channels, 1)
        self.kernel_size, self.stride = checks.pair("kernel_size", kernel_size, 1), checks.pair("stride", stride, 1)
        half = (self.kernel_size[0] // 2, self.kernel_size[1] // 2)
        self.padding = half if padding is None else checks.pair("padding", padding, 0)
        self.coding = coding_of(type(self).__init__, coding)
        self.impl = checks.choice("impl", impl, IMPLEMENTATIONS)
        lam, n_dict = checks.number("lam", lam), self.coding.n_dict

        size = checks.pair("input_size", DEFAULT_INPUT_SIZE if input_size is None else input_size, 1)
        out_size = self.codes_size(size)
        if min(out_size) < 1:
            raise ValueError(f"input_size is {list(size)}, too small for atoms of {list(self.kernel_size)}.")
        if adaptive_lam:
            lam = lam * (in_channels * size[0] * size[1]) / (out_channels * out_size[0] * out_size[1])
        self.weight = nn.Parameter(torch.empty(out_channels, n_dict * in_channels, *self.kernel_size))
        self.register_buffer("step_size", torch.zeros(()))
        self.register_buffer("power_vector", torch.empty(1, n_dict * in_channels, *size))
        self.register_buffer("_lam", torch.zeros(()), persistent=False)
        self.lam = lam
        self.register_load_state_dict_pre_hook(_take_over_grid)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform atoms of unit norm, a seeded vector and a first step size."""
        nn.init.kaiming_uniform_(self.weight)
        self.reset_power_vector()
        self.update_dictionary(FIRST_ITERATIONS)

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Codes [N, K, h, w] of x [N, C, H, W]; `lam` (float, 0-d, [N] or [N, 1, 1, 1]) takes the place of self.lam."""
        lam = self.lam if lam is None else lam
        return encode(x, self.weight, self.step_size, lam, self.coding, self.stride, self.padding, self.impl)

    def reconstruct(self, codes: Tensor, size: Pair | None = None) -> Tensor:
        """A z [N, n_dict C, H, W] of codes [N, K, h, w], for an input of `size`; None: stride times the codes' size."""
        height, width = codes.shape[2] * self.stride[0], codes.shape[3] * self.stride[1]
        size = (height, width) if size is None else size
        if self.codes_size(size) != (codes.shape[2], codes.shape[3]):
            least = [
                (n - 1) * s - 2 * p + k
                for n, s, p, k in zip(codes.shape[2:], self.stride, self.padding, self.kernel_size, strict=True)
            ]
            most = [n + s - 1 for n, s in zip(least, self.stride, strict=True)]
            raise ValueError(
                f"size is {list(size)}; codes of {list(codes.shape[2:])} stand for inputs of {least} to {most}."
            )
        return reference.synthesis(codes, self.weight.to(codes.dtype), size, self.stride, self.padding)

    def objective(self, x: Tensor, codes: Tensor) -> Tensor:
        """lam |z|_1 + mu/2 |z|^2 + 1/2 |x - A z|^2 of each sample, [N]; |x - A z| for the norm data term."""
        reconstruction = self.reconstruct(codes, (x.shape[2], x.shape[3]))
        return reference.objective(x, codes, reconstruction, self.lam, self.coding)

    def codes_size(self, size: Pair) -> Pair:
        """Height and width of the codes of an input of height and width `size`."""
        return codes_size(size, self.kernel_size, self.stride, self.padding)

    @property
    def lam(self) -> Tensor:
        return self._lam

    @lam.setter
    def lam(self, value: float | Tensor) -> None:
        lam = torch.as_tensor(value, dtype=torch.float32, device=self._lam.device).detach()
        if not lam.is_meta and not bool(((lam >= 0) & lam.isfinite()).all()):
            raise ValueError(f"lam is {value}; it must be a finite number of at least 0.")
        if lam.ndim and lam.numel() != lam.shape[0]:
            raise ValueError(
                f"lam has shape {list(lam.shape)}; it must be a number or one per sample, [N] or [N, 1, 1, 1]."
            )
        self._lam = lam.reshape(-1, 1, 1, 1) if lam.ndim else lam

    @torch.no_grad()
    def reset_power_vector(self, size: Pair | None = None) -> None:
        """A random unit vector that is the same in every process; `size` changes its grid."""
        grid = tuple(self.power_vector.shape[2:]) if size is None else size
        self.power_vector = step_sizes.initial_power_vector((1, self.power_vector.shape[1], *grid)).to(
            self.power_vector.device
        )

    @property
    def dictionary(self) -> DictionaryState:
        """What `sdnet.kernels.step_sizes` keeps true: the atoms, the vector and the step."""
        return DictionaryState(self.weight, self.power_vector, self.step_size, self.stride, self.padding)

    def update_dictionary(self, iterations: int = 1) -> None:
        """Projects the atoms, runs `iterations` warm power iterations and sets the step, without a host sync."""
        step_sizes.update_dictionaries([self.dictionary], iterations)

    @torch.no_grad()
    def converge_power_vector(self, tolerance: float = 1e-5) -> Tensor:
        """Converges the vector; returns the largest eigenvalue of A'A, 0-d, some `tolerance` below; leaves the step."""
        power_vector, eigenvalue = step_sizes.largest_eigenvalue(
            self.weight, self.power_vector, self.stride, self.padding, tolerance
        )
        self.power_vector.copy_(power_vector)
        return eigenvalue

    def extra_repr(self) -> str:
        lam = f"{float(self.lam):.4g}" if self.lam.ndim == 0 else f"per sample [{self.lam.shape[0]}]"
        coding = ", ".join(f"{name}={value!r}" for name, value in vars(self.coding).items())
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, lam={lam}, {coding}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CSCConv2d":
        # half() and double() are for weights: a step in bf16 would be off by up to 0.4 %.
        exact = {name: self._buffers[name] for name in ("step_size", "power_vector", "_lam")}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


def _take_over_grid(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # The vector carries the grid that the step was estimated on: a saved one may differ from the constructor's.
    assert isinstance(module, CSCConv2d)
    saved = state_dict.get(prefix + "power_vector")
    if isinstance(saved, Tensor) and saved.ndim == 4 and saved.shape[:2] == module.power_vector.shape[:2]:
        module.power_vector = module.power_vector.new_empty(saved.shape)


def _coding_attribute(name: str) -> property:
    """A field of the layer's `Coding` as an attribute: an assignment checks the value and replaces `coding`."""

    def get(layer: CSCConv2d) -> Any:
        return getattr(layer.coding, name)

    def assign(layer: CSCConv2d, value: Any) -> None:
        layer.coding = replace(layer.coding, **{name: value})

    return property(get, assign)


for _name in CODING_FIELDS:
    setattr(CSCConv2d, _name, _coding_attribute(_name))
