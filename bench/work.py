"""What a GPU has to do for the products of a layer, counted tile by tile: steps, L2 traffic and the tail of a launch.

A step of a program multiplies one block of pixels by one block of the dictionary (in the correlation, of codes by
images) and reads both from the L2 cache into shared memory. In the form "descriptors" a program leaves out the taps
that lie outside the image, so programs at the border end early. This is arithmetic, not a measurement.
"""

import heapq
from typing import NamedTuple

from sdnet.bench.layer_shapes import LayerShape
from sdnet.kernels.triton_path.candidates import PROCESSORS
from sdnet.kernels.triton_path.grids import boxes, correlation_blocks, programs_per_processor, splits_of
from sdnet.kernels.triton_path.tiles import Product, Shape, Tile, Tiles, ceil_div, step_elements

EPILOGUE = 3.0
"""What surrounds the loop of a program, in steps."""


def inside(first: int, count: int, size: int) -> int:
    """Return how many of `count` places from `first` on lie inside [0, size)."""
    before = max(-first, 0)
    return max(min(count, size - first) - before, 0)


def convolution_steps(product: Product, layer: LayerShape, shape: Shape, tile: Tile) -> list[int]:
    """Return the steps of every program of an analysis or a synthesis, in the order of the launch."""
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    analysis, few = product == "analysis", tile.form == "few"
    made, summed = (shape.atoms, shape.channels) if analysis else (shape.channels, shape.atoms)
    made_block, summed_block = (tile.atoms, tile.channels) if analysis else (tile.channels, tile.atoms)
    if few and analysis:
        summed *= shape.taps
    if few and not analysis:
        made *= shape.phases
    blocks, columns = ceil_div(summed, summed_block), ceil_div(made, made_block)
    size = shape.codes_size if analysis else shape.phase_size
    if tile.form != "descriptors":
        taps = 1 if few else shape.taps if analysis else ceil_div(kernel, stride) ** 2
        if few and not analysis:  # the rows of codes that any phase reads, and the columns
            taps = ((stride - 1 + padding) // stride - (padding - kernel) // stride) ** 2
        phases = 1 if analysis or few else shape.phases
        return [taps * blocks] * (boxes(tile, shape.batch, size) * columns * phases)
    images, steps = ceil_div(shape.batch, tile.images), []
    starts = [(0, kernel)] if analysis else [(tap, ceil_div(kernel - tap, stride)) for tap in range(stride)]
    for first_row in starts:
        for first_column in starts:
            counts = []
            for (tap, taps), pixels, source in zip(
                (first_row, first_column), size, shape.image_size if analysis else shape.codes_size, strict=True
            ):
                if analysis:
                    counts.append([inside(i * stride - padding, kernel, source) for i in range(pixels)])
                else:
                    up = ((tap - padding) % stride + padding) // stride
                    counts.append([inside(i + up - taps + 1, taps, source) for i in range(pixels)])
            steps += [
                rows * across * blocks for rows in counts[0] for across in counts[1] for _ in range(columns)
            ] * images
    return steps


def correlation_steps(shape: Shape, tile: Tile, pairs: int, processors: int) -> list[int]:
    """Return the steps of every program of the correlation."""
    blocks, count = correlation_blocks(shape, tile), boxes(tile, shape.batch, shape.codes_size)
    splits = splits_of(blocks, count, processors)
    shares = [(split + 1) * count // splits - split * count // splits for split in range(splits)]
    return [pairs * share for share in shares for _ in range(blocks)]


def efficiency(steps: list[int], slots: int) -> float:
    """Return the work of a launch over what its slots could do until it ends; a free slot takes the next program."""
    if not steps:
        return 1.0
    free = [0.0] * slots
    for work in steps:
        heapq.heapreplace(free, free[0] + work + EPILOGUE)
    return (sum(steps) + EPILOGUE * len(steps)) / (slots * max(free))


class Work(NamedTuple):
    """The work of launches: programs, steps, bytes from L2, and the share of its time that the GPU is busy."""

    programs: int
    steps: int
    l2_bytes: int
    busy: float


def work_of(product: Product, layer: LayerShape, shape: Shape, tile: Tile, pairs: int = 3) -> Work:
    """Return the work of one launch of a product on an H100; `pairs` are those of the correlation."""
    if product == "correlation":
        steps = correlation_steps(shape, tile, pairs, PROCESSORS)
    else:
        steps = convolution_steps(product, layer, shape, tile)
    slots = PROCESSORS * programs_per_processor(product, tile, shape.itemsize)
    bytes_of_step = step_elements(product, tile) * shape.itemsize
    return Work(len(steps), sum(steps), sum(steps) * bytes_of_step, efficiency(steps, slots))


def training_work(layer: LayerShape, shape: Shape, tiles: Tiles, keep_residual: bool, needs_x: bool) -> Work:
    """Return the work of two steps, forward and backward: analyses, syntheses and a correlation of three pairs."""
    counts: tuple[tuple[Product, Tile, int], ...] = (
        ("analysis", tiles.analysis, 3),
        ("synthesis", tiles.synthesis, 2 + needs_x + (not keep_residual)),
        ("correlation", tiles.correlation, 1),
    )
    found = [(work_of(product, layer, shape, tile), count) for product, tile, count in counts]
    total = sum(work.l2_bytes * count for work, count in found)
    busy = total / sum(work.l2_bytes * count / work.busy for work, count in found)  # traffic limits these kernels
    programs, steps = (sum(getattr(work, name) * count for work, count in found) for name in ("programs", "steps"))
    return Work(programs, steps, total, busy)
