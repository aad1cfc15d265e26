"""The tiles that a convolution can run with, and the rules that choose one by shape, type and memory.

A program makes `channels` output channels of a box of images x rows x columns pixels, `reduction` input channels at a
time. Every side is a power of two. With descriptors a box is one pixel of 128 or 64 images. With pointers it is the one
that wastes the fewest pixels on the grid at hand, and among those the most compact: 8 x 8 for 56 x 56 pixels, 2 x 2 of
32 images for 14 x 14, one pixel of 128 images for 7 x 7.
"""

from collections.abc import Callable
from functools import cache
from itertools import product
from math import ceil, prod
from typing import Literal, NamedTuple

from sdnet.kernels.reference import Pair

Form = Literal["pointers", "few", "descriptors"]
"""How a program reads its operands, and for which layers: see `implicit_gemm`."""


class Shape(NamedTuple):
    """A layer as the rules see it, on sm_`arch`; arch 0 is the interpreter."""

    batch: int
    channels: int
    atoms: int
    size: Pair
    grid: Pair
    kernel_size: Pair
    stride: Pair
    itemsize: int
    precision: str
    channels_last: bool
    arch: int

    @property
    def phases(self) -> int:
        return self.stride[0] * self.stride[1]

    @property
    def most_images(self) -> int:
        """A box's images must lie within 2^31 elements."""
        image, codes = self.channels * prod(self.size), self.atoms * prod(self.grid)
        return max(1, 2**30 // max(image, codes))

    @property
    def described_images(self) -> int:
        """Images of a box in the form "descriptors"; 0 where that form cannot or should not be."""
        able = self.arch >= 90 and self.itemsize == 2 and self.channels_last
        rows_aligned = self.channels % 8 == 0 and self.atoms % 8 == 0  # 16 bytes
        if not able or not rows_aligned or self.channels <= FEW:
            return 0
        full = [images for images in (128, 64) if images <= min(self.batch, self.most_images)]
        return min(full, key=lambda images: ceil(self.batch / images) * images, default=0)


class Tile(NamedTuple):
    """The sides of a program's work, the options of its launch, and its form."""

    images: int
    rows: int
    columns: int
    channels: int
    reduction: int
    warps: int
    stages: int
    form: Form

    def __str__(self) -> str:
        return f"{self.form} {self.sides}, {self.warps} warps, {self.stages} stages"

    @property
    def sides(self) -> str:
        return f"{self.images}.{self.rows}.{self.columns}x{self.channels}x{self.reduction}"

    @property
    def pixels(self) -> int:
        return self.images * self.rows * self.columns

    def fits(self, shape: Shape) -> bool:
        """Whether a layer can run with it."""
        if self.form == "descriptors":
            return self.images <= shape.described_images
        return self.images <= shape.most_images and (self.form == "few") == (shape.channels <= FEW)


class Tiles(NamedTuple):
    """Those of a layer's two directions: A' and A."""

    analysis: Tile
    synthesis: Tile


FEW = 8
"""The most image channels that a tap is not worth a reduction block of its own for."""


def power_of_two(n: int, least: int, most: int) -> int:
    """The least power of two that is at least n, within [least, most]."""
    return min(max(1 << (n - 1).bit_length(), least), most)


@cache
def box_of(pixels: int, batch: int, grid: Pair, most_images: int) -> tuple[int, int, int]:
    """Images, rows and columns of a box of this many pixels, of at most so many images."""
    sides = [1 << e for e in range(pixels.bit_length())]

    def waste(box: tuple[int, int, int]) -> tuple[int, int]:
        covered = 1
        for n, side in zip((batch, *grid), box, strict=True):
            covered *= ceil(n / side) * side
        return covered, box[0] * (box[1] + 2) * (box[2] + 2)

    boxes = ((pixels // (rows * columns), rows, columns) for rows, columns in product(sides, sides))
    return min((box for box in boxes if 0 < box[0] <= most_images), key=waste)


def described(images: int, columns: int, reduction: int) -> Tile:
    """One pixel of so many images, for so many channels made and reduced over."""
    # With 8 warps, Triton 3.6 makes loops over 128 channels whose wgmma ptxas serialises.
    return Tile(images, 1, 1, power_of_two(columns, 16, 128), power_of_two(reduction, 16, 64), 4, 3, "descriptors")


def _by_pointers(shape: Shape, grid: Pair, columns: int, reduction: int, form: Form, flat: bool = False) -> Tile:
    """`flat` tells that taps and channels are reduced over as one axis, whose elements are gathered one by one."""
    half = shape.itemsize == 2
    channels = power_of_two(columns, 16, 128 if half else 64)
    if not half and shape.precision == "ieee":
        # Products on the ordinary cores keep all operands in registers.
        box = box_of(64, shape.batch, grid, shape.most_images)
        return Tile(*box, min(channels, 32), 16, 4, 2, form)
    box = box_of(128, shape.batch, grid, shape.most_images)
    # A gathered element takes a register: more warps and smaller blocks hold fewer of them.
    most = 64 if half and not flat else 32
    if half and flat and not shape.channels_last and reduction > most:
        most = 16
    reduction = power_of_two(reduction, 16, most)
    warps = 8 if channels > 64 or flat or not shape.channels_last else 4
    return Tile(*box, channels, reduction, warps, 3, form)


def analysis_tile(shape: Shape) -> Tile:
    """For A': codes' grid, K columns, C channels to reduce over at each tap."""
    if images := shape.described_images:
        return described(images, shape.atoms, shape.channels)
    if shape.channels <= FEW:
        reduction = shape.channels * shape.kernel_size[0] * shape.kernel_size[1]
        return _by_pointers(shape, shape.grid, shape.atoms, reduction, "few", flat=True)
    tile = _by_pointers(shape, shape.grid, shape.atoms, shape.channels, "pointers")
    narrow = tile.columns < 4 and tile.images < tile.pixels
    if narrow and shape.itemsize == 2 and shape.channels_last:
        # With 128 channels of such a box in 8 warps, Triton 3.6 makes a loop whose wgmma ptxas serialises.
        tile = _by_pointers(shape, shape.grid, min(shape.atoms, 64), shape.channels, "pointers")
    return tile


def synthesis_tile(shape: Shape) -> Tile:
    """For A: one phase of the image's grid, C columns (of all phases if few), K channels to reduce over at each tap."""
    if images := shape.described_images:
        return described(images, shape.channels, shape.atoms)
    if shape.channels <= FEW:
        return _by_pointers(shape, _phase_grid(shape), shape.channels * shape.phases, shape.atoms, "few")
    return _by_pointers(shape, _phase_grid(shape), shape.channels, shape.atoms, "pointers")


@cache
def by_rule(shape: Shape) -> Tiles:
    """The tiles that the rules choose."""
    return Tiles(analysis_tile(shape), synthesis_tile(shape))


VARIATIONS: tuple[Callable[[Tile], Tile], ...] = (
    lambda tile: tile._replace(images=64) if tile.form == "descriptors" else tile,
    lambda tile: tile._replace(channels=min(tile.channels, 64)),
    lambda tile: tile._replace(stages=2),
    lambda tile: tile._replace(stages=4),
    lambda tile: tile._replace(warps=4),
    lambda tile: tile._replace(warps=8),
)
"""What a measurement tries, one at a time, in the place of what the rules choose."""


def candidates(shape: Shape) -> list[Tiles]:
    """What a measurement may choose from, the rules' choice first."""
    chosen = by_rule(shape)
    by_pointers = by_rule(shape._replace(arch=80))  # the same where descriptors cannot be
    varied = [Tiles(vary(chosen.analysis), vary(chosen.synthesis)) for vary in VARIATIONS]
    return list(dict.fromkeys([chosen, by_pointers, *varied]))


def _phase_grid(shape: Shape) -> Pair:
    return ceil(shape.size[0] / shape.stride[0]), ceil(shape.size[1] / shape.stride[1])


def _boxes(shape: Shape, grid: Pair, tile: Tile) -> int:
    return ceil(shape.batch / tile.images) * ceil(grid[0] / tile.rows) * ceil(grid[1] / tile.columns)


def analysis_grid(shape: Shape, tile: Tile) -> tuple[int]:
    return (_boxes(shape, shape.grid, tile) * ceil(shape.atoms / tile.channels),)


def synthesis_grid(shape: Shape, tile: Tile) -> tuple[int, int]:
    boxes = _boxes(shape, _phase_grid(shape), tile)
    if tile.form == "few":
        return boxes * ceil(shape.channels * shape.phases / tile.channels), 1
    return boxes * ceil(shape.channels / tile.channels), shape.phases
