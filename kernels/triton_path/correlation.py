"""The gradient of the dictionary: all correlations of a layer in one deterministic reduction.

For pairs of a residual r [N, C, H, W] and codes m [N, K, h, w], each with a scale s,

    dW[k, c, u, v] = sum over pairs of  s  sum over n, i, j of  m[n, k, i, j] r[n, c, i S + u - P, j S + v - P].

As a matrix product: atoms x pixels times pixels x (tap, channel). Pass 1 cuts the pixel axis into splits; a program
makes one [BA, BC] block of one split, for all pairs by consecutive loops into the same accumulators, and writes it in
fp32 to partial[split, K, taps, C]. Pass 2 adds the splits in a fixed order. No atomics: the same call gives the same
bits.

A loop walks over boxes of pixels, TB images x TH rows x TW columns. A box moves by scalars, so that offsets within it
are constants of the program. Two forms of pass 1:
  * pointers: any strides, sizes and types. FLAT takes (tap, channel) as one axis, for images of few channels (stems).
  * descriptors (sm_90 on): boxes of one pixel of TB images, whatever the stride. Rows of pixels at which a tap reads
    padding are left out, and, where a program makes one tap, columns. Both operands go from shared memory straight
    into wgmma. For 16-bit channels_last tensors, batches of 32 and more.

Offsets are 64-bit where a tensor passes 2^31 elements.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path.correlation_tiles import Shape, Tile, ceil_div, splits_of, tile_of
from sdnet.kernels.triton_path.descriptors import ALIGNMENT, pixel_boxes
from sdnet.kernels.triton_path.hardware import arch_of, processors_of

jit: Any = triton.jit  # calls between kernels, and launches, are beyond a type checker

Correlated = tuple[Tensor, Tensor, Tensor | float]
"""A residual [N, C, H, W], codes [N, K, h, w] and the scale of their correlation, 0-d fp32 or a number."""

PAIRS = 3
"""Pairs per launch: two steps need three. More run as further launches that share pass 2."""

SPLITS, REDUCED = 32, 64
"""The block of pass 2, splits x elements: many programs, for few elements can have hundreds of splits."""


@jit
def inside(index, size):
    """0 <= index < size, by one unsigned comparison."""
    return index.to(tl.uint32, bitcast=True) < size


@jit
def share(split, splits, boxes):
    """The first box of this split and of the next."""
    split = split.to(tl.int64)
    return (split * boxes // splits).to(tl.int32), ((split + 1) * boxes // splits).to(tl.int32)


@jit
def add_pair(
    total, r_ptr, m_ptr, r_offset, m_offset, first, last, b, i, j, k_kept, q_kept, u, v, N, H, W,
    rn, ry, rx, mn, mi, mj,
    GH: tl.constexpr, GW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    FLAT: tl.constexpr, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total [BA, BC] plus the correlation of one pair over boxes first .. last - 1."""
    DOWN: tl.constexpr = (GH + TH - 1) // TH
    ACROSS: tl.constexpr = (GW + TW - 1) // TW
    for box in tl.range(first, last):  # pyright: ignore[reportGeneralTypeIssues]
        b0, i0, j0 = box // (DOWN * ACROSS) * TB, box // ACROSS % DOWN * TH, box % ACROSS * TW
        kept = (b < N - b0) & (i < GH - i0) & (j < GW - j0)  # [BP]
        m_base = m_ptr + (tl.cast(b0, tl.int64) * mn + tl.cast(i0, tl.int64) * mi + j0 * mj)
        m = tl.load(m_base + m_offset, mask=kept[:, None] & k_kept[None, :], other=0.0)  # [BP, BA]
        y0, x0 = i0 * SH - PH, j0 * SW - PW
        if FLAT:
            y, x = (i * SH + y0)[:, None] + u[None, :], (j * SW + x0)[:, None] + v[None, :]  # [BP, BC]
            r_kept = kept[:, None] & q_kept[None, :] & inside(y, H) & inside(x, W)
        else:
            y0, x0 = y0 + u, x0 + v
            r_kept = (kept & inside(i * SH + y0, H) & inside(j * SW + x0, W))[:, None] & q_kept[None, :]
        r_base = r_ptr + (tl.cast(b0, tl.int64) * rn + tl.cast(y0, tl.int64) * ry + x0 * rx)
        r = tl.load(r_base + r_offset, mask=r_kept, other=0.0)  # [BP, BC]
        total = tl.dot(m.T, r, total, input_precision=PRECISION)
    return total


@jit
def correlate_kernel(
    r0_ptr, m0_ptr, r1_ptr, m1_ptr, r2_ptr, m2_ptr, scale_ptr, partial_ptr, factor, boxes, N, H, W,
    rn, rc, ry, rx, mn, mk, mi, mj,
    GH: tl.constexpr, GW: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    WIDE: tl.constexpr, FLAT: tl.constexpr, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr,
    BA: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partial[split] = *scale_ptr (correlations of the first HEAD pairs) + factor (those of the TAIL pairs after them).

    program_id(0) is the block, so that neighbours read the same pixels; program_id(1) the split.
    """
    T: tl.constexpr = KH * KW
    BLOCKS_A: tl.constexpr = (K + BA - 1) // BA
    COLUMNS: tl.constexpr = T * C if FLAT else C
    BLOCKS_C: tl.constexpr = (COLUMNS + BC - 1) // BC
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first, last = share(split, splits, boxes)
    k = pid % BLOCKS_A * BA + tl.arange(0, BA)  # [BA]
    q = pid // BLOCKS_A % BLOCKS_C * BC + tl.arange(0, BC)  # [BC]: (tap, channel) if FLAT, else the channel
    p = tl.arange(0, TB * TH * TW)
    b, i, j = p // (TH * TW), p // TW % TH, p % TW  # [BP]
    if WIDE:
        k, q, b = k.to(tl.int64), q.to(tl.int64), b.to(tl.int64)
    if FLAT:
        u, v = (q // C // KW).to(tl.int32), (q // C % KW).to(tl.int32)  # [BC]
        column = u * ry + v * rx + q % C * rc
        place = q
    else:
        tap = pid // (BLOCKS_A * BLOCKS_C)
        u, v = tap // KW, tap % KW
        column = q * rc
        place = tap * C + q
    r_offset = (b * rn + i * SH * ry + j * SW * rx)[:, None] + column[None, :]  # [BP, BC]
    m_offset = (b * mn + i * mi + j * mj)[:, None] + (k * mk)[None, :]  # [BP, BA]
    k_kept, q_kept = k < K, q < COLUMNS

    total = tl.zeros((BA, BC), tl.float32)
    for pair in tl.static_range(HEAD + TAIL):
        if pair == HEAD and HEAD > 0:
            total *= tl.load(scale_ptr) / factor
        r_ptr = r0_ptr if pair == 0 else (r1_ptr if pair == 1 else r2_ptr)
        m_ptr = m0_ptr if pair == 0 else (m1_ptr if pair == 1 else m2_ptr)
        total = add_pair(
            total, r_ptr, m_ptr, r_offset, m_offset, first, last, b, i, j, k_kept, q_kept, u, v, N, H, W,
            rn, ry, rx, mn, mi, mj, GH, GW, SH, SW, PH, PW, FLAT, TB, TH, TW, PRECISION,
        )  # fmt: skip
    total *= factor if TAIL > 0 else tl.load(scale_ptr)
    row = (split.to(tl.int64) * K + k)[:, None] * (T * C)
    tl.store(partial_ptr + row + place[None, :], total, mask=k_kept[:, None] & q_kept[None, :])


@jit
def reaching(tap, size, grid: tl.constexpr, stride: tl.constexpr, padding: tl.constexpr):
    """The pixels of an axis of the codes' grid at which a tap is inside the image: the first and their number."""
    first = (tl.maximum(padding - tap, 0) + stride - 1) // stride
    last = tl.minimum((tl.maximum(size + padding - tap, 0) + stride - 1) // stride, grid)
    return first, tl.maximum(last - first, 0)


@jit
def add_pair_by_descriptors(
    total0, total1, total2, r, m, first, last, i0, rows, j0, columns, k0, c0, u, v,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    TAPS: tl.constexpr, TB: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """totals [BA, BC] of TAPS neighbouring taps plus the correlation of one pair over boxes first .. last - 1.

    Boxes are counted over rows i0 .. i0 + rows - 1 and columns j0 .. j0 + columns - 1 of the codes' grid.
    """
    for box in tl.range(first, last):  # pyright: ignore[reportGeneralTypeIssues]
        b, i, j = box // (rows * columns) * TB, i0 + box // columns % rows, j0 + box % columns
        y, x = i * SH - PH + u, j * SW - PW + v
        codes = m.load([i, j, b, k0]).reshape(TB, BA).T  # [BA, TB]
        total0 = tl.dot(codes, r.load([y, x, b, c0]).reshape(TB, BC), total0)
        if TAPS == 3:
            total1 = tl.dot(codes, r.load([y, x + 1, b, c0]).reshape(TB, BC), total1)
            total2 = tl.dot(codes, r.load([y, x + 2, b, c0]).reshape(TB, BC), total2)
    return total0, total1, total2


@jit
def correlate_by_descriptors_kernel(
    r0, m0, r1, m1, r2, m2, scale_ptr, partial_ptr, factor, groups, H, W,
    GH: tl.constexpr, GW: tl.constexpr, C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    TAPS: tl.constexpr, TB: tl.constexpr, BA: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """As correlate_kernel, from descriptors of views [H, W, N, C] and [h, w, N, K] with boxes of one pixel.

    `groups` of TB images. A program makes TAPS taps, 1 or (for 3 columns of taps) a row of 3, for which the codes are
    loaded once.
    """
    BLOCKS_A: tl.constexpr = (K + BA - 1) // BA
    BLOCKS_C: tl.constexpr = (C + BC - 1) // BC
    pid, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    k0, c0 = pid % BLOCKS_A * BA, pid // BLOCKS_A % BLOCKS_C * BC
    tap = pid // (BLOCKS_A * BLOCKS_C) * TAPS
    i0, rows = reaching(tap // KW, H, GH, SH, PH)
    j0, columns = 0, GW
    if TAPS == 1:
        j0, columns = reaching(tap % KW, W, GW, SW, PW)
    first, last = share(split, splits, groups * rows * columns)
    total0 = tl.zeros((BA, BC), tl.float32)
    total1 = tl.zeros((BA, BC), tl.float32)  # unused, and then removed, unless TAPS is 3
    total2 = tl.zeros((BA, BC), tl.float32)
    for pair in tl.static_range(HEAD + TAIL):
        if pair == HEAD and HEAD > 0:
            ratio = tl.load(scale_ptr) / factor
            total0, total1, total2 = total0 * ratio, total1 * ratio, total2 * ratio
        r = r0 if pair == 0 else (r1 if pair == 1 else r2)
        m = m0 if pair == 0 else (m1 if pair == 1 else m2)
        total0, total1, total2 = add_pair_by_descriptors(
            total0, total1, total2, r, m, first, last, i0, rows, j0, columns, k0, c0, tap // KW, tap % KW,
            SH, SW, PH, PW, TAPS, TB, BA, BC,
        )  # fmt: skip
    scale = factor if TAIL > 0 else tl.load(scale_ptr)
    k, c = k0 + tl.arange(0, BA), c0 + tl.arange(0, BC)
    kept = (k < K)[:, None] & (c < C)[None, :]
    target = partial_ptr + (split.to(tl.int64) * K + k)[:, None] * (KH * KW * C) + (tap * C + c)[None, :]
    tl.store(target, total0 * scale, mask=kept)
    if TAPS == 3:
        tl.store(target + C, total1 * scale, mask=kept)
        tl.store(target + 2 * C, total2 * scale, mask=kept)


@jit
def add_splits_kernel(
    partial_ptr, out_ptr, splits, numel, ok, oc, ou, ov,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """out[k, c, u, v] = sum over splits of partial[split, k, u, v, c], in a fixed order."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)  # [BE]
    s = tl.arange(0, BS)
    total = tl.zeros((BE,), tl.float32)
    for s0 in tl.range(0, splits, BS):
        kept = (s < splits - s0)[:, None] & (e < numel)[None, :]
        partial = tl.load(partial_ptr + (s0 + s).to(tl.int64)[:, None] * numel + e[None, :], mask=kept, other=0.0)
        total += tl.sum(partial, axis=0)  # [BS, BE] -> [BE]
    tap = e // C % (KH * KW)
    offset = e // (KH * KW * C) * ok + e % C * oc + tap // KW * ou + tap % KW * ov
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=e < numel)


def launches_of(pairs: Sequence[Correlated]) -> Iterator[tuple[list[Correlated], list[Correlated]]]:
    """The pairs cut into launches of at most PAIRS: some with one scale on the device, then some with one number.

    Between the two the accumulator is multiplied by scale / number, so pairs of the number zero are left out.
    """
    on_device: dict[int, list[Correlated]] = {}
    numbers: dict[float, list[Correlated]] = {}
    for pair in pairs:
        scale = pair[2]
        if isinstance(scale, Tensor):
            on_device.setdefault(id(scale), []).append(pair)
        elif scale != 0:
            numbers.setdefault(scale, []).append(pair)
    for head, tail in zip_longest(on_device.values(), numbers.values(), fillvalue=[]):
        while head or tail:
            taken = min(len(head), PAIRS - bool(tail))
            yield head[:taken], tail[: PAIRS - taken]
            head, tail = head[taken:], tail[PAIRS - taken :]


def alike(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors with the strides of the first, copied where they differ."""
    if len({tensor.stride() for tensor in tensors}) == 1:
        return tensors
    layout = torch.channels_last if tensors[0].stride(1) == 1 else torch.contiguous_format
    return [tensor.contiguous(memory_format=layout) for tensor in tensors]


def shape_of(residuals: list[Tensor], codes: list[Tensor], weight: Tensor) -> Shape:
    """What to choose a tile by. Descriptors want 16-bit types, channels last, and addresses in multiples of 16."""
    itemsize = codes[0].itemsize
    aligned = itemsize == 2 and all(
        tensor.is_contiguous(memory_format=torch.channels_last)
        and (tensor.shape[1] * itemsize) % ALIGNMENT == 0
        and tensor.data_ptr() % ALIGNMENT == 0
        for tensor in residuals + codes
    )
    height, width = weight.shape[2:]
    return Shape(
        batch=codes[0].shape[0],
        channels=weight.shape[1],
        atoms=weight.shape[0],
        kernel_size=(height, width),
        grid=(codes[0].shape[2], codes[0].shape[3]),
        itemsize=itemsize,
        last=codes[0].stride(1) == 1,
        aligned=aligned,
    )


def is_wide(tensors: tuple[Tensor, ...], images: int) -> bool:
    """Whether offsets within a box of this many images can pass 2^31."""
    return any(
        (min(images, t.shape[0]) - 1) * t.stride(0)
        + sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= 2**31
        for t in tensors
    )


def constants_of(shape: Shape, stride: Pair, padding: Pair) -> dict[str, int]:
    """The compile-time sizes that both forms of pass 1 share."""
    names = ("GH", "GW", "C", "K", "KH", "KW", "SH", "SW", "PH", "PW")
    values = (*shape.grid, shape.channels, shape.atoms, *shape.kernel_size, *stride, *padding)
    return dict(zip(names, values, strict=True))


def blocking_of(tile: Tile) -> dict[str, int]:
    """The tile's compile-time sizes."""
    images, rows, columns = tile.box
    block = {"TB": images, "BA": tile.atoms, "BC": tile.columns}
    return block | ({"TAPS": tile.taps} if tile.descriptors else {"TH": rows, "TW": columns, "FLAT": tile.flat})


def weight_correlation(
    pairs: Sequence[Correlated],
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    precision: str = "tf32",
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """The sum of scale corr(r, m) over pairs (r [N, C, H, W], m [N, K, h, w], scale) in weight's shape, type, layout.

    All residuals and codes are of one type, fp32, fp16 or bf16; sums are fp32. Any strides do; pairs whose strides
    differ are copied. Pairs of one scale should come with one tensor object: they share a launch.
    `precision` is "tf32" or "ieee", for fp32. `tile` and `splits` are chosen unless given.
    """
    runs = list(launches_of(pairs))
    if not runs or pairs[0][1].numel() == 0:
        return torch.zeros_like(weight)
    ordered = [pair for head, tail in runs for pair in (*head, *tail)]
    residuals, codes = alike([r for r, _, _ in ordered]), alike([m for _, m, _ in ordered])
    r, m = residuals[0], codes[0]
    shape = shape_of(residuals, codes, weight)
    if tile is None:
        tile = tile_of(shape, arch_of(weight.device))
    constants = constants_of(shape, stride, padding) | blocking_of(tile)
    taps = weight.shape[2] * weight.shape[3]
    blocks, boxes = tile.blocks(shape.atoms, shape.channels, taps), tile.boxes(shape.batch, shape.grid)
    if splits is None:
        splits = splits_of(blocks, boxes, processors_of(weight.device))

    partial = weight.new_empty((len(runs) * splits, weight.numel()), dtype=torch.float32)
    operands = zip(residuals, codes, strict=True)
    for (head, tail), part in zip(runs, partial.split(splits), strict=True):
        used = [next(operands) for _ in (*head, *tail)]
        used += used[:1] * (PAIRS - len(used))  # the kernel does not look at these
        scale = head[0][2] if head else part
        factor = tail[0][2] if tail else 1.0
        constants |= {"HEAD": len(head), "TAIL": len(tail)}
        options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        if tile.descriptors:
            blocking = (tile.columns, tile.atoms)
            boxed = [pixel_boxes(t, tile.box[0], n) for pair in used for t, n in zip(pair, blocking, strict=True)]
            correlate_by_descriptors_kernel[blocks, splits](
                *boxed, scale, part, factor, ceil_div(shape.batch, tile.box[0]), r.shape[2], r.shape[3],
                **constants, **options,
            )  # fmt: skip
        else:
            correlate_kernel[blocks, splits](
                *(tensor for pair in used for tensor in pair), scale, part, factor, boxes,
                shape.batch, r.shape[2], r.shape[3], *r.stride(), *m.stride(),
                **constants, WIDE=is_wide((r, m), tile.box[0]), PRECISION=precision, **options,
            )  # fmt: skip

    out = torch.empty_like(weight)
    _, channels, kh, kw = weight.shape
    grid = (ceil_div(out.numel(), REDUCED),)
    add_splits_kernel[grid](
        partial, out, partial.shape[0], out.numel(), *out.stride(), C=channels, KH=kh, KW=kw, BS=SPLITS, BE=REDUCED
    )
    return out
