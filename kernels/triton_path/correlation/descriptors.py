"""The correlation by tensor descriptors, from sm_90 on, for 16-bit channels_last tensors in batches of 32 and more.

Boxes are one pixel of TB images, whatever the stride. Rows of pixels at which a tap reads the padding are left out,
and, where a program makes one tap, columns. Both operands go from shared memory straight into wgmma.
"""

import triton.language as tl

from sdnet.kernels.triton_path.correlation.pixels import share_of_split
from sdnet.kernels.triton_path.jit import constexpr, jit, jit_of_batch


@jit
def pixels_reached(tap, size, codes, stride: constexpr, padding: constexpr):
    """Return the first pixel of an axis of the codes at which a tap is inside the image, and how many there are."""
    first = (tl.maximum(padding - tap, 0) + stride - 1) // stride
    last = tl.minimum((tl.maximum(size + padding - tap, 0) + stride - 1) // stride, codes)
    return first, tl.maximum(last - first, 0)


@jit
def add_pair(totals, r, m, first, last, rows, columns, corner, taps, layer: constexpr, tile: constexpr):
    """Return totals [BA, BC] of neighbouring taps plus the correlation of one pair over the boxes first .. last - 1.

    Args:
        totals: three accumulators, of which a tile of one tap uses the first.
        r: descriptor of the images.
        m: descriptor of the codes.
        first: the first box.
        last: the box after the last.
        rows: the first row of the codes' pixels and their number; boxes are counted over these,
        columns: and over these columns.
        corner: the first atom and channel.
        taps: row and column of the first tap.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
    """
    TB: constexpr = tile.images
    BA: constexpr = tile.atoms
    BC: constexpr = tile.channels
    total0, total1, total2 = totals
    i0, count_i = rows
    j0, count_j = columns
    k0, c0 = corner
    u, v = taps
    for box in tl.range(first, last):  # pyright: ignore[reportGeneralTypeIssues]
        b, i, j = box // (count_i * count_j) * TB, i0 + box // count_j % count_i, j0 + box % count_j
        y, x = i * layer.SH - layer.PH + u, j * layer.SW - layer.PW + v
        codes = m.load([i, j, b, k0]).reshape(TB, BA).T  # [BA, TB]
        total0 = tl.dot(codes, r.load([y, x, b, c0]).reshape(TB, BC), total0)
        if tile.taps == 3:
            total1 = tl.dot(codes, r.load([y, x + 1, b, c0]).reshape(TB, BC), total1)
            total2 = tl.dot(codes, r.load([y, x + 2, b, c0]).reshape(TB, BC), total2)
    return total0, total1, total2


@jit_of_batch
def correlate_by_descriptors_kernel(
    r0, m0, r1, m1, r2, m2, scale_ptr, partial_ptr, factor, groups, sizes,
    launch: constexpr, layer: constexpr, tile: constexpr,
):  # fmt: skip
    """Write what `pointers.correlate_kernel` writes, from descriptors of [H, W, N, C] and [h, w, N, K].

    A program makes one tap, or a row of three, for which the codes are loaded once.

    Args:
        r0: descriptor of the images of the first pair.
        m0: descriptor of the codes of the first pair.
        r1: images of the second pair.
        m1: codes of the second pair.
        r2: images of the third pair.
        m2: codes of the third pair.
        scale_ptr: the scale of the HEAD pairs, one number.
        partial_ptr: partial sums [splits, K, taps, C] in fp32.
        factor: the scale of the TAIL pairs.
        groups: groups of TB images.
        sizes: H, W, h, w.
        launch: `pixels.Launch`.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
    """
    C: constexpr = layer.C
    K: constexpr = layer.K
    KW: constexpr = layer.KW
    BA: constexpr = tile.atoms
    BC: constexpr = tile.channels
    BLOCKS_A: constexpr = (K + BA - 1) // BA
    BLOCKS_C: constexpr = (C + BC - 1) // BC
    H, W, h, w = sizes
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    k0, c0 = pid % BLOCKS_A * BA, pid // BLOCKS_A % BLOCKS_C * BC
    tap = pid // (BLOCKS_A * BLOCKS_C) * tile.taps
    i0, rows = pixels_reached(tap // KW, H, h, layer.SH, layer.PH)
    j0, columns = 0, w
    if tile.taps == 1:
        j0, columns = pixels_reached(tap % KW, W, w, layer.SW, layer.PW)
    first, last = share_of_split(split, splits, groups * rows * columns)
    total0 = tl.zeros((BA, BC), tl.float32)
    total1 = tl.zeros((BA, BC), tl.float32)  # removed by the compiler unless the tile has three taps
    total2 = tl.zeros((BA, BC), tl.float32)
    PAIRS: constexpr = launch.HEAD + launch.TAIL
    for pair in tl.static_range(PAIRS):
        if pair == launch.HEAD and launch.HEAD > 0:
            ratio = tl.load(scale_ptr) / factor
            total0, total1, total2 = total0 * ratio, total1 * ratio, total2 * ratio
        r = r0 if pair == 0 else (r1 if pair == 1 else r2)
        m = m0 if pair == 0 else (m1 if pair == 1 else m2)
        total0, total1, total2 = add_pair(
            (total0, total1, total2), r, m, first, last, (i0, rows), (j0, columns), (k0, c0), (tap // KW, tap % KW),
            layer, tile,
        )  # fmt: skip
    scale = factor if launch.TAIL > 0 else tl.load(scale_ptr)
    k, c = k0 + tl.arange(0, BA), c0 + tl.arange(0, BC)
    kept = (k < K)[:, None] & (c < C)[None, :]
    target = partial_ptr + (split.to(tl.int64) * K + k)[:, None] * (layer.taps * C) + (tap * C + c)[None, :]
    tl.store(target, total0 * scale, mask=kept)
    if tile.taps == 3:
        tl.store(target + C, total1 * scale, mask=kept)
        tl.store(target + 2 * C, total2 * scale, mask=kept)
