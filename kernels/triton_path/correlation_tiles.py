"""How `correlation` cuts its work: rules by shape, type and layout, without a search."""

from typing import NamedTuple

from sdnet.kernels.reference import Pair


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and 16, which a matrix instruction wants."""
    return 1 << (max(n, 16) - 1).bit_length()


class Tile(NamedTuple):
    """How pass 1 cuts the work: boxes of pixels, a block of atoms x columns, and the options of the launch."""

    descriptors: bool
    flat: bool
    taps: int
    box: tuple[int, int, int]
    atoms: int
    columns: int
    num_warps: int
    num_stages: int

    def blocks(self, atoms: int, channels: int, taps: int) -> int:
        """Programs for one split."""
        columns = ceil_div(taps * channels, self.columns) if self.flat else ceil_div(channels, self.columns)
        return ceil_div(atoms, self.atoms) * columns * (1 if self.flat else taps // self.taps)

    def boxes(self, batch: int, grid: Pair) -> int:
        """Boxes that cover the codes' pixels."""
        images, rows, columns = self.box
        return ceil_div(batch, images) * ceil_div(grid[0], rows) * ceil_div(grid[1], columns)


class Shape(NamedTuple):
    """What a tile is chosen by. `last` tells that channels lie last in memory, `aligned` that descriptors can."""

    batch: int
    channels: int
    atoms: int
    kernel_size: Pair
    grid: Pair
    itemsize: int
    last: bool
    aligned: bool


def box_of(pixels: int, shape: Shape) -> tuple[int, int, int]:
    """Images x rows x columns, `pixels` in all, that cover the codes with little waste.

    Many images of one pixel where channels lie last; else long rows, along which memory runs.
    """

    def cost(box: tuple[int, int, int]) -> float:
        waste = 1.0
        for size, length in zip(box, (shape.batch, *shape.grid), strict=True):
            waste *= ceil_div(length, size) * size / length
        return waste * (1 + (1 / box[0] if shape.last else 8 / box[2]))

    powers = [1 << n for n in range(pixels.bit_length())]
    return min(((b, pixels // (b * w), w) for b in powers for w in powers if b * w <= pixels), key=cost)


def tile_of(shape: Shape, arch: int) -> Tile:
    """The tile for a shape on sm_`arch`; arch 0 is the interpreter, which likes few large programs."""
    taps = shape.kernel_size[0] * shape.kernel_size[1]
    flat = shape.channels < 32
    width = power_of_two(shape.channels * (taps if flat else 1))
    atoms = power_of_two(shape.atoms)
    if arch == 0:
        return Tile(False, flat, 1, box_of(64, shape), min(atoms, 64), min(width, 64), 4, 1)
    if arch >= 90 and shape.aligned and not flat and shape.batch >= 32:
        images = 64 if shape.batch >= 64 else 32
        if min(shape.channels, shape.atoms) <= 64:
            row = 3 if shape.kernel_size[1] == 3 else 1
            return Tile(True, False, row, (images, 1, 1), 64, 64, 4, 3)
        return Tile(True, False, 1, (images, 1, 1), 128, 128, 8, 3)
    pixels = 128 // shape.itemsize
    box = box_of(pixels, shape)
    # Small blocks and many threads where 16-bit elements are gathered one by one, through registers.
    if not shape.last:
        return Tile(False, flat, 1, box, min(atoms, 64), min(width, 64), 8, 3)
    if min(shape.channels, shape.atoms) <= 64:
        return Tile(False, flat, 1, box, min(atoms, 64), min(width, 64), 8 if flat else 4, 3)
    return Tile(False, flat, 1, box, 128, 128, 8, 3)


def splits_of(blocks: int, boxes: int, processors: int) -> int:
    """Splits of the pixel axis, few, that give the processors two programs each and leave few idle at the end."""

    def use(splits: int) -> float:
        rounds = blocks * splits / processors
        return min(1.0, rounds / 2) * rounds / -(-blocks * splits // processors)

    candidates = range(1, max(1, min(boxes, 8 * processors // blocks)) + 1)
    return next((splits for splits in candidates if use(splits) >= 0.9), max(candidates, key=use))
