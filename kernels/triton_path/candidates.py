"""The tiles that a measurement may choose from for a layer.

The rules of `tiles` come first. Every other candidate changes one thing: the tile of both convolutions, or that of the
correlation. What each change should bring is written in docs/kernels.md, before any GPU has measured it.
"""

from collections.abc import Callable
from functools import cache

from sdnet.kernels.triton_path.grids import programs_of, programs_per_processor
from sdnet.kernels.triton_path.tiles import Product, Shape, Tile, Tiles, by_rule, fits_convolution, fits_correlation

PROCESSORS = 132
"""Multiprocessors of the GPU that candidates are listed for unless another number is given: an H100's."""

Change = Callable[[Product, Tile], Tile]


def made(product: Product, tile: Tile, block: int) -> Tile:
    """Return the tile of a convolution with this block of the axis that the product makes."""
    return tile._replace(atoms=block) if product == "analysis" else tile._replace(channels=block)


def made_block(product: Product, tile: Tile) -> int:
    """Return the block of the axis that a convolution makes."""
    return tile.atoms if product == "analysis" else tile.channels


DESCRIBED: tuple[Change, ...] = (
    lambda product, tile: made(product, tile, 256)._replace(warps=8),
    lambda product, tile: tile._replace(images=256, warps=8),
    lambda product, tile: tile._replace(swapped=made_block(product, tile) <= 64),
    lambda product, tile: tile._replace(images=256, warps=8, swapped=made_block(product, tile) <= 64),
    lambda product, tile: tile._replace(images=64),
    lambda product, tile: tile._replace(stages=2),
    lambda product, tile: tile._replace(stages=4),
    lambda product, tile: tile._replace(warps=8),
)
"""Changes to the convolutions of the form "descriptors"."""

OTHERS: tuple[Change, ...] = (
    lambda product, tile: tile._replace(atoms=min(tile.atoms, 64), channels=min(tile.channels, 64)),
    lambda product, tile: tile._replace(stages=2),
    lambda product, tile: tile._replace(stages=4),
    lambda product, tile: tile._replace(warps=4),
    lambda product, tile: tile._replace(warps=8),
)
"""Changes to the convolutions of the other forms."""

CORRELATION: tuple[Callable[[Tile], Tile], ...] = (
    lambda tile: tile._replace(atoms=128, channels=256, warps=8, taps=1),
    lambda tile: tile._replace(atoms=128, channels=128, warps=8, taps=3, stages=2),
    lambda tile: tile._replace(taps=1),
)
"""Changes to the correlation of the form "descriptors"."""


@cache
def candidates(shape: Shape, processors: int = PROCESSORS) -> list[Tiles]:
    """Return the tiles that a measurement may choose from, the rules' choice first.

    A larger tile is listed where its programs still occupy every multiprocessor, and one of 64 images where the rules'
    programs are fewer than two for each that the GPU runs at a time.

    Args:
        shape: the layer.
        processors: multiprocessors of the GPU.
    """
    chosen, found = by_rule(shape), []
    by_pointers = by_rule(shape._replace(arch=80))  # the same where descriptors are not chosen
    if by_pointers != chosen:
        found.append(chosen._replace(analysis=by_pointers.analysis, synthesis=by_pointers.synthesis))
    for change in DESCRIBED if chosen.analysis.form == "descriptors" else OTHERS:
        varied: list[Tile] = []
        products: tuple[tuple[Product, Tile], ...] = (("analysis", chosen.analysis), ("synthesis", chosen.synthesis))
        for product, tile in products:
            other = change(product, tile)
            able = fits_convolution(product, other, shape) and is_useful(product, shape, tile, other, processors)
            varied.append(other if able else tile)
        found.append(chosen._replace(analysis=varied[0], synthesis=varied[1]))
    if chosen.correlation.form == "descriptors":
        for change in CORRELATION:
            other = change(chosen.correlation)
            if fits_correlation(other, shape) and is_useful(
                "correlation", shape, chosen.correlation, other, processors
            ):
                found.append(chosen._replace(correlation=other))
    return list(dict.fromkeys([chosen, *found]))


def is_useful(product: Product, shape: Shape, tile: Tile, other: Tile, processors: int) -> bool:
    """Whether another tile than the rules' can be quicker, by the number of programs and the size of the layer."""
    if other.form != "descriptors":
        return True
    if product == "analysis" and other.warps == 8 and other.atoms >= 128 and serialises_wgmma():
        return False
    if product != "correlation" and other.pixels < tile.pixels:
        slots = processors * programs_per_processor(product, tile, shape.itemsize)
        return programs_of(product, shape, tile, processors) < 2 * slots
    if product != "synthesis" and other.atoms > max(64, shape.atoms):
        return False
    if product != "analysis" and other.channels > max(64, shape.channels):
        return False
    return other.pixels <= shape.batch and programs_of(product, shape, other, processors) >= processors


@cache
def serialises_wgmma() -> bool:
    """Whether ptxas serialises wgmma in an analysis of 8 warps and 128 atoms: with Triton before 3.7."""
    from triton import __version__

    return tuple(int(part) for part in __version__.split(".")[:2]) < (3, 7)
