"""How exact an implementation is: its error against fp64, which may be twice that of torch's own operators.

Or a floor, the rounding of the result itself. Run on a GPU if there is one, else on the CPU.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdnet.kernels import csc_encode, unrolled
from sdnet.kernels.reference import Pair
from sdnet.kernels.shapes import LayerShape

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEP = 0.2
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}


@dataclass(frozen=True)
class Case:
    """A problem; its str is the test's id, naming what departs from the default."""

    channels: int = 64
    atoms: int = 64
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    size: Pair = (19, 18)
    batch: int = 5
    n_steps: int = 2
    mu: float = 0.0
    nonnegative: bool = True
    solver: str = "fista"
    data_term: str = "squared"
    n_dict: int = 1
    channels_last: bool = True

    def __str__(self) -> str:
        default = Case()
        named = [f"{name}={value}" for name, value in vars(self).items() if value != getattr(default, name)]
        return "-".join(named).replace(" ", "") or "default"

    @staticmethod
    def of(layer: LayerShape, batch: int = 4) -> "Case":
        kernel_size, stride = ((n, n) for n in (layer.kernel_size, layer.stride))
        return Case(layer.channels, layer.atoms, kernel_size, stride, layer.size, batch)

    @property
    def options(self) -> dict[str, Any]:
        height, width = self.kernel_size
        names = ("mu", "n_steps", "stride", "padding", "nonnegative", "solver", "data_term", "n_dict")
        return {name: getattr(self, name, (height // 2, width // 2)) for name in names}

    def leaves(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator, device=DEVICE)
        shape = (self.atoms, self.n_dict * self.channels, *self.kernel_size)
        weight = torch.randn(shape, generator=generator, device=DEVICE)
        weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x, weight = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight))
        return [x.requires_grad_(), weight.requires_grad_(), torch.tensor(0.2, device=DEVICE).requires_grad_()]

    def encode(self, leaves: list[Tensor], impl: str) -> Tensor:
        x, weight, lam = leaves
        return csc_encode(x, weight, STEP, lam, impl=impl, **self.options)

    def grad(self, codes: Tensor) -> Tensor:
        """A fixed random dL/dcodes in fp32."""
        return torch.randn(codes.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)

    def results(self, dtype: torch.dtype, impl: str) -> list[Tensor]:
        """Codes, and gradients for x, weight and lam."""
        leaves = self.leaves(dtype)
        codes = self.encode(leaves, impl)
        codes.backward(self.grad(codes).to(dtype).to(codes.dtype))
        return [codes.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def errors(case: Case, dtype: torch.dtype, impl: str) -> dict[str, float]:
    """The codes' error against the reference, and the gradients' against those of fp64 at the same codes.

    A code near the threshold may come out on its other side: the codes hardly change, a gradient loses an element.
    """
    codes, *gradients = case.results(dtype, impl)
    exact = [leaf.detach().double() for leaf in case.leaves(dtype)]
    x, weight, lam = case.leaves(dtype)
    step = torch.tensor(STEP, device=DEVICE)
    with torch.no_grad():
        every = torch.ops.sdnet.csc_forward(x, weight, step, lam, *case.options.values(), impl, False, True)
        problem = unrolled.Problem(step.double(), exact[2], **case.options)
        grad = case.grad(codes).to(dtype).double()
        needs = unrolled.Needs(True, True, True)
        every = [z.double() for z in every]
        expected = [g for g in unrolled.backward(grad, exact[0], exact[1], every, [], problem, needs) if g is not None]
        found = {"codes": (codes, case.encode(exact, "reference"))}
    found |= dict(zip(("x", "weight", "lam"), zip(gradients, expected, strict=True), strict=True))
    # dL/dlam is a sum of both signs: its error is measured against the sum of their sizes.
    scales = {name: exact.norm().clamp_min(1e-9) for name, (_, exact) in found.items()} | {
        "lam": STEP * grad.abs().sum()
    }
    return {name: ((actual.double() - exact).norm() / scales[name]).item() for name, (actual, exact) in found.items()}


def assert_as_exact_as_torch(case: Case, dtype: torch.dtype, lam_floor: float = 0.0) -> None:
    """By the rule above; `lam_floor` is one for dL/dlam, above the type's own."""
    ours, theirs = errors(case, dtype, "triton"), errors(case, dtype, "torch")
    allowed = {name: max(2 * error, FLOOR[dtype]) for name, error in theirs.items()}
    allowed["lam"] = max(allowed["lam"], lam_floor)
    assert all(error <= allowed[name] for name, error in ours.items()), f"{ours}, torch's {theirs}"
