"""A' and A of a box of pixels as implicit GEMMs: the main loops, without what surrounds them (see `convolution`).

Tensors are images [N, C, H, W] and codes [N, K, h, w], all contiguous or all channels_last. The dictionary lies packed
as [K, taps, C], which is the memory of a channels_last weight [K, C, kh, kw]; both directions read this one packing. A
program makes BN channels of a box of TB images x TH rows x TW columns, so that no pixel needs a division by the size of
the image. Its reduction runs over taps x blocks of BK channels in one flat loop. Whether a tap falls inside the image
is a bit of a row's mask, found once before the loop.

Analysis (A') reads row i S - P + t of the image at tap t. Synthesis (A) of stride S is S^2 phases, program_id(1):
output row i S + a takes the taps r = (a + P) mod S + S t and reads row i + (a + P) // S - t of the codes.

For few image channels (stems) both directions have another form: FLAT analysis reduces over (tap, channel) as one axis,
MERGED synthesis makes all phases of a pixel at once, as columns of one product, and reads the codes S^2 times less.

Offsets within a box are of 32 bits; the first image of the box is addressed with 64. `taps`, the number of taps, comes
as an argument although it is known: the compiler unrolls a loop of known length, at half as many registers again.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def pixel(b, i, j, H, W, C: tl.constexpr, LAST: tl.constexpr):
    """The offset of channel 0 of a pixel of [., C, H, W], in the memory format that LAST says."""
    return ((b * H + i) * W + j) * C if LAST else (b * C * H + i) * W + j


@triton.jit
def box(
    N, GH, GW, columns: tl.constexpr, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr
) -> Any:  # fmt: skip
    """This program's pixels on [N, GH, GW]: first image (64-bit), image, row, column, inside or not; its channels."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (columns + BN - 1) // BN
    tile = pid // blocks  # the blocks of one box are neighbours: they share its pixels in the L2 cache
    across, down = (GW + TW - 1) // TW, (GH + TH - 1) // TH
    first = tile // (across * down) * TB
    m = tl.arange(0, TB * TH * TW)
    b = m // (TH * TW)  # [BM], as all that follow
    i = tile // across % down * TH + m // TW % TH
    j = tile % across * TW + m % TW
    inside = (first + b < N) & (i < GH) & (j < GW)
    n = pid % blocks * BN + tl.arange(0, BN)  # [BN]
    return first.to(tl.int64), b, i, j, inside, n


@triton.jit
def tap_bits(i, j, inside, H, W, SIGN: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr):
    """Bit t: row i + SIGN t of the image is inside [0, H); bit 16 + t: column j + SIGN t is inside [0, W)."""
    bits = tl.zeros(i.shape, tl.int32)
    for t in tl.static_range(TAPS_H):
        row = i + SIGN * t
        bits |= (inside & (row >= 0) & (row < H)).to(tl.int32) << t
    for t in tl.static_range(TAPS_W):
        column = j + SIGN * t
        bits |= ((column >= 0) & (column < W)).to(tl.int32) << (16 + t)
    return bits


@triton.jit
def multiply(a, b, sum, PRECISION: tl.constexpr):
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def analysis_sum(
    a_ptr, w_ptr, first, b, i, j, inside, n, taps, H, W,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A' of an image [N, C, H, W] at a box of the codes' grid: [BM, BN] in fp32."""
    T: tl.constexpr = KH * KW
    a_ptr += first * C * H * W
    top, left = i * SH - PH, j * SW - PW
    bits = tap_bits(top, left, inside, H, W, 1, KH, KW)
    row = pixel(b, top, left, H, W, C, LAST)  # [BM]; of tap 0, perhaps outside the image
    row_step = W * C if LAST else W
    column_step = C if LAST else 1
    channel_step = 1 if LAST else H * W
    k = tl.arange(0, BK)
    sum = tl.zeros((b.shape[0], BN), tl.float32)
    if FLAT:
        for start in tl.static_range(0, T * C, BK):
            tap, c = (start + k) // C, (start + k) % C  # [BK]
            th, tw = tap // KW, tap % KW
            kept = ((bits[:, None] >> th[None, :]) & (bits[:, None] >> (16 + tw)[None, :]) & 1) != 0
            kept = kept & (start + k < T * C)[None, :]
            shift = th * row_step + tw * column_step + c * channel_step
            a = tl.load(a_ptr + row[:, None] + shift[None, :], mask=kept, other=0.0)  # [BM, BK]
            known = (start + k < T * C)[:, None] & (n < K)[None, :]
            w = tl.load(w_ptr + (start + k)[:, None] + (n * (T * C))[None, :], mask=known, other=0.0)  # [BK, BN]
            sum = multiply(a, w, sum, PRECISION)
    else:
        blocks: tl.constexpr = (C + BK - 1) // BK
        a_offset = row[:, None] + (k * channel_step)[None, :]
        w_offset = k[:, None] + (n * (T * C))[None, :]
        for step in tl.range(0, taps * blocks):
            tap, c = step // blocks, step % blocks * BK
            th, tw = tap // KW, tap % KW
            kept = ((bits >> th) & (bits >> (16 + tw)) & 1) != 0
            shift = th * row_step + tw * column_step + c * channel_step
            if C % BK == 0:
                a = tl.load(a_ptr + shift + a_offset, mask=kept[:, None], other=0.0)  # [BM, BK]
            else:
                a = tl.load(a_ptr + shift + a_offset, mask=kept[:, None] & (k < C - c)[None, :], other=0.0)
            if C % BK == 0 and K % BN == 0:
                w = tl.load(w_ptr + (tap * C + c) + w_offset)  # [BK, BN]
            else:
                w = tl.load(w_ptr + (tap * C + c) + w_offset, mask=(k < C - c)[:, None] & (n < K)[None, :], other=0.0)
            sum = multiply(a, w, sum, PRECISION)
    return sum


@triton.jit
def synthesis_sum(
    a_ptr, w_ptr, first, b, i, j, inside, n, phase_h, phase_w, taps, h, w,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, MERGED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of codes [N, K, h, w] at a box of one phase of the image's grid, or of all if MERGED: [BM, BN] in fp32."""
    T: tl.constexpr = KH * KW
    blocks: tl.constexpr = (K + BK - 1) // BK
    a_ptr += first * K * h * w
    row_step = w * K if LAST else w
    column_step = K if LAST else 1
    channel_step = 1 if LAST else h * w
    k = tl.arange(0, BK)
    sum = tl.zeros((b.shape[0], BN), tl.float32)
    if MERGED:
        # Column n is channel n % C of phase n // C; the codes' rows i + u of all phases, u from UP down, are common.
        UP: tl.constexpr = (SH - 1 + PH) // SH
        LEFT: tl.constexpr = (SW - 1 + PW) // SW
        TAPS_H: tl.constexpr = UP - (PH - KH) // SH  # the last u is ceil((PH - KH + 1) / SH), above (PH - KH) // SH
        TAPS_W: tl.constexpr = LEFT - (PW - KW) // SW
        first_h = n // C // SW + PH - SH * UP  # [BN]: the tap that phase n reads at u = UP
        first_w = n // C % SW + PW - SW * LEFT
        top, left = i + UP, j + LEFT
    else:
        TAPS_H: tl.constexpr = (KH + SH - 1) // SH
        TAPS_W: tl.constexpr = (KW + SW - 1) // SW
        if SH == 1 and SW == 1:  # one phase: all is known at compile time
            first_h: tl.constexpr = 0
            first_w: tl.constexpr = 0
            taps_h: tl.constexpr = KH
            taps_w: tl.constexpr = KW
            top, left = i + PH, j + PW
        else:
            first_h, first_w = (phase_h + PH) % SH, (phase_w + PW) % SW
            taps_h, taps_w = (KH - first_h + SH - 1) // SH, (KW - first_w + SW - 1) // SW
            top, left = i + (phase_h + PH) // SH, j + (phase_w + PW) // SW
    bits = tap_bits(top, left, inside, h, w, -1, TAPS_H, TAPS_W)
    a_offset = pixel(b, top, left, h, w, K, LAST)[:, None] + (k * channel_step)[None, :]
    if MERGED:
        for step in tl.range(0, TAPS_H * TAPS_W * blocks):
            tap, c = step // blocks, step % blocks * BK
            th, tw = tap // TAPS_W, tap % TAPS_W
            kept = ((bits >> th) & (bits >> (16 + tw)) & 1) != 0
            shift = c * channel_step - th * row_step - tw * column_step
            a = tl.load(a_ptr + shift + a_offset, mask=kept[:, None] & (k < K - c)[None, :], other=0.0)  # [BM, BK]
            rh, rw = first_h + SH * th, first_w + SW * tw  # [BN]
            known = (rh >= 0) & (rh < KH) & (rw >= 0) & (rw < KW) & (n < SH * SW * C)
            w_offset = (c + k)[:, None] * (T * C) + ((rh * KW + rw) * C + n % C)[None, :]
            d = tl.load(w_ptr + w_offset, mask=known[None, :] & (k < K - c)[:, None], other=0.0)  # [BK, BN]
            sum = multiply(a, d, sum, PRECISION)
    else:
        w_offset = k[:, None] * (T * C) + n[None, :]
        for step in tl.range(0, taps_h * taps_w * blocks if SH * SW > 1 else taps * blocks):
            tap, c = step // blocks, step % blocks * BK
            th, tw = tap // taps_w, tap % taps_w
            kept = ((bits >> th) & (bits >> (16 + tw)) & 1) != 0
            shift = c * channel_step - th * row_step - tw * column_step
            if K % BK == 0:
                a = tl.load(a_ptr + shift + a_offset, mask=kept[:, None], other=0.0)  # [BM, BK]
            else:
                a = tl.load(a_ptr + shift + a_offset, mask=kept[:, None] & (k < K - c)[None, :], other=0.0)
            w_shift = c * (T * C) + ((first_h + SH * th) * KW + first_w + SW * tw) * C
            if K % BK == 0 and C % BN == 0:
                d = tl.load(w_ptr + w_shift + w_offset)  # [BK, BN]
            else:
                d = tl.load(w_ptr + w_shift + w_offset, mask=(k < K - c)[:, None] & (n < C)[None, :], other=0.0)
            sum = multiply(a, d, sum, PRECISION)
    return sum
