"""How many programs a tile makes of a layer, how many of them a GPU runs at a time, and how the pixels are split."""

from functools import cache
from math import prod

from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path.tiles import Product, Shape, Tile, ceil_div, shared_bytes


def boxes(tile: Tile, batch: int, size: Pair) -> int:
    """Return the number of boxes that cover the pixels of [batch, *size]."""
    return ceil_div(batch, tile.images) * ceil_div(size[0], tile.rows) * ceil_div(size[1], tile.columns)


@cache
def analysis_programs(shape: Shape, tile: Tile) -> tuple[int]:
    """Return the launch grid of the analysis."""
    return (boxes(tile, shape.batch, shape.codes_size) * ceil_div(shape.atoms, tile.atoms),)


@cache
def synthesis_programs(shape: Shape, tile: Tile) -> tuple[int, int]:
    """Return the launch grid of the synthesis; its second axis is the phase."""
    pixels = boxes(tile, shape.batch, shape.phase_size)
    if tile.form == "few":
        return pixels * ceil_div(shape.channels * shape.phases, tile.channels), 1
    return pixels * ceil_div(shape.channels, tile.channels), shape.phases


@cache
def correlation_blocks(shape: Shape, tile: Tile) -> int:
    """Return the number of blocks of the weight gradient: programs for one split of the pixels."""
    if tile.form == "few":
        columns = ceil_div(shape.taps * shape.channels, tile.channels)
    else:
        columns = ceil_div(shape.channels, tile.channels) * (shape.taps // tile.taps)
    return ceil_div(shape.atoms, tile.atoms) * columns


REGISTERS, THREADS, SHARED = 65536, 2048, 228 * 1024
"""Registers, threads and bytes of shared memory of a multiprocessor, an H100's."""


def programs_of(product: Product, shape: Shape, tile: Tile, processors: int) -> int:
    """Return the number of programs of a product's launch on a GPU of so many multiprocessors."""
    if product == "analysis":
        return prod(analysis_programs(shape, tile))
    if product == "synthesis":
        return prod(synthesis_programs(shape, tile))
    blocks = correlation_blocks(shape, tile)
    return blocks * splits_of(blocks, boxes(tile, shape.batch, shape.codes_size), processors)


def programs_per_processor(product: Product, tile: Tile, itemsize: int) -> int:
    """Return how many programs one multiprocessor runs at a time, estimated from what they need of it.

    Registers are those of the accumulators and what the compiled kernels need beside them; see the reports of
    `bench.compile_check`.
    """
    threads = 32 * tile.warps
    if product == "correlation":
        registers = 40 + tile.atoms * tile.channels * tile.taps / threads
    else:
        registers = 40 + 1.6 * tile.pixels * (tile.atoms if product == "analysis" else tile.channels) / threads
    by_registers = int(REGISTERS / (threads * min(registers, 255)))
    by_shared = SHARED // (shared_bytes(product, tile, itemsize) + 1024)
    return max(1, min(by_registers, by_shared, THREADS // threads))


@cache
def splits_of(blocks: int, boxes: int, processors: int) -> int:
    """Return the least number of splits of the pixels that keeps the multiprocessors busy.

    Args:
        blocks: programs for one split.
        boxes: boxes of pixels, the most splits.
        processors: multiprocessors, each of which runs two programs at a time.
    """

    def use(splits: int) -> float:
        rounds = blocks * splits / processors
        return min(1.0, rounds / 2) * rounds / ceil_div(blocks * splits, processors)

    options = range(1, max(1, min(boxes, 8 * processors // blocks)) + 1)
    return next((splits for splits in options if use(splits) >= 0.9), max(options, key=use))
