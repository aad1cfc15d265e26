"""Tensors of more than 2^31 elements, under the interpreter: the last images come out as they do alone.

Only the last programs of each launch run, and only the memory that they touch is ever handed out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import Pair
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path import pointwise
from sdnet.kernels.triton_path.correlation.weight_gradient import weight_correlation
from sdnet.kernels.triton_path.fused.path import FusedPath
from sdnet.kernels.triton_path.grids import boxes
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.tiles import by_rule

from ..triton_interpreter.grid import Index, last, only
from ..triton_interpreter.numerics import needs_interpreter
from .test_correlation import DESCRIPTORS, FEW, POINTERS

pytestmark = needs_interpreter

TAIL = 3
"""How many images have values, and are compared. The others are memory that nobody has touched: zeros."""


@pytest.fixture(autouse=True, scope="module")
def _room() -> None:
    try:
        reserved = [torch.empty(9 * 2**30, dtype=torch.uint8) for _ in range(8)]
    except RuntimeError as error:
        pytest.skip(f"the system does not lend 72 GB of memory that is not touched: {error}")
    del reserved


@dataclass(frozen=True)
class LayerCase:
    """A layer; its str is the test's id."""

    channels: int = 16
    atoms: int = 16
    kernel_size: Pair = (3, 3)
    stride: int = 1
    size: int = 8
    channels_last: bool = True
    described: bool = False

    def __str__(self) -> str:
        form = "descriptors" if self.described else "channels_last" if self.channels_last else "contiguous"
        return f"{self.channels} channels-{form}"

    @property
    def padding(self) -> Pair:
        return self.kernel_size[0] // 2, self.kernel_size[1] // 2

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def image(self) -> tuple[int, int, int]:
        return self.channels, self.size, self.size

    @property
    def codes(self) -> tuple[int, int, int]:
        return self.atoms, self.size // self.stride, self.size // self.stride

    @property
    def batch(self) -> int:
        """So many images that the last ones lie beyond 2^31 elements, in the images and in the codes.

        Those that have values are in the last box of 128 images, which is not full.
        """
        return (2**31 // min(prod(self.image), prod(self.codes)) // 128 + 1) * 128 + TAIL + 1

    @property
    def programs(self) -> int:
        """So many that the last ones make the last images: one for a pixel of many images, or else for whole images."""
        return self.size**2 if self.described else 4

    def weight(self) -> Tensor:
        weight = random(self.atoms, self.channels, *self.kernel_size, seed=0) / prod(self.kernel_size)
        return weight.contiguous(memory_format=self.layout)

    def layer(self, batch: int) -> Layer:
        strides = (self.stride, self.stride)
        return Layer(self.weight(), batch, (self.size, self.size), strides, self.padding, self.layout)

    def large(self, shape: tuple[int, int, int], seed: int) -> Tensor:
        """A batch of whose images the last have values."""
        tensor = torch.empty(self.batch, *shape, dtype=torch.float16, memory_format=self.layout)
        tensor[-TAIL:] = random(TAIL, *shape, seed=seed)
        assert tensor[:-TAIL].numel() > 2**31
        return tensor


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


POINTWISE = [LayerCase(), LayerCase(channels_last=False)]
CASES = [
    *POINTWISE,
    *(LayerCase(3, 16, (7, 7), stride=2, size=16, channels_last=channels_last) for channels_last in (True, False)),
    LayerCase(size=4, described=True),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Iterator[LayerCase]:
    """A case; one for descriptors as on sm_90, where a few images alone come by pointers."""
    reads = request.getfixturevalue("descriptor_reads") if request.param.described else []
    yield request.param
    assert bool(reads) == request.param.described


def end(tensor: Tensor) -> Tensor:
    """The last images as a tensor of their own."""
    return tensor[-TAIL:].clone()


def assert_the_end_as_alone(case: LayerCase, step: Callable[..., tuple[Tensor | None, ...]], *tensors: Tensor) -> None:
    """`step` of a path, whose problem has one lambda for each sample, and the tensors."""
    lam, strides = torch.linspace(0.1, 0.9, case.batch).view(-1, 1, 1, 1), (case.stride, case.stride)
    problem = Problem(torch.tensor(0.3), lam, Coding(n_steps=3, mu=0.5), strides, case.padding)
    with only(last(case.programs)):
        large = step(path_of(case.layer(case.batch), problem), *tensors)
    alone = step(path_of(case.layer(TAIL), problem._replace(lam=end(lam))), *map(end, tensors))
    for many, few in zip(large, alone, strict=True):
        assert many is not None
        assert few is not None
        assert many[:-TAIL].numel() > 2**31
        assert few.any()
        torch.testing.assert_close(many[-TAIL:], few)


def path_of(layer: Layer, problem: Problem) -> FusedPath:
    return FusedPath(layer, problem, by_rule(layer.shape))


def scales(case: LayerCase) -> Tensor:
    return torch.linspace(0.5, 1.5, case.batch).view(-1, 1, 1, 1)


def test_proximal_step(case: LayerCase) -> None:
    def step(path: FusedPath, r: Tensor, z: Tensor, previous: Tensor, scale: Tensor) -> Any:
        return path.proximal_step(r, z, previous, 0.28, scale, 0.43)

    codes = [case.large(case.codes, seed) for seed in (2, 3)]
    assert_the_end_as_alone(case, step, case.large(case.image, 1), *codes, scales(case))


def test_codes_gradient(case: LayerCase) -> None:
    def step(path: FusedPath, dr: Tensor, m: Tensor, z: Tensor, later: Tensor) -> Any:
        return path.codes_gradient(dr, m, z, 0.28, later, 0.43)

    codes = [case.large(case.codes, seed) for seed in (2, 3, 4)]
    assert_the_end_as_alone(case, step, case.large(case.image, 1), *codes)


def test_residual(case: LayerCase) -> None:
    def step(path: FusedPath, x: Tensor, z: Tensor) -> Any:
        return (path.residual(x, z),)

    assert_the_end_as_alone(case, step, case.large(case.image, 1), case.large(case.codes, 2))


@pytest.mark.parametrize("case", [replace(case, channels=32) for case in POINTWISE], indirect=True, ids=str)
def test_residual_of_two_dictionaries(case: LayerCase) -> None:
    def step(path: FusedPath, x: Tensor, z: Tensor) -> Any:
        return (path.residual(x, z),)

    x = replace(case, channels=16).large((16, case.size, case.size), 1)
    assert_the_end_as_alone(case, step, x, case.large(case.codes, 2))


def test_residual_gradient(case: LayerCase) -> None:
    def step(path: FusedPath, m: Tensor, scale: Tensor, add: Tensor) -> Any:
        return (path.residual_gradient(m, scale, add),)

    assert_the_end_as_alone(case, step, case.large(case.codes, 1), scales(case), case.large(case.image, 2))


@pytest.mark.parametrize("case", POINTWISE, indirect=True, ids=str)
def test_pointwise_kernels(case: LayerCase) -> None:
    def steps(path: FusedPath, v: Tensor, z: Tensor, previous: Tensor, doubled: Tensor) -> Any:
        return (
            pointwise.shrink_step(v, path.problem, z, previous, 0.4),
            pointwise.mask(v, z, minus=previous),
            pointwise.subtract(v, z),
            pointwise.subtract(v, doubled, n_dict=2),
        )

    codes = [case.large(case.codes, seed) for seed in (1, 2, 3)]
    twice = case.large((2 * case.atoms, *case.codes[1:]), 4)
    assert_the_end_as_alone(case, steps, *codes, twice)


TILES = {
    "few": FEW._replace(images=16, rows=8, columns=8),
    "pointers": POINTERS._replace(images=16, rows=8, columns=8),
    "descriptors": DESCRIPTORS._replace(images=512),
}
BOXES = 64
"""How many boxes a split has, of which the last runs: 8 x 8 pixels of 512 images, or 1024 images."""


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [(name, channels_last) for name in TILES for channels_last in (True, False)[: 1 if name == "descriptors" else 2]],
)
def test_weight_correlation(name: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case, tile = LayerCase(kernel_size=(1, 1), channels_last=channels_last), TILES[name]

    def select(kernel: str, grid: Index) -> list[Index]:
        splits = range(grid[1]) if kernel == "add_splits_kernel" else [grid[1] - 1]
        return [(x, y, 0) for x in range(grid[0]) for y in splits]

    # The partial sums of splits that do not run are zeros.
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    r, m = case.large(case.image, 1), case.large(case.codes, 2)
    options = ((1, 1), (0, 0), "ieee", tile)
    splits = boxes(tile, case.batch, case.codes[1:]) // BOXES
    with only(select):
        large = weight_correlation([(r, m, -1.0)], case.weight(), *options, splits)
    alone = weight_correlation([(end(r), end(m), -1.0)], case.weight(), *options)
    torch.testing.assert_close(large, alone)
