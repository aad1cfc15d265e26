"""On a GPU: the Triton kernels compiled, where bf16, tf32, races, graphs and large tensors are real.

Run with `pytest -m gpu`. An error is measured against fp64 and may be twice that of torch's own operators in the same
type, or a floor: the rounding of the result itself.
"""

import os
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.kernels import csc_encode, unrolled
from sdnet.kernels.reference import Pair
from sdnet.kernels.shapes import LayerShape, distinct_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels, not interpreted ones"
    ),
]

STEP = 0.2
FLOOR = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
DTYPES = pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype).removeprefix("torch."))


@dataclass(frozen=True)
class Case:
    """A problem on the GPU; its str is the test's id."""

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
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(self.batch, self.channels, *self.size, generator=generator, device="cuda")
        shape = (self.atoms, self.n_dict * self.channels, *self.kernel_size)
        weight = torch.randn(shape, generator=generator, device="cuda")
        weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        x, weight = (tensor.to(dtype).contiguous(memory_format=layout) for tensor in (x, weight))
        return [x.requires_grad_(), weight.requires_grad_(), torch.tensor(0.2, device="cuda").requires_grad_()]

    def encode(self, leaves: list[Tensor], impl: str) -> Tensor:
        x, weight, lam = leaves
        return csc_encode(x, weight, STEP, lam, impl=impl, **self.options)

    def grad(self, codes: Tensor) -> Tensor:
        """A fixed random dL/dcodes in fp32."""
        return torch.randn(codes.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda")

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
    step = torch.tensor(STEP, device="cuda")
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


def assert_as_exact_as_torch(case: Case, dtype: torch.dtype) -> None:
    ours, theirs = errors(case, dtype, "triton"), errors(case, dtype, "torch")
    allowed = {name: max(2 * error, FLOOR[dtype]) for name, error in theirs.items()}
    assert all(error <= allowed[name] for name, error in ours.items()), f"{ours}, torch's {theirs}"


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Any:
    """The precision of fp32 products for the time of a test."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = request.param
    yield request.param
    cudnn.conv.fp32_precision = before


CASES = [
    Case(),
    Case(channels_last=False),
    Case(channels=48, atoms=136, stride=(2, 2)),
    Case(channels=17, atoms=21, stride=(3, 2), kernel_size=(5, 4)),
    Case(channels=3, kernel_size=(7, 7), stride=(2, 2), size=(37, 50)),
    Case(channels=3, kernel_size=(7, 7), stride=(2, 2), size=(37, 50), channels_last=False),
    Case(n_steps=4, solver="fista", mu=0.5, nonnegative=False),
    Case(n_steps=4, solver="sdnet", data_term="norm", n_dict=2),
    Case(n_steps=3, solver="ista", batch=1),
]


@pytest.mark.parametrize("steps", ["fused", "pointwise"])
@pytest.mark.parametrize("precision", ["ieee"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
@DTYPES
def test_as_exact_as_torch(
    case: Case, dtype: torch.dtype, precision: str, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_STEPS", steps)
    assert_as_exact_as_torch(case, dtype)


@pytest.mark.parametrize("precision", ["tf32"], indirect=True)
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_tf32_as_exact_as_torch_s(case: Case, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_STEPS", "fused")
    assert_as_exact_as_torch(case, torch.float32)


@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_every_layer_in_bf16(layer: LayerShape, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_STEPS", "fused")
    assert_as_exact_as_torch(Case.of(layer), torch.bfloat16)


def test_auto_takes_triton() -> None:
    case = Case()
    assert torch.equal(case.results(torch.bfloat16, "auto")[0], case.results(torch.bfloat16, "triton")[0])


def test_the_same_call_gives_the_same_bits() -> None:
    case = Case(batch=32)
    first, second = (case.results(torch.bfloat16, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("steps", ["fused", "pointwise"])
def test_a_training_step_in_a_cuda_graph(steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_STEPS", steps)
    case = Case()
    leaves = case.leaves(torch.bfloat16)

    def run() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        codes = case.encode(leaves, "triton")
        codes.float().square().sum().backward()
        return codes

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes = run()
    fresh = torch.randn_like(leaves[0])
    with torch.no_grad():
        leaves[0].copy_(fresh)
    graph.replay()
    replayed = [tensor.detach().clone() for tensor in (codes, *(leaf.grad for leaf in leaves)) if tensor is not None]
    eager = [run(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    assert len(replayed) == 4
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_nothing_waits_for_the_device() -> None:
    case = Case()
    expected, *_ = case.results(torch.bfloat16, "triton")
    leaves, grad = case.leaves(torch.bfloat16), case.grad(expected).to(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.encode(leaves, "triton").backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_tensors_past_two_to_the_31_elements(
    channels: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last samples of a large batch come out as they do alone."""
    monkeypatch.setenv("SDNET_STEPS", "fused")
    batch, size = 2**31 // (64 * 128 * 128) + 8, (128, 128)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of free memory")
    case = Case(channels=channels, kernel_size=(1, 1), size=size, batch=1, channels_last=channels_last)
    _, weight, lam = (leaf.detach() for leaf in case.leaves(torch.bfloat16))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(batch, channels, *size, dtype=torch.bfloat16, device="cuda", memory_format=layout).normal_()
    codes = case.encode([x, weight, lam], "triton")
    assert codes.numel() > 2**31
    alone = case.encode([x[-3:].contiguous(memory_format=layout), weight, lam], "triton")
    assert torch.equal(codes[-3:], alone)


def test_compiled_with_inductor() -> None:
    case = Case()
    expected = case.results(torch.bfloat16, "triton")
    leaves = case.leaves(torch.bfloat16)

    def encode(x: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
        return case.encode([x, weight, lam], "triton")

    codes = torch.compile(encode, fullgraph=True)(*leaves)
    codes.backward(case.grad(codes).to(codes.dtype))
    for a, b in zip([codes.detach(), *(leaf.grad for leaf in leaves)], expected, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b)
