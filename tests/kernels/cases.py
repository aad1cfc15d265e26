"""Cases named by what departs from their default; and the case of most tests, a call of `csc_encode`.

Run on a GPU if there is one, else on the CPU.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdnet.bench.layer_shapes import LayerShape
from sdnet.kernels import csc_encode, torch_path
from sdnet.kernels.coding import CODING_FIELDS, Coding, DataTerm, Solver
from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path.paths import requested_path

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Named:
    """Base of a dataclass with defaults for all fields; its str is the test's id."""

    def __str__(self) -> str:
        default = type(self)()
        named = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(named).replace(" ", "") or "default"


@dataclass(frozen=True, kw_only=True)
class CodingCase(Named):
    """The options of a coding, and whether lambda differs from sample to sample."""

    n_steps: int = 2
    mu: float = 0.0
    nonnegative: bool = True
    solver: Solver = "fista"
    data_term: DataTerm = "squared"
    n_dict: int = 1
    per_sample: bool = False

    @property
    def coding(self) -> Coding:
        return Coding(**{name: getattr(self, name) for name in CODING_FIELDS})


@dataclass(frozen=True)
class Case(CodingCase):
    """A call with half a kernel of padding, on random images and atoms."""

    channels: int = 64
    atoms: int = 64
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    size: Pair = (19, 18)
    batch: int = 5
    channels_last: bool = True
    keep_residuals: bool | None = None

    step_size: ClassVar[float] = 0.2
    lam: ClassVar[float] = 0.2

    @staticmethod
    def of(layer: LayerShape, batch: int = 4) -> "Case":
        kernel_size, stride = ((n, n) for n in (layer.kernel_size, layer.stride))
        return Case(layer.channels, layer.atoms, kernel_size, stride, layer.size, batch)

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def padding(self) -> Pair:
        return self.kernel_size[0] // 2, self.kernel_size[1] // 2

    @property
    def options(self) -> tuple[Any, ...]:
        """The options of the custom operators."""
        return *self.coding.values(), self.stride, self.padding

    def problem(self, step_size: Tensor, lam: Tensor) -> torch_path.Problem:
        """The problem of the loops below `csc_encode`."""
        return torch_path.Problem(step_size, lam, self.coding, self.stride, self.padding)

    def leaves(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """x, weight with atoms of unit norm, lam in fp32."""
        generator = torch.Generator(DEVICE).manual_seed(0)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator, device=DEVICE)
        shape = (self.atoms, self.n_dict * self.channels, *self.kernel_size)
        weight = torch.randn(shape, generator=generator, device=DEVICE)
        weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        x, weight = (tensor.to(dtype).contiguous(memory_format=self.layout) for tensor in (x, weight))
        lam = torch.linspace(0.1, 0.2, self.batch).view(-1, 1, 1, 1) if self.per_sample else torch.tensor(self.lam)
        return x.requires_grad_(), weight.requires_grad_(), lam.to(DEVICE).requires_grad_()

    def encode(self, x: Tensor, weight: Tensor, lam: Tensor, impl: str = "triton") -> Tensor:
        options = {"stride": self.stride, "padding": self.padding, "keep_residuals": self.keep_residuals}
        return csc_encode(x, weight, self.step_size, lam, impl=impl, **options, **vars(self.coding))

    def grad(self, codes: Tensor) -> Tensor:
        """A fixed random dL/dcodes, in their type."""
        return torch.randn(codes.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE).to(codes)

    def results(self, dtype: torch.dtype, impl: str) -> list[Tensor]:
        """Codes, and gradients for x, weight and lam."""
        leaves = self.leaves(dtype)
        codes = self.encode(*leaves, impl)
        codes.backward(self.grad(codes))
        return [codes.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def exact_gradients(self, leaves: Iterable[Tensor], grad: Tensor, impl: str) -> list[Tensor]:
        """Those of fp64 for x, weight and lam at the codes that `impl` finds, for dL/dcodes.

        At its own codes fp64 would differ by more than rounding: a code near the threshold may come out on its other
        side, which hardly changes the codes and takes a whole element out of a gradient.
        """
        x, weight, lam = (leaf.detach() for leaf in leaves)
        step_size = torch.tensor(self.step_size, device=DEVICE)
        options = (*self.options, impl, requested_path(), False, True)
        codes = [z.double() for z in torch.ops.sdnet.csc_forward(x, weight, step_size, lam, *options)]
        problem = self.problem(step_size.double(), lam.double())
        needs = torch_path.Needs(True, True, True)
        found = torch_path.backward(grad.double(), x.double(), weight.double(), codes, [], problem, needs)
        return [gradient for gradient in found if gradient is not None]
