"""A' and A as implicit matrix products, read by pointers: any strides, sizes and types.

The sum runs over taps x blocks of channels in one flat loop. Whether a tap falls inside the image is a bit of a pixel's
mask, found once before the loop.

The analysis (A') reads row i S - P + t of the image at tap t. The synthesis (A) of stride S makes one of S^2 phases of
the image: output row i S + a takes the taps t = (a + P) mod S + S u and reads row i + (a + P) // S - u of the codes.
"""

import triton.language as tl

from sdnet.kernels.triton_path.fused.boxes import pixel_offset, pixels_of
from sdnet.kernels.triton_path.jit import constexpr, jit


@jit
def tap_bits(i, j, inside, H, W, SIGN: constexpr, TAPS_H: constexpr, TAPS_W: constexpr):
    """Return masks [BM]: bit t, row i + SIGN t is inside [0, H); bit 16 + t, column j + SIGN t is inside [0, W)."""
    bits = tl.zeros(i.shape, tl.int32)
    for t in tl.static_range(TAPS_H):
        row = i + SIGN * t
        bits |= (inside & (row >= 0) & (row < H)).to(tl.int32) << t
    for t in tl.static_range(TAPS_W):
        column = j + SIGN * t
        bits |= ((column >= 0) & (column < W)).to(tl.int32) << (16 + t)
    return bits


@jit
def tap_is_inside(bits, th, tw):
    """Return whether tap (th, tw) is inside the image, by the masks of `tap_bits`."""
    return ((bits >> th) & (bits >> (16 + tw)) & 1) != 0


@jit
def analysis(images, dictionary, box, sizes, layer: constexpr, tile: constexpr):
    """Return A' of images at a box of the codes' pixels: see `forms`."""
    C: constexpr = layer.C
    T: constexpr = layer.taps
    KH: constexpr = layer.KH
    KW: constexpr = layer.KW
    BM: constexpr = tile.pixels
    BN: constexpr = tile.atoms
    BK: constexpr = tile.channels
    b, i, j, inside = pixels_of(box, sizes.N, sizes.h, sizes.w, tile)
    n = box[3] + tl.arange(0, BN)
    images += box[0].to(tl.int64) * C * sizes.H * sizes.W
    top, left = i * layer.SH - layer.PH, j * layer.SW - layer.PW
    bits = tap_bits(top, left, inside, sizes.H, sizes.W, 1, KH, KW)
    row_step = sizes.W * C if layer.LAST else sizes.W
    column_step = C if layer.LAST else 1
    channel_step = 1 if layer.LAST else sizes.H * sizes.W
    k = tl.arange(0, BK)
    a_offset = pixel_offset(b, top, left, sizes.H, sizes.W, C, layer.LAST)[:, None] + (k * channel_step)[None, :]
    d_offset = k[:, None] + (n * (T * C))[None, :]
    blocks: constexpr = (C + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, sizes.taps * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = tap // KW, tap % KW
        kept = tap_is_inside(bits, th, tw)
        shift = th * row_step + tw * column_step + c * channel_step
        if C % BK == 0:
            a = tl.load(images + shift + a_offset, mask=kept[:, None], other=0.0)  # [BM, BK]
        else:
            a = tl.load(images + shift + a_offset, mask=kept[:, None] & (k < C - c)[None, :], other=0.0)
        if C % BK == 0 and layer.K % BN == 0:
            d = tl.load(dictionary + (tap * C + c) + d_offset)  # [BK, BN]
        else:
            known = (k < C - c)[:, None] & (n < layer.K)[None, :]
            d = tl.load(dictionary + (tap * C + c) + d_offset, mask=known, other=0.0)
        total = tl.dot(a, d, total, input_precision=layer.PRECISION)
    return total


@jit
def synthesis(codes, dictionary, box, phase, sizes, layer: constexpr, tile: constexpr):
    """Return A of codes at a box of one phase of the image: see `forms`."""
    C: constexpr = layer.C
    K: constexpr = layer.K
    T: constexpr = layer.taps
    KH: constexpr = layer.KH
    KW: constexpr = layer.KW
    SH: constexpr = layer.SH
    SW: constexpr = layer.SW
    BM: constexpr = tile.pixels
    BN: constexpr = tile.channels
    BK: constexpr = tile.atoms
    MOST_H: constexpr = (KH + SH - 1) // SH  # of the taps of a phase
    MOST_W: constexpr = (KW + SW - 1) // SW
    height, width = (sizes.H + SH - 1) // SH, (sizes.W + SW - 1) // SW
    b, i, j, inside = pixels_of(box, sizes.N, height, width, tile)
    n = box[3] + tl.arange(0, BN)
    codes += box[0].to(tl.int64) * K * sizes.h * sizes.w
    phase_h, phase_w = phase
    if SH == 1 and SW == 1:  # one phase: all is known at compile time
        first_h: constexpr = 0
        first_w: constexpr = 0
        taps_w: constexpr = KW
        taps = sizes.taps
        top, left = i + layer.PH, j + layer.PW
    else:
        first_h, first_w = (phase_h + layer.PH) % SH, (phase_w + layer.PW) % SW
        taps_w = (KW - first_w + SW - 1) // SW
        taps = (KH - first_h + SH - 1) // SH * taps_w
        top, left = i + (phase_h + layer.PH) // SH, j + (phase_w + layer.PW) // SW
    bits = tap_bits(top, left, inside, sizes.h, sizes.w, -1, MOST_H, MOST_W)
    row_step = sizes.w * K if layer.LAST else sizes.w
    column_step = K if layer.LAST else 1
    channel_step = 1 if layer.LAST else sizes.h * sizes.w
    k = tl.arange(0, BK)
    a_offset = pixel_offset(b, top, left, sizes.h, sizes.w, K, layer.LAST)[:, None] + (k * channel_step)[None, :]
    d_offset = k[:, None] * (T * C) + n[None, :]
    blocks: constexpr = (K + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, taps * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = tap // taps_w, tap % taps_w
        kept = tap_is_inside(bits, th, tw)
        shift = c * channel_step - th * row_step - tw * column_step
        if K % BK == 0:
            a = tl.load(codes + shift + a_offset, mask=kept[:, None], other=0.0)  # [BM, BK]
        else:
            a = tl.load(codes + shift + a_offset, mask=kept[:, None] & (k < K - c)[None, :], other=0.0)
        d_shift = c * (T * C) + ((first_h + SH * th) * KW + first_w + SW * tw) * C
        if K % BK == 0 and C % BN == 0:
            d = tl.load(dictionary + d_shift + d_offset)  # [BK, BN]
        else:
            d = tl.load(dictionary + d_shift + d_offset, mask=(k < K - c)[:, None] & (n < C)[None, :], other=0.0)
        total = tl.dot(a, d, total, input_precision=layer.PRECISION)
    return total


@jit
def load_codes(codes, box, elements, tile: constexpr):
    """Return a box of codes, [BM, BN], zeros where there are no elements."""
    start, offset, kept = elements
    return tl.load(codes + start + offset, mask=kept, other=0.0)


@jit
def store_codes(codes, value, box, elements, tile: constexpr):
    """Write [BM, BN] into a box of codes; return what it was rounded to."""
    start, offset, kept = elements
    rounded = value.to(codes.dtype.element_ty)
    tl.store(codes + start + offset, rounded, mask=kept)
    return rounded
