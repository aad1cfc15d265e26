"""The four fused steps one by one against their formulas in fp64, in every form, and the tiles that they run with."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.bench.layer_shapes import distinct_layers
from sdnet.kernels import reference
from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import Pair
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path import fused, paths, tiles
from sdnet.kernels.triton_path.fused import Layer
from sdnet.kernels.triton_path.tiles import Tiles, described

from .cases import DEVICE

pytestmark = pytest.mark.usefixtures("exact", "poisoned")

STEP, MU, BETA, NEXT_BETA = 0.3, 0.5, 0.28, 0.43
DAMPING = 1 / (1 + STEP * MU)
GAMMA = STEP * DAMPING


@dataclass(frozen=True)
class Case:
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

    def __str__(self) -> str:
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        form = "descriptors" if self.described else "channels_last" if self.channels_last else "contiguous"
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
            self.tiles,
        )

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        return tensor.contiguous(memory_format=torch.channels_last) if self.channels_last else tensor

    @property
    def tiles(self) -> Tiles | None:
        """The rules' for an interpreter, or boxes of 16 images by descriptors, which the rules have for a GPU alone."""
        if not self.described:
            return None
        wide, narrow = self.atoms, self.channels
        return Tiles(described(16, wide, narrow), described(16, narrow, wide))

    @property
    def scale(self) -> Tensor:
        """A number for each sample."""
        return torch.linspace(0.7, 1.9, self.batch, device=DEVICE).view(-1, 1, 1, 1)

    def codes(self, seed: int) -> Tensor:
        """Random codes, half of them zero."""
        return self.random(self.batch, self.atoms, *self.layer.grid, seed=seed).relu()

    def image(self, seed: int, channels: int | None = None) -> Tensor:
        return self.random(self.batch, channels or self.channels, *self.size, seed=seed)

    def analysis(self, r: Tensor) -> Tensor:
        return reference.analysis(r.double(), self.layer.weight.double(), self.stride, self.padding)

    def synthesis(self, z: Tensor) -> Tensor:
        return reference.synthesis(z.double(), self.layer.weight.double(), self.size, self.stride, self.padding)


CASES = [
    Case(),
    Case(channels_last=False),
    Case(channels=3),
    Case(channels=3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), size=(13, 12)),
    Case(channels=4, kernel_size=(5, 4), stride=(3, 2), padding=(2, 1), size=(11, 9), channels_last=False),
    Case(channels=16, atoms=16, stride=(2, 2), size=(8, 9)),
    Case(channels=33, atoms=70, kernel_size=(1, 2), padding=(0, 0), size=(5, 4)),
    Case(kernel_size=(2, 2), stride=(3, 3), padding=(1, 0), size=(9, 8), channels_last=False),
]
DESCRIBED = [
    Case(channels=16, atoms=20, described=True),
    Case(channels=12, atoms=24, batch=18, size=(4, 5), described=True),
    Case(channels=68, atoms=132, size=(3, 2), kernel_size=(1, 3), padding=(0, 1), described=True),
    Case(channels=8, atoms=16, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), size=(6, 7), described=True),
    Case(channels=8, atoms=8, kernel_size=(5, 4), stride=(3, 2), padding=(2, 1), size=(11, 9), described=True),
    Case(channels=8, atoms=8, kernel_size=(2, 2), stride=(3, 3), padding=(1, 0), size=(9, 8), described=True),
    Case(channels=8, atoms=8, kernel_size=(1, 1), padding=(2, 1), size=(1, 1), described=True),
]
"""Channels in multiples of 16 bytes; boxes of 16 images, not always full; taps and whole atoms outside the image."""

FORMS = CASES + [
    # On a GPU descriptors are for 16-bit types, and test_gpu.py has them.
    pytest.param(case, marks=pytest.mark.skipif(DEVICE == "cuda", reason="fp32 takes descriptors when interpreted"))
    for case in DESCRIBED
]


every_case = pytest.mark.parametrize("case", FORMS, ids=str)


def problem(nonnegative: bool = True, samples: int = 0) -> Problem:
    """mu > 0; one lambda for all, or one for each of so many samples."""
    lam = torch.linspace(1.5, 4.0, samples).view(-1, 1, 1, 1) if samples else torch.tensor(0.8)
    return Problem(torch.tensor(STEP, device=DEVICE), lam.to(DEVICE), Coding(3, MU, nonnegative), (1, 1), (0, 0))


def assert_near(actual: Tensor | None, expected: Tensor) -> None:
    assert actual is not None
    error = (actual.double() - expected).norm() / expected.norm()
    assert error <= 2e-6, f"{error:.1e}"


@every_case
@pytest.mark.parametrize("nonnegative", [True, False])
def test_encode(case: Case, nonnegative: bool) -> None:
    p = problem(nonnegative, samples=case.batch)
    r, z, previous, scale = case.image(1), case.codes(2), case.codes(3), case.scale
    codes, after = fused.encode(case.layer, r, p, z, previous, BETA, scale, NEXT_BETA, keep_next=True)
    y = z.double() + BETA * (z.double() - previous.double())
    v = DAMPING * y + GAMMA * scale * case.analysis(r)
    expected = reference.shrink(v, GAMMA * p.lam.double(), nonnegative)
    assert 0.1 < (codes != 0).double().mean() < 0.9
    assert_near(codes, expected)
    assert_near(after, expected + NEXT_BETA * (expected - z.double()))


@every_case
def test_the_first_step_encodes_from_zero(case: Case) -> None:
    codes, after = fused.encode(case.layer, case.image(1), problem())
    assert after is None
    assert_near(codes, reference.shrink(GAMMA * case.analysis(case.image(1)), torch.tensor(GAMMA * 0.8), True))


@every_case
@pytest.mark.parametrize("several", [False, True], ids=["one dictionary", "several"])
def test_residual(case: Case, several: bool) -> None:
    n_dict = next(n for n in (3, 2) if case.channels % n == 0) if several else 1
    x, z = case.image(1, case.channels // n_dict), case.codes(2)
    assert_near(fused.residual(case.layer, x, z, problem()), x.double().repeat(1, n_dict, 1, 1) - case.synthesis(z))


@every_case
def test_spread(case: Case) -> None:
    m, add, scale = case.codes(1), case.image(2), case.scale
    expected = GAMMA * case.synthesis(m)
    assert_near(fused.spread(case.layer, m, problem()), expected)
    assert_near(fused.spread(case.layer, m, problem(), scale, add), scale * expected + add.double())


@every_case
@pytest.mark.parametrize("at_y", [True, False])
def test_backstep(case: Case, at_y: bool) -> None:
    dr, m, z, later = case.image(1), case.codes(2), case.codes(3), case.codes(4)
    masked, d_y = fused.backstep(case.layer, dr, m, z, problem(), BETA, later, NEXT_BETA, at_y=at_y, keep_dy=at_y)
    direct, through = DAMPING * m.double(), case.analysis(dr)
    if at_y:
        assert_near(d_y, direct - through)
        g = (1 + BETA) * (direct - through) - NEXT_BETA * later.double()
    else:
        assert d_y is None
        g = (1 + BETA) * direct - through - NEXT_BETA * DAMPING * later.double()
    assert_near(masked, (z != 0) * g)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_forms_for_few_channels_and_for_many_agree(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for few in (0, 100):
        monkeypatch.setattr(tiles, "FEW", few)
        tiles.by_rule.cache_clear()
        codes, _ = fused.encode(case.layer, case.image(1), problem())
        results.append((codes, fused.residual(case.layer, case.image(1), case.codes(2), problem())))
    tiles.by_rule.cache_clear()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.skipif(DEVICE == "cuda", reason="fp32 takes descriptors when interpreted")
def test_an_input_at_an_odd_address_comes_to_descriptors_as_a_copy() -> None:
    case = DESCRIBED[0]
    r = case.image(1)
    storage = torch.empty(r.numel() + 1, device=DEVICE)
    odd = storage[1:].as_strided(r.shape, r.stride()).copy_(r)
    assert odd.data_ptr() % 16
    codes, _ = fused.encode(case.layer, odd, problem())
    assert torch.equal(codes, fused.encode(case.layer, r, problem())[0])


def test_the_step_is_read_on_the_device() -> None:
    case, p = Case(), problem()
    first, _ = fused.encode(case.layer, case.image(1), p)
    p.step_size.mul_(0.5)
    second, _ = fused.encode(case.layer, case.image(1), p)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("grid", "box"),
    [
        ((56, 56), (2, 8, 8)),
        ((28, 28), (8, 4, 4)),
        ((14, 14), (32, 2, 2)),
        ((7, 7), (128, 1, 1)),
        ((32, 32), (1, 8, 16)),
    ],
    ids=str,
)
def test_boxes_waste_nothing_where_they_need_not(grid: Pair, box: tuple[int, int, int]) -> None:
    assert tiles.box_of(128, 256, grid, 2**20) == box
    assert all(n % side == 0 for n, side in zip((256, *grid), box, strict=True))


def test_a_box_stays_within_32_bits() -> None:
    assert tiles.box_of(128, 256, (7, 7), most_images=4)[0] <= 4
    shape = tiles.Shape(2, 64, 64, (4096, 4096), (4096, 4096), (3, 3), (1, 1), 2, "ieee", True, 80)
    assert shape.most_images == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_tiles_cover_every_layer(layer: Any, arch: int) -> None:
    kernel_size, stride = ((n, n) for n in (layer.kernel_size, layer.stride))
    shape = tiles.Shape(
        256, layer.channels, layer.atoms, layer.size, layer.codes_size, kernel_size, stride, 2, "ieee", True, arch
    )  # fmt: skip
    for analysis, synthesis in tiles.candidates(shape):
        assert analysis.fits(shape)
        assert synthesis.fits(shape)
        [programs] = tiles.analysis_grid(shape, analysis)
        assert programs * analysis.pixels * analysis.channels >= 256 * prod(layer.codes_size) * layer.atoms
        programs, phases = tiles.synthesis_grid(shape, synthesis)
        assert programs * phases * synthesis.pixels * synthesis.channels >= 256 * prod(layer.size) * layer.channels


def test_descriptors_are_for_what_they_can_read() -> None:
    shape = tiles.Shape(256, 64, 256, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", True, 90)
    assert shape.described_images == 128
    assert {tile.form for tile in tiles.by_rule(shape)} == {"descriptors"}
    assert paths.path_of(shape, None).fused
    assert [shape._replace(batch=batch).described_images for batch in (64, 127, 128, 192)] == [64, 64, 128, 64]
    others = {"arch": 80, "batch": 63, "channels": 12, "atoms": 20, "itemsize": 4, "channels_last": False}
    for name, value in others.items():
        other = shape._replace(**{name: value})
        assert other.described_images == 0
        assert {tile.form for tile in tiles.by_rule(other)} == {"pointers"}
        assert not tiles.by_rule(shape).analysis.fits(other)
    assert {tile.form for tile in tiles.by_rule(shape._replace(channels=8))} == {"few"}
    assert shape._replace(size=(2048, 2048), grid=(2048, 2048)).described_images == 0  # 2^31 elements in 64 images


def test_the_rule_and_what_overrides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = tiles.Shape(256, 64, 64, (56, 56), (56, 56), (3, 3), (1, 1), 2, "ieee", True, 80)
    assert paths.path_of(shape, None).fused
    assert not paths.path_of(shape._replace(atoms=256), None).fused
    assert not paths.path_of(shape._replace(itemsize=4), None).fused
    assert not paths.path_of(shape._replace(channels_last=False), None).fused
    assert paths.path_of(shape._replace(channels=3, channels_last=False), None).fused
    large = shape._replace(arch=90)
    measured = Tiles(*(tile._replace(stages=5) for tile in tiles.by_rule(large)))
    monkeypatch.setattr(paths, "MEASURED", tmp_path)
    entry = ["cudnn", *(tile._asdict() for tile in measured)]
    paths.file_of("NVIDIA H100", tmp_path).write_text(json.dumps({paths.key_of(shape): entry}))
    assert (
        paths.path_of(shape, "NVIDIA H100").reason == "cudnn steps were the quicker ones when measured on NVIDIA H100"
    )
    assert paths.path_of(shape, "NVIDIA A100").fused
    assert paths.tiles_of(large, "NVIDIA H100") == measured
    assert paths.tiles_of(large, "NVIDIA A100") == tiles.by_rule(large)
    small = large._replace(batch=64)  # the table does not tell batches apart, and its boxes have 128 images
    assert paths.tiles_of(small, "NVIDIA H100") == tiles.by_rule(small)
    exact, tf32 = (shape._replace(itemsize=4, precision=precision) for precision in ("ieee", "tf32"))
    assert len({paths.key_of(each) for each in (shape, exact, tf32)}) == 3
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    assert paths.path_of(shape, "NVIDIA H100").fused
    monkeypatch.setenv("SDNET_TRITON_PATH", "quick")
    with pytest.raises(ValueError, match="SDNET_TRITON_PATH is 'quick'; it must be fused or cudnn"):
        paths.path_of(shape, None)
