"""A' and A of a box of pixels as implicit GEMMs: the main loops, without what surrounds them (see `convolution`).

Tensors are images [N, C, H, W] and codes [N, K, h, w], all contiguous or all channels_last. The dictionary lies packed
as [K, taps, C], which is the memory of a channels_last weight [K, C, kh, kw]; both directions read this one packing. A
program makes BN channels of a box of TB images x TH rows x TW columns, so that no pixel needs a division by the size of
the image. Its reduction runs over taps x blocks of BK channels in one flat loop. Whether a tap falls inside the image
is a bit of a row's mask, found once before the loop.

Analysis (A') reads row i S - P + t of the image at tap t. Synthesis (A) of stride S is S^2 phases, program_id(1):
output row i S + a takes the taps r = (a + P) mod S + S t and reads row i + (a + P) // S - t of the codes.

This is the form "pointers". There are two others:
  * "few", for few image channels (stems): analysis reduces over (tap, channel) as one axis, synthesis makes all phases
    of a pixel at once, as columns of one product, and reads the codes S^2 times less.
  * "descriptors" (sm_90 on, 16-bit channels_last): a box is one pixel of many images. Whether a tap falls inside the
    image is then one answer for the whole program, which leaves out the taps that do not: nobody multiplies by padding,
    31 % of the products at 4 x 4 pixels, 18 % at 7 x 7. Tiles go by TMA from memory to shared memory to wgmma.

Offsets within a box are of 32 bits; the first image of the box is addressed with 64. `taps`, the number of taps, comes
as an argument although it is known: the compiler unrolls a loop of known length, at half as many registers again.
"""

from typing import Any

import triton
import triton.language as tl

jit: Any = triton.jit  # calls between kernels are beyond a type checker


@jit
def pixel(b, i, j, H, W, C: tl.constexpr, LAST: tl.constexpr):
    """The offset of channel 0 of a pixel of [., C, H, W], in the memory format that LAST says."""
    return ((b * H + i) * W + j) * C if LAST else (b * C * H + i) * W + j


@jit
def corner(GH, GW, columns: tl.constexpr, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr):
    """Where this program's box begins on [N, GH, GW] x channels: image, row, column, channel."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (columns + BN - 1) // BN
    tile = pid // blocks  # the blocks of one box are neighbours: they share its pixels in the L2 cache
    across, down = (GW + TW - 1) // TW, (GH + TH - 1) // TH
    return tile // (across * down) * TB, tile // across % down * TH, tile % across * TW, pid % blocks * BN


@jit
def pixels(image, row, column, N, GH, GW, TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr):
    """The box's pixels on [N, GH, GW]: image within the box, row, column, and whether the grid has such a pixel."""
    m = tl.arange(0, TB * TH * TW)
    b = m // (TH * TW)  # [BM], as all that follow
    i = row + m // TW % TH
    j = column + m % TW
    return b, i, j, (image + b < N) & (i < GH) & (j < GW)


@jit
def place(
    image, row, column, channel, N, GH, GW, channels: tl.constexpr, LAST: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Where the box lies in a tensor [N, channels, GH, GW]: a 64-bit offset, those of its elements, which there are."""
    b, i, j, inside = pixels(image, row, column, N, GH, GW, TB, TH, TW)
    n = channel + tl.arange(0, BN)
    offset = pixel(b, i, j, GH, GW, channels, LAST)[:, None] + (n * (1 if LAST else GH * GW))[None, :]  # [BM, BN]
    return image.to(tl.int64) * channels * GH * GW, offset, inside[:, None] & (n < channels)[None, :]


@jit
def load_box(t, image, row, column, channel, start, offset, kept, FORM: tl.constexpr):
    """A box of a tensor, [BM, BN] in fp32, zeros where there are no elements."""
    if FORM == "descriptors":
        value = t.load([row, column, image, channel]).reshape(offset.shape)
    else:
        value = tl.load(t + start + offset, mask=kept, other=0.0)
    return value.to(tl.float32)


@jit
def store_box(t, value, image, row, column, channel, start, offset, kept, FORM: tl.constexpr):
    """Writes [BM, BN] into a box of a tensor; returns what it was rounded to, in fp32."""
    if FORM == "descriptors":
        rounded = value.to(t.dtype)
        t.store([row, column, image, channel], rounded.reshape(1, 1, offset.shape[0], offset.shape[1]))
    else:
        rounded = value.to(t.dtype.element_ty)
        tl.store(t + start + offset, rounded, mask=kept)
    return rounded.to(tl.float32)


@jit
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


@jit
def multiply(a, b, sum, PRECISION: tl.constexpr):
    return tl.dot(a, b, sum, input_precision=PRECISION)


@jit
def span(first, count, size):
    """Which of `count` places from `first` on are inside [0, size): the first and the number of them."""
    before = tl.maximum(-first, 0)
    return before, tl.maximum(tl.minimum(count, size - first) - before, 0)


@jit
def analysis(
    r, dictionary, image, row, column, channel, N, taps, H, W, h, w,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A' of images r [N, C, H, W] at a box of the codes' grid: [BM, BN] in fp32."""
    if FORM == "descriptors":
        sum = analysis_by_descriptors(
            r, dictionary, image, row, column, channel, H, W, C, KH, KW, SH, SW, PH, PW, TB, BN, BK
        )
    else:
        sum = analysis_by_pointers(
            r, dictionary, image, row, column, channel, N, taps, H, W, h, w,
            C, K, KH, KW, SH, SW, PH, PW, LAST, FORM == "few", PRECISION, TB, TH, TW, BN, BK,
        )  # fmt: skip
    return sum


@jit
def analysis_by_descriptors(
    r, dictionary, image, row, column, channel, H, W,
    C: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From descriptors of images as [H, W, N, C] and of the dictionary as [K, taps C]: one pixel of BM images."""
    blocks: tl.constexpr = (C + BK - 1) // BK
    top, left = row * SH - PH, column * SW - PW
    first_h, count_h = span(top, KH, H)
    first_w, count_w = span(left, KW, W)
    sum = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, count_h * count_w * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = first_h + tap // count_w, first_w + tap % count_w
        a = r.load([top + th, left + tw, image, c]).reshape(BM, BK)  # channels past C are zeros
        d = dictionary.load([channel, (th * KW + tw) * C + c])  # [BN, BK]
        sum = tl.dot(a, d.T, sum)
    return sum


@jit
def synthesis_by_descriptors(
    p, dictionary, image, row, column, channel, phase_h, phase_w, h, w,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """From descriptors of codes as [h, w, N, K] and of the dictionary as [K, taps C]: one pixel of BM images."""
    blocks: tl.constexpr = (K + BK - 1) // BK
    tap_h, tap_w = (phase_h + PH) % SH, (phase_w + PW) % SW  # the phase's first; the others follow in strides
    taps_h, taps_w = (KH - tap_h + SH - 1) // SH, (KW - tap_w + SW - 1) // SW
    top, left = row + (phase_h + PH) // SH - taps_h + 1, column + (phase_w + PW) // SW - taps_w + 1  # of the last tap
    first_h, count_h = span(top, taps_h, h)
    first_w, count_w = span(left, taps_w, w)
    sum = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, count_h * count_w * blocks):
        tap, k = step // blocks, step % blocks * BK
        y, x = first_h + tap // count_w, first_w + tap % count_w
        a = p.load([top + y, left + x, image, k]).reshape(BM, BK)  # channels past K are zeros
        rh, rw = tap_h + SH * (taps_h - 1 - y), tap_w + SW * (taps_w - 1 - x)
        d = dictionary.load([k, (rh * KW + rw) * C + channel])  # [BK, BN]
        sum = tl.dot(a, d, sum)
    return sum


@jit
def analysis_by_pointers(
    a_ptr, w_ptr, image, row, column, channel, N, taps, H, W, h, w,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`analysis`, tap by tap, or FLAT over (tap, channel)."""
    b, i, j, inside = pixels(image, row, column, N, h, w, TB, TH, TW)
    n = channel + tl.arange(0, BN)
    T: tl.constexpr = KH * KW
    a_ptr += image.to(tl.int64) * C * H * W
    top, left = i * SH - PH, j * SW - PW
    bits = tap_bits(top, left, inside, H, W, 1, KH, KW)
    corner_offset = pixel(b, top, left, H, W, C, LAST)  # [BM]; of tap 0, perhaps outside the image
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
            a = tl.load(a_ptr + corner_offset[:, None] + shift[None, :], mask=kept, other=0.0)  # [BM, BK]
            known = (start + k < T * C)[:, None] & (n < K)[None, :]
            d = tl.load(w_ptr + (start + k)[:, None] + (n * (T * C))[None, :], mask=known, other=0.0)  # [BK, BN]
            sum = multiply(a, d, sum, PRECISION)
    else:
        blocks: tl.constexpr = (C + BK - 1) // BK
        a_offset = corner_offset[:, None] + (k * channel_step)[None, :]
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
                d = tl.load(w_ptr + (tap * C + c) + w_offset)  # [BK, BN]
            else:
                d = tl.load(w_ptr + (tap * C + c) + w_offset, mask=(k < C - c)[:, None] & (n < K)[None, :], other=0.0)
            sum = multiply(a, d, sum, PRECISION)
    return sum


@jit
def synthesis_by_pointers(
    a_ptr, w_ptr, image, b, i, j, inside, n, phase_h, phase_w, taps, h, w,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, MERGED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A of codes [N, K, h, w] at a box of one phase of the image's grid, or of all if MERGED: [BM, BN] in fp32."""
    T: tl.constexpr = KH * KW
    blocks: tl.constexpr = (K + BK - 1) // BK
    a_ptr += image.to(tl.int64) * K * h * w
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
