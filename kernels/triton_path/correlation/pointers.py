"""The correlation by pointers: any strides, sizes and types.

A loop iterates over boxes of TB images x TH rows x TW columns. A box moves by scalars, so offsets within it are
constants of the program. The form "few" takes (tap, channel) pairs as one axis, for images of few channels (stems).
"""

import triton.language as tl

from sdnet.kernels.triton_path.correlation.pixels import share_of_split
from sdnet.kernels.triton_path.jit import constexpr, jit, jit_of_batch


@jit
def is_inside(index, size):
    """Return whether 0 <= index < size, by one unsigned comparison."""
    return index.to(tl.uint32, bitcast=True) < size


@jit
def add_pair(
    total, r_ptr, m_ptr, offsets, first, last, pixels, kept, taps, N, sizes, strides,
    layer: constexpr, tile: constexpr,
):  # fmt: skip
    """Return total [BA, BC] plus the correlation of one pair over the boxes first .. last - 1."""
    r_offset, m_offset = offsets
    b, i, j = pixels  # [BP]
    k_kept, q_kept = kept
    u, v = taps
    H, W, h, w = sizes
    rn, _, ry, rx, mn, _, mi, mj = strides
    down, across = (h + tile.rows - 1) // tile.rows, (w + tile.columns - 1) // tile.columns
    for box in tl.range(first, last):  # pyright: ignore[reportGeneralTypeIssues]
        b0 = box // (down * across) * tile.images
        i0, j0 = box // across % down * tile.rows, box % across * tile.columns
        there = (b < N - b0) & (i < h - i0) & (j < w - j0)  # [BP]
        m_base = m_ptr + (tl.cast(b0, tl.int64) * mn + tl.cast(i0, tl.int64) * mi + j0 * mj)
        m = tl.load(m_base + m_offset, mask=there[:, None] & k_kept[None, :], other=0.0)  # [BP, BA]
        y0, x0 = i0 * layer.SH - layer.PH, j0 * layer.SW - layer.PW
        if tile.form == "few":
            y, x = (i * layer.SH + y0)[:, None] + u[None, :], (j * layer.SW + x0)[:, None] + v[None, :]  # [BP, BC]
            r_kept = there[:, None] & q_kept[None, :] & is_inside(y, H) & is_inside(x, W)
        else:
            y0, x0 = y0 + u, x0 + v
            r_kept = (there & is_inside(i * layer.SH + y0, H) & is_inside(j * layer.SW + x0, W))[:, None]
            r_kept = r_kept & q_kept[None, :]
        r_base = r_ptr + (tl.cast(b0, tl.int64) * rn + tl.cast(y0, tl.int64) * ry + x0 * rx)
        r = tl.load(r_base + r_offset, mask=r_kept, other=0.0)  # [BP, BC]
        total = tl.dot(m.T, r, total, input_precision=layer.PRECISION)
    return total


@jit_of_batch
def correlate_kernel(
    r0_ptr, m0_ptr, r1_ptr, m1_ptr, r2_ptr, m2_ptr, scale_ptr, partial_ptr, factor, boxes, N, sizes, strides,
    launch: constexpr, layer: constexpr, tile: constexpr,
):  # fmt: skip
    """Write partial[split] = *scale_ptr (correlations of the HEAD pairs) + factor (those of the TAIL pairs after them).

    program_id(0) is the block, so that neighbours read the same pixels; program_id(1) the split.

    Args:
        r0_ptr: images [N, C, H, W] of the first pair.
        m0_ptr: codes [N, K, h, w] of the first pair.
        r1_ptr: images of the second pair.
        m1_ptr: codes of the second pair.
        r2_ptr: images of the third pair.
        m2_ptr: codes of the third pair.
        scale_ptr: the scale of the HEAD pairs, one number.
        partial_ptr: partial sums [splits, K, taps, C] in fp32.
        factor: the scale of the TAIL pairs.
        boxes: boxes of pixels of the codes.
        N: number of images.
        sizes: H, W, h, w.
        strides: of the images, then of the codes, four each.
        launch: `pixels.Launch`.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
    """
    C: constexpr = layer.C
    K: constexpr = layer.K
    KW: constexpr = layer.KW
    T: constexpr = layer.taps
    BA: constexpr = tile.atoms
    BC: constexpr = tile.channels
    BP: constexpr = tile.pixels
    BLOCKS_A: constexpr = (K + BA - 1) // BA
    COLUMNS: constexpr = T * C if tile.form == "few" else C
    BLOCKS_C: constexpr = (COLUMNS + BC - 1) // BC
    H, W, _, _ = sizes
    rn, rc, ry, rx, mn, mk, mi, mj = strides
    if launch.DENSE:
        rn, rc, ry, rx = H * W * C, 1, W * C, C
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, last = share_of_split(split, splits, boxes)
    k = pid % BLOCKS_A * BA + tl.arange(0, BA)  # [BA]
    q = pid // BLOCKS_A % BLOCKS_C * BC + tl.arange(0, BC)  # [BC]: (tap, channel) if few, else the channel
    p = tl.arange(0, BP)
    b, i, j = p // (tile.rows * tile.columns), p // tile.columns % tile.rows, p % tile.columns  # [BP]
    if launch.WIDE:
        k, q, b = k.to(tl.int64), q.to(tl.int64), b.to(tl.int64)
    if tile.form == "few":
        u, v = (q // C // KW).to(tl.int32), (q // C % KW).to(tl.int32)  # [BC]
        column = u * ry + v * rx + q % C * rc
        place = q
    else:
        tap = pid // (BLOCKS_A * BLOCKS_C)
        u, v = tap // KW, tap % KW
        column = q * rc
        place = tap * C + q
    r_offset = (b * rn + i * layer.SH * ry + j * layer.SW * rx)[:, None] + column[None, :]  # [BP, BC]
    m_offset = (b * mn + i * mi + j * mj)[:, None] + (k * mk)[None, :]  # [BP, BA]
    k_kept, q_kept = k < K, q < COLUMNS

    total = tl.zeros((BA, BC), tl.float32)
    PAIRS: constexpr = launch.HEAD + launch.TAIL
    for pair in tl.static_range(PAIRS):
        if pair == launch.HEAD and launch.HEAD > 0:
            total *= tl.load(scale_ptr) / factor
        r_ptr = r0_ptr if pair == 0 else (r1_ptr if pair == 1 else r2_ptr)
        m_ptr = m0_ptr if pair == 0 else (m1_ptr if pair == 1 else m2_ptr)
        total = add_pair(
            total, r_ptr, m_ptr, (r_offset, m_offset), first, last, (b, i, j), (k_kept, q_kept), (u, v), N, sizes,
            (rn, rc, ry, rx, mn, mk, mi, mj), layer, tile,
        )  # fmt: skip
    total *= factor if launch.TAIL > 0 else tl.load(scale_ptr)
    row = (split.to(tl.int64) * K + k)[:, None] * (T * C)
    tl.store(partial_ptr + row + place[None, :], total, mask=k_kept[:, None] & q_kept[None, :])
