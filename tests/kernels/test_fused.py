"""The four products of the fused path one by one against their formulas in fp64, in every form of its kernels."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from sdnet.kernels import csc_encode, reference
from sdnet.kernels.coding import Coding, Solver
from sdnet.kernels.reference import Pair
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path import tiles
from sdnet.kernels.triton_path.fused.path import FusedPath
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.tiles import Tiles, by_rule, described

from .cases import DEVICE

pytestmark = pytest.mark.usefixtures("exact", "poisoned")

STEP, MU, BETA, NEXT_BETA = 0.3, 0.5, 0.28, 0.43
DAMPING = 1 / (1 + STEP * MU)
GAMMA = STEP * DAMPING


@dataclass(frozen=True)
class LayerCase:
    """A layer; its str is the test's id."""

    channels: int = 9
    atoms: int = 20
    kernel_size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    size: Pair = (7, 6)
    batch: int = 2
    channels_last: bool = True
    described: bool = False
    swapped: bool = False

    def __str__(self) -> str:
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        described = "swapped" if self.swapped else "descriptors"
        form = described if self.described else "channels_last" if self.channels_last else "contiguous"
        return f"{self.channels}to{self.atoms}-{kh}x{kw}-s{sh}x{sw}-{form}"

    @property
    def layer(self) -> Layer:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return Layer(
            self.random(self.atoms, self.channels, *self.kernel_size),
            self.batch,
            self.size,
            self.stride,
            self.padding,
            layout,
        )

    def path(self, problem: Problem) -> FusedPath:
        """The path with the rules' tiles for an interpreter, or with boxes of 16 images by descriptors."""
        layer = self.layer
        rules = by_rule(layer.shape)
        if not self.described:  # the rules have descriptors for a GPU alone
            return FusedPath(layer, problem, rules)
        sides = 16, self.atoms, self.channels
        analysis, synthesis = (described(*sides, made)._replace(swapped=self.swapped) for made in ("atoms", "channels"))
        return FusedPath(layer, problem, Tiles(analysis, synthesis, rules[2]))

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        return tensor.contiguous(memory_format=torch.channels_last) if self.channels_last else tensor

    @property
    def scale(self) -> Tensor:
        """A number for each sample."""
        return torch.linspace(0.7, 1.9, self.batch, device=DEVICE).view(-1, 1, 1, 1)

    def codes(self, seed: int) -> Tensor:
        """Random codes, half of them zero."""
        return self.random(self.batch, self.atoms, *self.layer.codes_size, seed=seed).relu()

    def image(self, seed: int, channels: int | None = None) -> Tensor:
        return self.random(self.batch, channels or self.channels, *self.size, seed=seed)

    def analysis(self, r: Tensor) -> Tensor:
        return reference.analysis(r.double(), self.layer.weight.double(), self.stride, self.padding)

    def synthesis(self, z: Tensor) -> Tensor:
        return reference.synthesis(z.double(), self.layer.weight.double(), self.size, self.stride, self.padding)


CASES = [
    LayerCase(),
    LayerCase(channels_last=False),
    LayerCase(channels=3),
    LayerCase(channels=3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), size=(13, 12)),
    LayerCase(channels=4, kernel_size=(5, 4), stride=(3, 2), padding=(2, 1), size=(11, 9), channels_last=False),
    LayerCase(channels=16, atoms=16, stride=(2, 2), size=(8, 9)),
    LayerCase(channels=33, atoms=70, kernel_size=(1, 2), padding=(0, 0), size=(5, 4)),
    LayerCase(kernel_size=(2, 2), stride=(3, 3), padding=(1, 0), size=(9, 8), channels_last=False),
]
DESCRIBED = [
    LayerCase(channels=16, atoms=20, described=True),
    LayerCase(channels=12, atoms=24, batch=18, size=(4, 5), described=True),
    LayerCase(channels=68, atoms=132, size=(3, 2), kernel_size=(1, 3), padding=(0, 1), described=True),
    LayerCase(channels=8, atoms=16, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), size=(6, 7), described=True),
    LayerCase(channels=8, atoms=8, kernel_size=(5, 4), stride=(3, 2), padding=(2, 1), size=(11, 9), described=True),
    LayerCase(channels=8, atoms=8, kernel_size=(2, 2), stride=(3, 3), padding=(1, 0), size=(9, 8), described=True),
    LayerCase(channels=8, atoms=8, kernel_size=(1, 1), padding=(2, 1), size=(1, 1), described=True),
    LayerCase(channels=24, atoms=40, stride=(2, 2), size=(5, 4), batch=3, described=True, swapped=True),
]
"""Channels in multiples of 16 bytes; boxes of 16 images, not always full; taps and whole atoms outside the image."""

FORMS = CASES + [
    # On a GPU descriptors are for 16-bit types, and test_gpu.py has them.
    pytest.param(case, marks=pytest.mark.skipif(DEVICE == "cuda", reason="fp32 takes descriptors when interpreted"))
    for case in DESCRIBED
]


every_case = pytest.mark.parametrize("case", FORMS, ids=str)


def problem(nonnegative: bool = True, samples: int = 0, solver: Solver = "fista") -> Problem:
    """mu > 0; one lambda for all, or one for each of so many samples."""
    lam = torch.linspace(1.5, 4.0, samples).view(-1, 1, 1, 1) if samples else torch.tensor(0.8)
    return Problem(
        torch.tensor(STEP, device=DEVICE), lam.to(DEVICE), Coding(3, MU, nonnegative, solver), (1, 1), (0, 0)
    )


def assert_near(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= 2e-6, f"{error:.1e}"


@every_case
@pytest.mark.parametrize("nonnegative", [True, False])
def test_proximal_step(case: LayerCase, nonnegative: bool) -> None:
    p = problem(nonnegative, samples=case.batch)
    r, z, previous, scale = case.image(1), case.codes(2), case.codes(3), case.scale
    codes, extrapolated = case.path(p).proximal_step(r, z, previous, BETA, scale, NEXT_BETA)
    y = z.double() + BETA * (z.double() - previous.double())
    v = DAMPING * y + GAMMA * scale * case.analysis(r)
    expected = reference.shrink(v, GAMMA * p.lam.double(), nonnegative)
    assert 0.1 < (codes != 0).double().mean() < 0.9
    assert_near(codes, expected)
    assert_near(extrapolated, expected + NEXT_BETA * (expected - z.double()))


@every_case
def test_the_first_step_starts_from_zero(case: LayerCase) -> None:
    codes, extrapolated = case.path(problem()).proximal_step(case.image(1))
    assert extrapolated is None
    assert_near(codes, reference.shrink(GAMMA * case.analysis(case.image(1)), torch.tensor(GAMMA * 0.8), True))


@every_case
@pytest.mark.parametrize("several", [False, True], ids=["one dictionary", "several"])
def test_residual(case: LayerCase, several: bool) -> None:
    n_dict = next(n for n in (3, 2) if case.channels % n == 0) if several else 1
    x, z = case.image(1, case.channels // n_dict), case.codes(2)
    assert_near(case.path(problem()).residual(x, z), x.double().repeat(1, n_dict, 1, 1) - case.synthesis(z))


@every_case
def test_residual_gradient(case: LayerCase) -> None:
    m, add, scale = case.codes(1), case.image(2), case.scale
    expected, path = GAMMA * case.synthesis(m), case.path(problem())
    assert_near(path.residual_gradient(m), expected)
    assert_near(path.residual_gradient(m, scale, add), scale * expected + add.double())


@every_case
def test_codes_gradient_of_fista(case: LayerCase) -> None:
    d_residual, m, z, after = case.image(1), case.codes(2), case.codes(3), case.codes(4)
    masked, d_y = case.path(problem()).codes_gradient(d_residual, m, z, BETA, after, NEXT_BETA)
    expected = DAMPING * m.double() - case.analysis(d_residual)
    assert_near(d_y, expected)
    assert_near(masked, (z != 0) * ((1 + BETA) * expected - NEXT_BETA * after.double()))


@every_case
def test_codes_gradient_of_the_official_loop(case: LayerCase) -> None:
    d_residual, m, z, after = case.image(1), case.codes(2), case.codes(3), case.codes(4)
    path = case.path(problem(solver="sdnet"))
    masked, kept = path.codes_gradient(d_residual, m, z, BETA, after, NEXT_BETA)
    assert kept is m
    d_y, d_y_after = DAMPING * m.double(), DAMPING * after.double()
    assert_near(masked, (z != 0) * ((1 + BETA) * d_y - case.analysis(d_residual) - NEXT_BETA * d_y_after))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forms_for_few_channels_and_for_many_agree(case: LayerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for few in (0, 100):
        monkeypatch.setattr(tiles, "FEW", few)
        by_rule.cache_clear()
        path = case.path(problem())
        assert path.tiles.analysis.form == ("few" if few else "pointers")
        results.append((path.proximal_step(case.image(1))[0], path.residual(case.image(1), case.codes(2))))
    by_rule.cache_clear()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 takes descriptors when interpreted")
def test_an_input_at_an_odd_address_comes_to_descriptors_as_a_copy() -> None:
    case = DESCRIBED[0]
    r = case.image(1)
    storage = torch.empty(r.numel() + 1, device=DEVICE)
    odd = storage[1:].as_strided(r.shape, r.stride()).copy_(r)
    assert odd.data_ptr() % 16
    path = case.path(problem())
    codes, _ = path.proximal_step(odd)
    assert torch.equal(codes, path.proximal_step(r)[0])


@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 takes descriptors when interpreted")
def test_a_descriptor_refuses_a_tensor_of_another_memory_format() -> None:
    case = DESCRIBED[0]
    with pytest.raises(ValueError, match="a descriptor takes channels_last tensors alone"):
        case.path(problem()).proximal_step(case.image(1).contiguous())


@pytest.mark.parametrize("name", ["strided", "expanded"])
def test_a_lambda_for_each_sample_may_have_any_strides(name: str) -> None:
    case = LayerCase(batch=3)
    table = torch.tensor([[0.4, 9.0], [0.9, 9.0], [0.6, 9.0]], device=DEVICE)
    lam = table[:, :1] if name == "strided" else torch.tensor(0.7, device=DEVICE).expand(3, 1)
    p = problem()._replace(lam=lam.view(3, 1, 1, 1))
    codes, _ = case.path(p).proximal_step(case.image(1))
    assert_near(codes, reference.shrink(GAMMA * case.analysis(case.image(1)), GAMMA * p.lam.double(), True))


@pytest.mark.parametrize("path", ["fused", "cudnn"])
def test_a_lambda_of_the_only_atom_holds_for_every_sample(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", path)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(DEVICE) for shape in ((4, 9, 4, 4), (1, 9, 3, 3)))
    found = []
    for impl in ("triton", "reference"):
        lam = torch.full((1, 1, 1, 1), 0.4, device=DEVICE, requires_grad=True)
        codes = csc_encode(x, weight, 0.01, lam, padding=1, impl=impl)
        codes.sum().backward()
        found.append((codes, lam.grad))
    assert found[1][0].count_nonzero() > 9
    torch.testing.assert_close(*found, rtol=2e-3, atol=1e-4)


def test_the_step_size_is_read_on_the_device() -> None:
    case, p = LayerCase(), problem()
    first, _ = case.path(p).proximal_step(case.image(1))
    p.step_size.mul_(0.5)
    second, _ = case.path(p).proximal_step(case.image(1))
    assert not torch.equal(first, second)
