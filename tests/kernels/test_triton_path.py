"""`csc_encode` with impl="triton": codes and every gradient against the fp64 reference, over a pairwise cover.

The gradients of half precision are compared with those of fp64 at the same codes: a code near the threshold may come
out on its other side, which hardly changes the codes and takes a whole element out of a gradient.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import combinations, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sdnet
from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import Pair

from . import cases
from .cases import DEVICE

pytestmark = pytest.mark.usefixtures("exact", "poisoned")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Relative RMS error."""


@dataclass(frozen=True)
class PathCase(cases.Case):
    """A small call, in one precision and by one kind of steps."""

    channels: int = 5
    atoms: int = 12
    size: Pair = (7, 6)
    batch: int = 2
    keep_residuals: bool = False
    half: bool = False
    steps: str = "fused"

    step_size = lam = 0.15

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16 if self.half else torch.float32


FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel_size": ((1, 1), (3, 3), (5, 5), (7, 7), (2, 4)),
    "stride": ((1, 1), (2, 2), (3, 3), (2, 1)),
    "size": ((9, 7), (8, 10)),
    "channels": (3, 9, 16),
    "atoms": (16, 21),
    "n_steps": (1, 2, 3, 4),
    "mu": (0.0, 0.5),
    "nonnegative": (True, False),
    "solver": ("ista", "fista", "sdnet"),
    "data_term": ("squared", "norm"),
    "n_dict": (1, 2),
    "per_sample": (False, True),
    "channels_last": (True, False),
    "keep_residuals": (False, True),
    "half": (False, True),
    "steps": ("fused", "cudnn"),
}


def pairwise_cover() -> Iterator[PathCase]:
    """Cases in which every two values of different factors meet."""
    choose = random.Random(0)
    names = list(FACTORS)

    def pairs(values: dict[str, Any]) -> set[Any]:
        return set(combinations(values.items(), 2))

    missing = {
        pair for a, b in combinations(names, 2) for pair in product(product([a], FACTORS[a]), product([b], FACTORS[b]))
    }
    while missing:
        seed = dict(choose.choice(sorted(missing, key=str)))
        candidates = [{n: seed.get(n, choose.choice(FACTORS[n])) for n in names} for _ in range(60)]
        best = max(candidates, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        yield PathCase(**best)


RISKS = {
    "several blocks of atoms and of channels": PathCase(channels=18, atoms=70, size=(4, 5)),
    "several boxes": PathCase(size=(12, 11), channels=9, batch=3),
    "several boxes, strided": PathCase(size=(17, 15), stride=(2, 2), batch=3, channels=9),
    "a stem": PathCase(kernel_size=(7, 7), stride=(2, 2), channels=3, atoms=20, size=(18, 15)),
    "a contiguous stem": PathCase(3, 20, (7, 7), (2, 2), (18, 15), channels_last=False),
    "a stem of one channel": PathCase(channels=1, atoms=3, channels_last=False),
    "one pixel": PathCase(kernel_size=(1, 1), size=(1, 1), channels=9, atoms=9),
    "phases without taps": PathCase(kernel_size=(1, 1), stride=(3, 3), size=(8, 7), channels=9, n_steps=3),
    "phases without taps, few channels": PathCase(kernel_size=(1, 1), stride=(3, 3), size=(8, 7)),
    "input that no code reaches": PathCase(kernel_size=(2, 2), stride=(4, 3), size=(9, 11), channels=9),
    "long thin atoms": PathCase(kernel_size=(16, 1), size=(17, 3), channels=9),
    "a batch of one": PathCase(batch=1, per_sample=True, n_steps=3),
    "many pairs of the weight correlation": PathCase(kernel_size=(1, 3), n_steps=8, channels=9, size=(5, 4)),
}
COVER = list(pairwise_cover())


def rms(actual: Tensor, expected: Tensor, scale: Tensor | None = None) -> float:
    """The error against the expected values, or against a scale of their own."""
    assert actual.shape == expected.shape
    assert not actual.isnan().any()
    return ((actual.double() - expected).norm() / (expected if scale is None else scale).norm().clamp_min(1e-9)).item()


def assert_near_reference(case: PathCase) -> None:
    leaves = x, weight, lam = case.leaves(case.dtype)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = case.encode(*exact, impl="reference")
    codes = case.encode(x, weight, lam)
    assert codes.dtype == case.dtype
    assert codes.is_contiguous(memory_format=case.layout)
    share = (codes != 0).double().mean().item()
    assert share > 0.05, "all codes are zero"
    grad = case.grad(codes)
    codes.backward(grad)
    if case.half:
        gradients = case.exact_gradients(leaves, grad, "triton")
    else:
        gradients = torch.autograd.grad(expected, exact, grad.double())
    tolerance = TOLERANCE[case.dtype]
    assert rms(codes.detach(), expected.detach()) <= tolerance
    for leaf, gradient in zip((x, weight), gradients[:2], strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == leaf.dtype
        assert rms(leaf.grad, gradient) <= tolerance
    # dL/dlam is a sum of both signs: its error is measured against the sum of their sizes.
    sizes = case.step_size * grad.double().abs().sum(dim=(1, 2, 3), keepdim=True)
    assert lam.grad is not None
    assert rms(lam.grad, gradients[2], sizes if case.per_sample else sizes.sum()) <= tolerance


def test_the_cover_is_pairwise() -> None:
    assert {field.name for field in fields(PathCase)} - set(FACTORS) == {"batch"}
    met = {pair for case in COVER for pair in combinations(((name, getattr(case, name)) for name in FACTORS), 2)}
    wanted = (product(product([a], FACTORS[a]), product([b], FACTORS[b])) for a, b in combinations(FACTORS, 2))
    assert all(pair in met for pairs in wanted for pair in pairs)


@pytest.mark.parametrize("case", COVER, ids=str)
def test_codes_and_gradients_over_a_pairwise_cover(case: PathCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", case.steps)
    assert_near_reference(case)


@pytest.mark.parametrize("risk", RISKS)
def test_named_risks(risk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    assert_near_reference(RISKS[risk])


@pytest.mark.parametrize(
    "risk", ["several blocks of atoms and of channels", "a stem", "a contiguous stem", "one pixel"]
)
def test_named_risks_in_half_precision(risk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    assert_near_reference(replace(RISKS[risk], half=True))


@pytest.mark.parametrize("channels_last", [True, False])
def test_an_empty_batch(channels_last: bool) -> None:
    case = PathCase(batch=0, channels_last=channels_last)
    x, weight, lam = case.leaves()
    codes = case.encode(x, weight, lam)
    assert codes.shape == (0, 12, 7, 6)
    codes.sum().backward()
    assert weight.grad is not None
    assert lam.grad is not None
    assert not weight.grad.any()
    assert lam.grad == 0


def test_other_strides_through_a_copy() -> None:
    case = PathCase(channels=9)
    x, weight, lam = (tensor.detach() for tensor in case.leaves())
    expected = case.encode(x, weight, lam)
    wide = torch.zeros(2, 18, 7, 12, device=DEVICE)
    wide[:, ::2, :, 1::2] = x
    sliced = wide[:, ::2, :, 1::2]
    turned = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(case.encode(sliced, turned, lam), expected)  # in another layout, another order


@pytest.mark.parametrize("steps", ["fused", "cudnn"])
@pytest.mark.parametrize("view", ["a column of a table", "every second of a list", "one number for all"])
def test_a_lambda_for_each_sample_may_be_any_view(view: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    case = PathCase(batch=3)
    x, weight, _ = (leaf.detach() for leaf in case.leaves())
    values = torch.tensor([0.1, 0.3, 0.2], device=DEVICE)
    lam = {
        "a column of a table": torch.stack([values, values + 5], dim=1)[:, 0],
        "every second of a list": torch.stack([values, values + 5], dim=1).flatten()[::2],
        "one number for all": values[:1].expand(3),
    }[view]
    assert not lam.is_contiguous()
    for shaped in (lam, lam.view(3, 1, 1, 1)):
        codes = case.encode(x, weight, shaped)
        assert rms(codes, case.encode(x.double(), weight.double(), lam.double(), "reference")) <= TOLERANCE[x.dtype]


def other_layout(tensor: Tensor) -> Tensor:
    """The tensor in the memory format that it is not in."""
    last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


HOOKS: dict[str, Callable[[Tensor, PathCase], Tensor]] = {
    "all": lambda tensor, case: other_layout(tensor) if tensor.ndim == 4 else tensor,
    "codes alone": lambda tensor, case: other_layout(tensor) if tensor.shape[1:2] == (case.atoms,) else tensor,
    "all at odd addresses": lambda tensor, case: at_odd_address(tensor) if tensor.ndim == 4 else tensor,
}


def at_odd_address(tensor: Tensor) -> Tensor:
    """A copy with the same strides whose first address is no multiple of 16."""
    storage = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return storage[1:].as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("steps", ["fused", "cudnn"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("changed", HOOKS)
def test_saved_tensors_may_come_back_in_another_layout(
    changed: str, channels_last: bool, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    case = PathCase(channels=9, n_steps=3, channels_last=channels_last, keep_residuals=True)
    kept, hooked = case.leaves(), case.leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: HOOKS[changed](t, case)):
        codes = case.encode(*hooked)
        codes.square().sum().backward()
    case.encode(*kept).square().sum().backward()
    for leaf, other in zip(kept, hooked, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert rms(other.grad, leaf.grad) <= 2e-6


def test_saved_tensors_of_descriptors_may_come_back_in_another_layout(
    descriptor_reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    case = PathCase(channels=16, atoms=8, size=(3, 2), batch=64, half=True)
    kept, hooked = case.leaves(case.dtype), case.leaves(case.dtype)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: HOOKS["codes alone"](t, case)):
        codes = case.encode(*hooked)
        assert descriptor_reads
        codes.backward(case.grad(codes))
    codes = case.encode(*kept)
    codes.backward(case.grad(codes))
    assert hooked[1].grad is not None
    torch.testing.assert_close([leaf.grad for leaf in hooked], [leaf.grad for leaf in kept])


def test_a_nan_stays_a_nan() -> None:
    x, weight, lam = PathCase(channels=9).leaves()
    spoiled = x.detach().clone()
    spoiled[0, 0, 3, 3] = torch.nan
    codes = PathCase(channels=9).encode(spoiled, weight.detach(), lam.detach())
    assert codes[0].isnan().any()
    assert not codes[1].isnan().any()


def test_the_same_call_gives_the_same_bits() -> None:
    case = PathCase(n_steps=3, channels=9)
    results = []
    for _ in range(2):
        leaves = case.leaves()
        case.encode(*leaves).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("lam",), ("x", "lam")], ids="-".join)
@pytest.mark.parametrize("steps", ["fused", "cudnn"])
def test_only_the_gradients_asked_for(wanted: tuple[str, ...], steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    case = PathCase(n_steps=3, data_term="norm")
    full, some = (dict(zip(("x", "weight", "lam"), case.leaves(), strict=True)) for _ in range(2))
    for name, leaf in some.items():
        leaf.requires_grad_(name in wanted)
    for leaves in (full, some):
        case.encode(leaves["x"], leaves["weight"], leaves["lam"]).square().sum().backward()
    for name, leaf in some.items():
        if name in wanted:
            torch.testing.assert_close(leaf.grad, full[name].grad)
        else:
            assert leaf.grad is None


def test_both_operators_pass_opcheck() -> None:
    case = PathCase(kernel_size=(1, 1), size=(4, 3))
    x, weight, lam = case.leaves()
    step_size = torch.tensor(case.step_size, device=DEVICE)
    options = (*Coding(mu=0.5).values(), (1, 1), (0, 0), "triton", "auto")
    torch.library.opcheck(torch.ops.sdnet.csc_forward, (x, weight, step_size, lam, *options, True, True))
    leaves = [tensor.detach() for tensor in (x, weight, step_size, lam)]
    kept = torch.ops.sdnet.csc_forward(*leaves, *options, True, True)
    assert [tuple(tensor.shape) for tensor in kept] == [(2, 5, 4, 3), (2, 12, 4, 3), (2, 12, 4, 3)]
    needs = [True, False, True]
    torch.library.opcheck(torch.ops.sdnet.csc_backward, (torch.ones_like(kept[-1]), *leaves, kept, *options, needs))


def test_compiles_to_one_graph_with_gradients() -> None:
    case = PathCase(channels=9)

    def loss(x: Tensor, weight: Tensor, lam: Tensor) -> Tensor:
        return case.encode(2 * x, weight, lam).square().sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(results[1], results[0])


def test_autocast_computes_in_half_precision() -> None:
    case = PathCase(channels=9)
    x, weight, lam = case.leaves()
    with torch.autocast(DEVICE, torch.float16):
        codes = case.encode(x, weight, lam)
    assert codes.dtype == torch.float16
    codes.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert rms(codes.detach(), case.encode(x, weight, lam).detach().double()) < 2e-3


def test_without_gradients_and_under_checkpointing() -> None:
    case = PathCase(channels=9)
    x, weight, lam = case.leaves()
    expected = case.encode(x, weight, lam)
    with torch.no_grad():
        assert torch.equal(case.encode(x, weight, lam), expected)
    expected.square().sum().backward()
    again = case.leaves()
    codes: Any = checkpoint(lambda *leaves: case.encode(*leaves), *again, use_reentrant=False)
    codes.square().sum().backward()
    for leaf, other in zip((x, weight, lam), again, strict=True):
        assert leaf.grad is not None
        assert other.grad is not None
        assert torch.equal(leaf.grad, other.grad)


class SmallNet(nn.Module):
    """Two CSC layers and a classifier."""

    def __init__(self, impl: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = sdnet.CSCConv2d(3, 8, 3, lam=0.02, input_size=(6, 6), impl=impl)
        self.layer = sdnet.CSCConv2d(8, 12, 3, stride=2, lam=0.02, input_size=(6, 6), impl=impl)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(12)])
        self.classifier = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip((self.stem, self.layer), self.norms, strict=True):
            x = norm(layer(x))
        return self.classifier(x.mean(dim=(2, 3)))


def loss_curve(impl: str) -> list[float]:
    model = SmallNet(impl).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sdnet.attach(model, optimizer)
    sdnet.refresh_step_size(model)
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(6, 3, 6, 6, generator=generator), torch.arange(6) % 4
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.slow
def test_twenty_steps_of_training_give_the_torch_path_s_losses() -> None:
    triton, torch_path = loss_curve("triton"), loss_curve("torch")
    assert torch_path[-1] < 0.5 * torch_path[0]
    assert triton == pytest.approx(torch_path, rel=1e-3)
