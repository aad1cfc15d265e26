"""How a kernel cuts its work into programs, and the rules that choose it by shape, type and memory format.

Every product of a layer has three axes: pixels, atoms and channels. The kernels differ in the axis that they sum over:

    analysis     A'r   [pixels, atoms]      sums over channels and taps
    synthesis    A z   [pixels, channels]   sums over atoms and taps
    correlation  dW    [atoms, channels]    sums over pixels

A `Tile` gives the block of each axis. A block of pixels is a box of images x rows x columns of the codes (of one phase
of the image in the synthesis). Every side is a power of two, as Triton requires.
"""

from functools import cache
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from sdnet.kernels.reference import Pair

Form = Literal["pointers", "few", "descriptors"]
"""How a program reads its operands: see `fused.forms`."""

Product = Literal["analysis", "synthesis", "correlation"]

Box = tuple[int, int, int]
"""Images, rows and columns of a block of pixels."""

LEAST_BLOCK = 16
"""The least side of a block that `tl.dot` multiplies."""

FEW = 8
"""The most channels for the form "few", in which taps and channels are one axis.

Otherwise each tap has a block of channels of its own. Up to 8 channels would fill at most half of the least block.
"""

VECTOR = 4
"""Channels that a thread loads at a time where the number of channels is a multiple: 8 bytes in 16 bits."""

MOST_SHARED = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
"""The most shared memory of a program, in KiB, by compute capability; 99 on others from 8.0 on."""


class Shape(NamedTuple):
    """A layer as the rules see it: a batch of images [batch, channels, *image_size] and a dictionary of `atoms`.

    Attributes:
        batch: number of images.
        channels: image channels of the dictionary.
        atoms: number of atoms.
        image_size: height and width of the images.
        codes_size: height and width of the codes.
        kernel_size: height and width of the atoms.
        stride: vertical and horizontal stride.
        itemsize: bytes of an element.
        precision: "tf32" or "ieee", the products of fp32 tensors.
        channels_last: whether the channels of a pixel are neighbours in memory.
        arch: compute capability, 90 for 9.0; 0 for the interpreter.
        aligned: whether addresses and strides are multiples of 16 bytes, apart from the channels'.
    """

    batch: int
    channels: int
    atoms: int
    image_size: Pair
    codes_size: Pair
    kernel_size: Pair
    stride: Pair
    itemsize: int
    precision: str
    channels_last: bool
    arch: int
    aligned: bool = True

    @property
    def taps(self) -> int:
        """Number of taps of an atom."""
        return prod(self.kernel_size)

    @property
    def phases(self) -> int:
        """Number of phases of the synthesis: image rows and columns modulo the stride."""
        return prod(self.stride)

    @property
    def phase_size(self) -> Pair:
        """Height and width of a phase of the image."""
        return ceil_div(self.image_size[0], self.stride[0]), ceil_div(self.image_size[1], self.stride[1])

    @property
    def most_images(self) -> int:
        """The most images of a box whose offsets are of 32 bits."""
        image, codes = self.channels * prod(self.image_size), self.atoms * prod(self.codes_size)
        return max(1, 2**30 // max(image, codes))

    @property
    def padded(self) -> "Shape":
        """The layer with channels of zeros, if it has few channels: see `padding`."""
        return self._replace(channels=padded_channels(self.channels))

    @property
    def describable(self) -> bool:
        """Whether tensor descriptors (TMA, from sm_90 on) can read the operands."""
        able = self.arch >= 90 and self.itemsize == 2 and self.channels_last and self.aligned
        return able and self.channels % 8 == 0 and self.atoms % 8 == 0 and self.channels > FEW  # 8 elements: 16 bytes

    @property
    def described_images(self) -> int:
        """Images of a box of the form "descriptors" in the convolutions; 0 where another form is chosen."""
        full = [images for images in (128, 64) if images <= min(self.batch, self.most_images)]
        if not self.describable:
            return 0
        return min(full, key=lambda images: ceil_div(self.batch, images) * images, default=0)


class Tile(NamedTuple):
    """The block of each axis, and the options of the launch. Kernels take it as one compile-time constant.

    Attributes:
        form: how operands are read.
        images: images of a block of pixels.
        rows: rows of a block of pixels.
        columns: columns of a block of pixels.
        atoms: block of atoms.
        channels: block of channels. In the form "few" the axis holds (tap, channel) pairs, in the synthesis
            (phase, channel) pairs.
        warps: warps of a program.
        stages: stages of the software pipeline.
        taps: neighbouring taps that one program of the correlation makes.
        swapped: whether a program of the form "descriptors" makes the transpose of its block, so that the pixels are
            the columns of the product. Few atoms or channels then still fill the widest instruction.
    """

    form: Form
    images: int
    rows: int
    columns: int
    atoms: int
    channels: int
    warps: int
    stages: int
    taps: int = 1
    swapped: bool = False

    def __str__(self) -> str:
        extra = f", {self.taps} taps" * (self.taps > 1) + ", swapped" * self.swapped
        return f"{self.form} {self.sides}, {self.warps} warps, {self.stages} stages{extra}"

    @property
    def sides(self) -> str:
        """The blocks of pixels, atoms and channels, as tables show them."""
        return f"{self.images}.{self.rows}.{self.columns}x{self.atoms}x{self.channels}"

    @property
    def pixels(self) -> int:
        """Number of pixels of a block."""
        return self.images * self.rows * self.columns

    @property
    def options(self) -> dict[str, int]:
        """The options of a launch."""
        return {"num_warps": self.warps, "num_stages": self.stages}


class Tiles(NamedTuple):
    """The tiles of a layer's three kinds of products."""

    analysis: Tile
    synthesis: Tile
    correlation: Tile

    def fitted(self, shape: Shape) -> "Tiles":
        """Return these tiles, with the rules' in the place of those that a layer cannot run with."""
        rules = by_rule(shape)
        return Tiles(
            self.analysis if fits_convolution("analysis", self.analysis, shape) else rules.analysis,
            self.synthesis if fits_convolution("synthesis", self.synthesis, shape) else rules.synthesis,
            self.correlation if fits_correlation(self.correlation, shape) else rules.correlation,
        )


def step_elements(product: Product, tile: Tile) -> int:
    """Return the elements of the operands that one step of a product's loop reads."""
    if product == "analysis":
        return (tile.pixels + tile.atoms) * tile.channels
    if product == "synthesis":
        return (tile.pixels + tile.channels) * tile.atoms
    return tile.pixels * (tile.atoms + tile.taps * tile.channels)


def shared_bytes(product: Product, tile: Tile, itemsize: int) -> int:
    """Return the shared memory of a program of the form "descriptors": the operands of a step for each stage."""
    return tile.stages * step_elements(product, tile) * itemsize


def most_shared(arch: int) -> int:
    """Return the most shared memory of a program in bytes."""
    return 1024 * MOST_SHARED.get(arch, 99)


def fits_convolution(product: Product, tile: Tile, shape: Shape) -> bool:
    """Whether the analysis or the synthesis of a layer can run with a tile; a batch need not fill a box of images."""
    if tile.form == "descriptors":
        able = shape.describable and tile.rows == tile.columns == 1 and tile.images <= min(256, shape.most_images)
        return able and shared_bytes(product, tile, shape.itemsize) < most_shared(shape.arch)
    return tile.images <= shape.most_images and (tile.form == "few") == (shape.channels <= FEW)


def fits_correlation(tile: Tile, shape: Shape) -> bool:
    """Whether the correlation of a layer can run with a tile."""
    if tile.form == "descriptors":
        taps = tile.taps == 1 or tile.taps == 3 == shape.kernel_size[1]
        able = shape.describable and tile.rows == tile.columns == 1 and taps
        return able and shared_bytes("correlation", tile, shape.itemsize) < most_shared(shape.arch)
    return tile.taps == 1 and (tile.form == "few") == (shape.channels <= FEW)


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def padded_channels(channels: int) -> int:
    """Return the number of channels with those of zeros, up to a multiple of `VECTOR`, where they are few."""
    return ceil_div(channels, VECTOR) * VECTOR if channels <= FEW else channels


def power_of_two(n: int, most: int, least: int = LEAST_BLOCK) -> int:
    """Return the least power of two that is at least n, within [least, most]."""
    return min(max(1 << (n - 1).bit_length(), least), most)


@cache
def box_of(
    pixels: int, batch: int, size: Pair, most_images: int, preference: Literal["compact", "images", "rows"]
) -> Box:
    """Return the box of so many pixels that covers [batch, *size] with little waste.

    Args:
        pixels: number of pixels, a power of two.
        batch: number of images.
        size: height and width of the plane.
        most_images: the most images of a box.
        preference: "compact" takes, of the boxes that waste least, the one whose taps share most pixels. "images"
            prefers many images of one pixel and "rows" long rows, and both accept some waste for it.
    """
    sides = [1 << e for e in range(pixels.bit_length())]

    def cost(box: Box) -> tuple[float, int]:
        images, rows, columns = box
        covered = prod(ceil_div(n, side) * side for n, side in zip((batch, *size), box, strict=True))
        if preference == "compact":
            return covered, images * (rows + 2) * (columns + 2)
        return covered * (1 + (1 / images if preference == "images" else 8 / columns)), images

    boxes = ((pixels // (rows * columns), rows, columns) for rows, columns in product(sides, sides))
    return min((box for box in boxes if 0 < box[0] <= most_images), key=cost)


def described(images: int, atoms: int, channels: int, made: Literal["atoms", "channels"]) -> Tile:
    """Return the tile of one pixel of so many images; `made` is the axis that the product does not sum over."""
    # With 8 warps, Triton 3.6 compiles loops over 128 channels in which ptxas serialises wgmma.
    most = {"atoms": 128 if made == "atoms" else 64, "channels": 128 if made == "channels" else 64}
    blocks = power_of_two(atoms, most["atoms"]), power_of_two(channels, most["channels"])
    return Tile("descriptors", images, 1, 1, *blocks, warps=4, stages=3)


class Blocks(NamedTuple):
    """A box of pixels and the blocks of the axes that a convolution makes and sums over, with its launch options."""

    box: Box
    made: int
    summed: int
    warps: int
    stages: int


def _by_pointers(shape: Shape, size: Pair, made: int, summed: int, gathered: bool = False) -> Blocks:
    """Return the blocks of a convolution by pointers; `gathered` sums over (tap, channel) pairs, loaded one by one."""
    half = shape.itemsize == 2
    made = power_of_two(made, 128 if half else 64)
    if not half and shape.precision == "ieee":
        # Products on the ordinary cores keep all operands in registers.
        return Blocks(box_of(64, shape.batch, size, shape.most_images, "compact"), min(made, 32), 16, 4, 2)
    box = box_of(128, shape.batch, size, shape.most_images, "compact")
    # A gathered element takes a register: more warps and smaller blocks hold fewer of them.
    most = 64 if half and not gathered else 32
    if half and gathered and not shape.channels_last and summed > most:
        most = LEAST_BLOCK
    warps = 8 if made > 64 or gathered or not shape.channels_last else 4
    return Blocks(box, made, power_of_two(summed, most), warps, 3)


def _is_narrow(box: Box) -> bool:
    """Return whether a box has several pixels of an image, in rows of fewer than 4."""
    return box[2] < 4 and box[1] * box[2] > 1


def analysis_tile(shape: Shape) -> Tile:
    """Return the tile of A'."""
    if images := shape.described_images:
        return described(images, shape.atoms, shape.channels, "atoms")
    if shape.channels <= FEW:
        box, made, summed, warps, stages = _by_pointers(
            shape, shape.codes_size, shape.atoms, shape.channels * shape.taps, gathered=True
        )
        return Tile("few", *box, made, summed, warps, stages)
    box, made, summed, warps, stages = _by_pointers(shape, shape.codes_size, shape.atoms, shape.channels)
    if _is_narrow(box) and shape.itemsize == 2 and shape.channels_last:
        # With 128 atoms of such a box in 8 warps, Triton 3.6 compiles a loop in which ptxas serialises wgmma.
        box, made, summed, warps, stages = _by_pointers(shape, shape.codes_size, min(shape.atoms, 64), shape.channels)
    return Tile("pointers", *box, made, summed, warps, stages)


def synthesis_tile(shape: Shape) -> Tile:
    """Return the tile of A: one phase of the image, or with few channels all phases."""
    if images := shape.described_images:
        tile = described(images, shape.atoms, shape.channels, "channels")
        # With 4 warps, Triton 3.7 spills registers of 128 columns on sm_100.
        return tile._replace(warps=8) if shape.arch >= 100 and tile.channels == 128 else tile
    few = shape.channels <= FEW
    columns = shape.channels * (shape.phases if few else 1)
    box, made, summed, warps, stages = _by_pointers(shape, shape.phase_size, columns, shape.atoms)
    if _is_narrow(box) and shape.itemsize == 4:
        warps = 8  # with 4, Triton 3.6 spills registers of the epilogue on sm_80
    if shape.itemsize == 4 and shape.arch < 90:
        stages = 2  # with 3, Triton 3.7 spills registers of a box of 8 x 8 on sm_80
    return Tile("few" if few else "pointers", *box, summed, made, warps, stages)


def correlation_tile(shape: Shape) -> Tile:
    """Return the tile of the weight gradient."""
    few = shape.channels <= FEW
    form: Form = "few" if few else "pointers"
    columns = shape.channels * (shape.taps if few else 1)
    small = power_of_two(shape.atoms, 64), power_of_two(columns, 64)
    preference = "images" if shape.channels_last else "rows"
    if shape.arch == 0:  # the interpreter runs a few large programs faster than many small ones
        return Tile(form, *box_of(64, shape.batch, shape.codes_size, 64, preference), *small, 4, 1)
    narrow = min(shape.channels, shape.atoms) <= 64
    if shape.describable and shape.batch >= 32:
        images = 64 if shape.batch >= 64 else 32
        if not narrow:
            return Tile("descriptors", images, 1, 1, 128, 128, 8, 3)
        # wgmma multiplies 64 rows at least, so fewer atoms are filled up with zeros. With three taps, Triton 3.7 spills
        # registers on sm_100.
        taps = 3 if shape.kernel_size[1] == 3 and shape.arch < 100 else 1
        return Tile("descriptors", images, 1, 1, 64, 64, 4, 3, taps)
    pixels = 128 // shape.itemsize
    box = box_of(pixels, shape.batch, shape.codes_size, pixels, preference)
    if few and shape.channels_last and shape.channels % VECTOR == 0:
        # Asynchronous copies of VECTOR channels: no registers hold them, so few threads make a large block.
        return Tile(form, *box, small[0], power_of_two(columns, 128), 4, 3)
    # Small blocks and many threads where 16-bit elements are gathered one by one, through registers.
    if not shape.channels_last or narrow:
        # With 3 stages, Triton 3.6 spills registers of 16-bit channels_last operands on sm_80.
        stages = 2 if shape.arch < 90 and shape.itemsize == 2 and shape.channels_last else 3
        return Tile(form, *box, *small, 8 if few or not shape.channels_last else 4, stages)
    return Tile(form, *box, 128, 128, 8, 3)


@cache
def by_rule(shape: Shape) -> Tiles:
    """Return the tiles that the rules choose."""
    return Tiles(analysis_tile(shape), synthesis_tile(shape), correlation_tile(shape))
