"""`csc_encode`: the torch path against the reference, its gradients, its memory, and what the compilers make of it."""

from dataclasses import dataclass, replace
from itertools import product
from shutil import which
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from sdnet.kernels import csc_encode
from sdnet.kernels.coding import Solver
from sdnet.kernels.reference import Pair

from .cases import CodingCase


@dataclass(frozen=True)
class SmallCase(CodingCase):
    """A small problem in fp64, on the CPU."""

    kernel_size: Pair = (3, 3)
    stride: int | Pair = 1
    padding: int | Pair = 1
    size: Pair = (7, 6)
    n_steps: int = 3
    batch: int = 2
    channels: int = 2
    atoms: int = 4

    @property
    def options(self) -> tuple[Any, ...]:
        """The options of the custom operators."""
        stride, padding = (n if isinstance(n, tuple) else (n, n) for n in (self.stride, self.padding))
        return *self.coding.values(), stride, padding

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, weight with atoms of unit norm, step, lam: leaves, all but the step with gradients."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, self.channels, *self.size, dtype=torch.float64, generator=generator)
        weight = torch.randn(
            self.atoms, self.n_dict * self.channels, *self.kernel_size, dtype=torch.float64, generator=generator
        )
        weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        lam = torch.linspace(0.1, 0.2, self.batch, dtype=torch.float64).view(-1, 1, 1, 1)
        leaves = (x.to(dtype), weight.to(dtype), lam if self.per_sample else torch.tensor(0.15, dtype=torch.float64))
        x, weight, lam = (leaf.requires_grad_() for leaf in leaves)
        return x, weight, torch.tensor(0.15, dtype=torch.float64), lam

    def encode(self, x: Tensor, weight: Tensor, step_size: float | Tensor, lam: float | Tensor, impl: str) -> Tensor:
        geometry = {"stride": self.stride, "padding": self.padding}
        return csc_encode(x, weight, step_size, lam, impl=impl, **geometry, **vars(self.coding))

    def gradients(self, impl: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """The codes, and the gradients of a weighted sum of them for x, weight and lam."""
        x, weight, step_size, lam = self.tensors(dtype)
        codes = self.encode(x, weight, step_size, lam, impl)
        assert_active(codes)
        torch.sum(codes * probe(codes)).backward()
        return codes.detach(), *(gradient_of(leaf) for leaf in (x, weight, lam))


GEOMETRIES = [
    SmallCase(),
    SmallCase(size=(8, 9), stride=2),
    SmallCase(size=(9, 8), stride=3),
    SmallCase(size=(9, 7), stride=(1, 2), padding=(0, 1)),
    SmallCase(size=(8, 7), stride=(3, 2), padding=(2, 1)),
    SmallCase(kernel_size=(1, 1), padding=0),
    SmallCase(kernel_size=(1, 1), padding=0, stride=3),
    SmallCase(kernel_size=(5, 5), padding=2, stride=2),
    SmallCase(kernel_size=(7, 7), padding=3, stride=2, size=(12, 11)),
    SmallCase(kernel_size=(2, 2), padding=0, stride=2),
    SmallCase(kernel_size=(4, 2), padding=(1, 1), stride=(2, 1)),
    SmallCase(batch=1, channels=1, atoms=1),
]
METHODS = [
    SmallCase(solver=solver, n_steps=n_steps, nonnegative=nonnegative)
    for solver, n_steps, nonnegative in product(get_args(Solver), range(1, 6), (True, False))
]
OBJECTIVES = [
    SmallCase(mu=0.5),
    SmallCase(mu=0.5, nonnegative=False, solver="ista"),
    SmallCase(mu=0.5, solver="sdnet", n_steps=5, per_sample=True),
    SmallCase(data_term="norm"),
    SmallCase(data_term="norm", mu=0.5, solver="sdnet", n_steps=4, nonnegative=False, n_dict=2, per_sample=True),
    SmallCase(data_term="norm", solver="ista", stride=2),
    SmallCase(n_dict=2),
    SmallCase(n_dict=3, stride=2, nonnegative=False, solver="sdnet"),
    SmallCase(per_sample=True),
    SmallCase(per_sample=True, nonnegative=False, batch=3),
]
STRIDED = SmallCase(stride=2, per_sample=True, mu=0.5, solver="sdnet", n_steps=4, nonnegative=False)

every_case = pytest.mark.parametrize("case", dict.fromkeys([*GEOMETRIES, *METHODS, *OBJECTIVES]), ids=str)
some_cases = pytest.mark.parametrize("case", [SmallCase(), STRIDED, *OBJECTIVES[4:7]], ids=str)


def assert_active(codes: Tensor) -> None:
    """Codes that are all zero, or all nonzero, would let wrong masks and thresholds pass."""
    share = (codes != 0).double().mean().item()
    assert 0.1 < share < 0.98, f"{share:.2f} of the codes are active"


def probe(codes: Tensor) -> Tensor:
    """A fixed random dL/dcodes."""
    return torch.randn(codes.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(codes.dtype)


def gradient_of(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def assert_near(actual: Tensor, expected: Tensor, relative: float) -> None:
    """The greatest error against the greatest value."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected.double()).abs().max().item()
    assert error <= relative * expected.abs().max().item(), (
        f"error {error:.2e}, greatest value {expected.abs().max():.2e}"
    )


@every_case
def test_codes_and_gradients_equal_autograd_through_the_reference(case: SmallCase) -> None:
    for actual, expected in zip(case.gradients("torch"), case.gradients("reference"), strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("case", [*GEOMETRIES, *OBJECTIVES], ids=str)
def test_single_precision_is_near_the_double_precision_reference(case: SmallCase) -> None:
    for actual, expected in zip(case.gradients("torch", torch.float32), case.gradients("reference"), strict=True):
        assert_near(actual, expected, 1e-5)


def assert_away_from_the_kink(case: SmallCase) -> None:
    """No code of any step changes between zero and nonzero when lambda changes by a thousandth."""
    x, weight, step_size, lam = case.tensors()
    for n_steps in range(1, case.n_steps + 1):
        shorter = replace(case, n_steps=n_steps)
        below, above = (shorter.encode(x, weight, step_size, lam * f, "reference") != 0 for f in (0.999, 1.001))
        assert torch.equal(below, above)


@pytest.mark.parametrize(
    "case",
    [
        replace(case, size=(5, 4), channels=1, atoms=3)
        for case in (
            SmallCase(),
            SmallCase(solver="ista", n_steps=2, stride=2, nonnegative=False),
            SmallCase(solver="sdnet", n_steps=4, mu=0.5, n_dict=2),
            SmallCase(n_steps=4, per_sample=True, nonnegative=False),
        )
    ],
    ids=str,
)
def test_gradcheck(case: SmallCase) -> None:
    """The squared data term alone: the norm is detached, so its gradient is no derivative."""
    assert_away_from_the_kink(case)
    x, weight, step_size, lam = case.tensors()

    def encode(x: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
        return case.encode(x, weight, step_size, lam, "torch")

    assert torch.autograd.gradcheck(encode, (x, weight, lam), eps=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "wanted", [("x",), ("weight",), ("lam",), ("x", "lam"), ("x", "weight"), ("weight", "lam")], ids="-".join
)
def test_only_the_gradients_asked_for_are_computed(wanted: tuple[str, ...]) -> None:
    case = SmallCase(mu=0.5, data_term="norm")
    x, weight, step_size, lam = case.tensors()
    leaves = {"x": x, "weight": weight, "lam": lam}
    expected = dict(zip(leaves, case.gradients("reference")[1:], strict=True))
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in wanted)
    codes = case.encode(x, weight, step_size, lam, "torch")
    with profile(activities=[ProfilerActivity.CPU]) as record:
        torch.sum(codes * probe(codes)).backward()
    for name, leaf in leaves.items():
        if name in wanted:
            assert_near(gradient_of(leaf), expected[name], 1e-12)
        else:
            assert leaf.grad is None
    correlations = [event for event in record.key_averages() if event.key == "aten::convolution_backward"]
    assert bool(correlations) is ("weight" in wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_and_tensors_are_the_same_step_and_lambda(dtype: torch.dtype) -> None:
    case = SmallCase(batch=3)
    x, weight, *_ = case.tensors(dtype)
    expected = case.encode(x, weight, 0.15, 0.25, "torch")
    assert_active(expected)
    step_size = torch.tensor(0.15, dtype=dtype)
    for lam in (torch.tensor(0.25), torch.full((3,), 0.25), torch.full((3, 1, 1, 1), 0.25)):
        torch.testing.assert_close(case.encode(x, weight, step_size, lam, "torch"), expected)


def test_lambda_per_sample_reaches_its_sample_and_its_gradient_has_its_shape() -> None:
    case = SmallCase(batch=3)
    x, weight, step_size, _ = case.tensors()
    lam = torch.tensor([0.05, 0.15, 0.3], dtype=torch.float64, requires_grad=True)
    together = case.encode(x, weight, step_size, lam, "torch")
    alone = [case.encode(x[n : n + 1], weight, step_size, lam[n], "torch") for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))
    (gradient,) = torch.autograd.grad(together.sum(), lam)
    assert gradient.shape == (3,)
    assert bool((gradient < 0).all())


@some_cases
@pytest.mark.parametrize("converted", ["x", "weight", "both"])
def test_channels_last_gives_the_same_and_stays(case: SmallCase, converted: str) -> None:
    contiguous = case.gradients("torch")
    x, weight, step_size, lam = case.tensors()
    if converted != "weight":
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    if converted != "x":
        weight = weight.detach().to(memory_format=torch.channels_last).requires_grad_()
    codes = case.encode(x, weight, step_size, lam, "torch")
    assert codes.is_contiguous(memory_format=torch.channels_last)
    torch.sum(codes * probe(codes)).backward()
    results = (codes.detach(), *(gradient_of(leaf) for leaf in (x, weight, lam)))
    for actual, expected in zip(results, contiguous, strict=True):
        assert_near(actual, expected, 1e-12)


def test_contiguous_input_gives_contiguous_codes() -> None:
    codes, *_ = SmallCase().gradients("torch")
    assert codes.is_contiguous()


@some_cases
def test_residuals_kept_or_computed_again_give_the_same_gradients(
    case: SmallCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_KEEP_RESIDUALS", "0")
    again = case.gradients("torch")
    monkeypatch.setenv("SDNET_KEEP_RESIDUALS", "1")
    for actual, expected in zip(case.gradients("torch"), again, strict=True):
        assert_near(actual, expected, 1e-12)


@pytest.mark.parametrize("asked", [None, "1", "0"])
@some_cases
def test_autograd_keeps_the_input_the_dictionary_the_codes_and_unless_told_not_to_the_residuals(
    case: SmallCase, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, step_size, lam = case.tensors()
    kept: dict[int, Tensor] = {}
    monkeypatch.delenv("SDNET_KEEP_RESIDUALS", raising=False)
    if asked is not None:
        monkeypatch.setenv("SDNET_KEEP_RESIDUALS", asked)

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        codes = case.encode(x, weight, step_size, lam, "torch")
    large = sorted(tensor.numel() for tensor in kept.values() if tensor.numel() > case.batch)
    residuals = [] if asked == "0" else [case.n_dict * x.numel()] * (case.n_steps - 1)
    assert large == sorted([x.numel(), weight.numel(), *[codes.numel()] * case.n_steps, *residuals])


@some_cases
def test_both_operators_pass_opcheck(case: SmallCase) -> None:
    x, weight, step_size, lam = case.tensors()
    options = (*case.options, "torch", "auto")
    torch.library.opcheck(torch.ops.sdnet.csc_forward, (x, weight, step_size, lam, *options, False, True))
    leaves = [tensor.detach() for tensor in (x, weight, step_size, lam)]
    torch.library.opcheck(torch.ops.sdnet.csc_forward, (*leaves, *options, False, False))
    codes = torch.ops.sdnet.csc_forward(*leaves, *options, False, True)
    for needs in ([True, True, True], [False, True, False]):
        torch.library.opcheck(torch.ops.sdnet.csc_backward, (probe(codes[-1]), *leaves, codes, *options, needs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_compiler_foresees_the_layout_of_the_codes(layout: torch.memory_format) -> None:
    case = SmallCase()
    x, weight, step_size, lam = (tensor.detach() for tensor in case.tensors())
    x = x.to(memory_format=layout)
    real = case.encode(x, weight, step_size, lam, "torch")
    with FakeTensorMode() as mode:
        x, weight, step_size, lam = (mode.from_tensor(tensor) for tensor in (x, weight, step_size, lam))
        foreseen = case.encode(x, weight, step_size, lam, "torch")
    assert (foreseen.shape, foreseen.stride(), foreseen.dtype) == (real.shape, real.stride(), real.dtype)


def compiled_equals_eager(case: SmallCase, backend: str, relative: float, dtype: torch.dtype) -> None:
    def loss(x: Tensor, weight: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
        codes = case.encode(x, weight, step_size, lam, "auto").relu()
        return torch.sum(codes * probe_)

    leaves = case.tensors(dtype)
    probe_ = probe(case.encode(*leaves, "reference"))
    loss(*leaves).backward()
    expected = [gradient_of(leaf) for leaf in leaves if leaf.requires_grad]
    leaves = case.tensors(dtype)
    torch.compile(loss, backend=backend, fullgraph=True)(*leaves).backward()
    for actual, eager in zip([gradient_of(leaf) for leaf in leaves if leaf.requires_grad], expected, strict=True):
        assert_near(actual, eager, relative)


@some_cases
def test_compiles_to_one_graph_with_gradients(case: SmallCase) -> None:
    torch.compiler.reset()
    compiled_equals_eager(case, "aot_eager", 1e-12, torch.float64)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_compiles_with_inductor() -> None:
    torch.compiler.reset()
    compiled_equals_eager(SmallCase(stride=2), "inductor", 1e-5, torch.float32)


class Encoder(nn.Module):
    """csc_encode with a dictionary of its own, as export wants it."""

    def __init__(self, case: SmallCase) -> None:
        super().__init__()
        self.case = case
        _, weight, step_size, lam = case.tensors(torch.float32)
        self.weight = nn.Parameter(weight.detach())
        self.register_buffer("step_size", step_size.float())
        self.register_buffer("lam", lam.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        return self.case.encode(x, self.weight, self.get_buffer("step_size"), self.get_buffer("lam"), "reference")


@some_cases
def test_exports_through_the_reference(case: SmallCase) -> None:
    encoder = Encoder(case)
    x = case.tensors(torch.float32)[0].detach()
    program = torch.export.export(encoder, (x,))
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("sdnet" in operator for operator in operators)
    torch.testing.assert_close(program.module()(x.flip(0)), encoder(x.flip(0)))


def test_autocast_computes_in_its_type_and_gives_gradients_in_the_leaves() -> None:
    case = SmallCase(size=(12, 12))
    expected = case.gradients("reference", torch.float32)
    x, weight, step_size, lam = case.tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        codes = case.encode(x, weight, step_size, lam, "torch")
    assert codes.dtype == torch.bfloat16
    torch.sum(codes * probe(codes)).backward()
    results = (codes.detach(), *(gradient_of(leaf) for leaf in (x, weight, lam)))
    for actual, wanted in zip(results, expected, strict=True):
        # bf16 keeps 8 bits; a handful of roundings, and some codes near the threshold come out on its other side.
        assert (actual - wanted).norm() <= 0.05 * wanted.norm()
    assert gradient_of(x).dtype == gradient_of(weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_gives_half_precision_codes(dtype: torch.dtype) -> None:
    case = SmallCase(size=(12, 12))
    codes, *_ = case.gradients("reference", torch.float32)
    x, weight, step_size, lam = case.tensors(dtype)
    half = case.encode(x, weight, step_size, lam, "torch")
    assert half.dtype == dtype
    assert (half.float() - codes).norm() <= 0.05 * codes.norm()


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_an_empty_batch_gives_empty_codes_and_zero_gradients(impl: str) -> None:
    case = SmallCase(batch=0)
    x, weight, step_size, lam = case.tensors()
    codes = case.encode(x, weight, step_size, lam, impl)
    assert codes.shape == (0, 4, 7, 6)
    codes.sum().backward()
    assert gradient_of(weight).abs().max() == 0
    assert gradient_of(lam) == 0


def test_without_gradients_the_codes_are_the_same() -> None:
    case = SmallCase()
    x, weight, step_size, lam = case.tensors()
    with torch.no_grad():
        codes = case.encode(x, weight, step_size, lam, "torch")
    assert not codes.requires_grad
    assert_near(codes, case.gradients("torch")[0], 0.0)
