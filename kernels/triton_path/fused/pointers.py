"""A' and A as implicit matrix products, read by pointers: any strides, sizes and types.

The sum runs over taps x blocks of channels in one flat loop. Whether a tap falls inside the image is a bit of a pixel's
mask, found once before the loop.

The analysis (A') reads row i S - P + t of the image at tap t. The synthesis (A) of stride S makes one of S^2 phases of
the image: output row i S + a takes the taps t = (a + P) mod S + S u and reads row i + (a + P) // S - u of the codes.
"""

import triton.language as tl

from sdnet.kernels.triton_path.fused.boxes import pixel_offset, pixels_of, steps_of
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
def windows_of_codes(box, sizes, layer: constexpr, tile: constexpr):
    """Return, for each pixel of a box of codes, the mask of its taps and the offset of tap 0 in the images, [BM]."""
    KH: constexpr = layer.KH
    KW: constexpr = layer.KW
    b, i, j, inside = pixels_of(box, sizes.h, sizes.w, tile)
    top, left = i * layer.SH - layer.PH, j * layer.SW - layer.PW  # perhaps outside the image
    bits = tap_bits(top, left, inside, sizes.H, sizes.W, 1, KH, KW)
    return bits, pixel_offset(b, top, left, sizes.H, sizes.W, layer.C, layer.LAST)


@jit
def windows_of_images(
    box, up, leftwards, sizes, layer: constexpr, tile: constexpr, TAPS_H: constexpr, TAPS_W: constexpr
):
    """Return, for each pixel of a box of a phase, the mask of its taps and the offset of tap 0 in the codes, [BM].

    Tap (u, v) of pixel (i, j) of the phase reads the codes at (i + up - u, j + leftwards - v).
    """
    height, width = (sizes.H + layer.SH - 1) // layer.SH, (sizes.W + layer.SW - 1) // layer.SW
    b, i, j, inside = pixels_of(box, height, width, tile)
    top, left = i + up, j + leftwards
    bits = tap_bits(top, left, inside, sizes.h, sizes.w, -1, TAPS_H, TAPS_W)
    return bits, pixel_offset(b, top, left, sizes.h, sizes.w, layer.K, layer.LAST)


@jit
def load_block(pointers, rows, columns, SOME_ROWS: constexpr, SOME_COLUMNS: constexpr):
    """Load a block, zeros where `rows` or `columns` say that there are no elements; each is read only if it is SOME."""
    if SOME_ROWS and SOME_COLUMNS:
        block = tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0)
    elif SOME_ROWS:
        block = tl.load(pointers, mask=rows[:, None], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@jit
def analysis(images, dictionary, box, sizes, layer: constexpr, tile: constexpr):
    """Return A' of images at a box of the codes' pixels: see `forms`."""
    C: constexpr = layer.C
    KW: constexpr = layer.KW
    BM: constexpr = tile.pixels
    BN: constexpr = tile.atoms
    BK: constexpr = tile.channels
    SOME_CHANNELS: constexpr = C % BK != 0
    SOME_ATOMS: constexpr = SOME_CHANNELS or layer.K % BN != 0
    bits, corner = windows_of_codes(box, sizes, layer, tile)
    row_step, column_step, channel_step = steps_of(sizes.H, sizes.W, C, layer.LAST)
    n, k = box[3] + tl.arange(0, BN), tl.arange(0, BK)
    images += box[0].to(tl.int64) * C * sizes.H * sizes.W
    a_offset = corner[:, None] + (k * channel_step)[None, :]
    d_offset = k[:, None] + (n * (layer.taps * C))[None, :]
    blocks: constexpr = (C + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, sizes.taps * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = tap // KW, tap % KW
        kept = tap_is_inside(bits, th, tw)
        shift = th * row_step + tw * column_step + c * channel_step
        a = load_block(images + shift + a_offset, kept, k < C - c, True, SOME_CHANNELS)  # [BM, BK]
        d = load_block(dictionary + (tap * C + c) + d_offset, k < C - c, n < layer.K, SOME_ATOMS, SOME_ATOMS)
        total = tl.dot(a, d, total, input_precision=layer.PRECISION)  # d: [BK, BN]
    return total


@jit
def synthesis(codes, dictionary, box, phase, sizes, layer: constexpr, tile: constexpr):
    """Return A of codes at a box of one phase of the image: see `forms`."""
    C: constexpr = layer.C
    K: constexpr = layer.K
    SH: constexpr = layer.SH
    SW: constexpr = layer.SW
    BM: constexpr = tile.pixels
    BN: constexpr = tile.channels
    BK: constexpr = tile.atoms
    SOME_ATOMS: constexpr = K % BK != 0
    SOME_CHANNELS: constexpr = SOME_ATOMS or C % BN != 0
    MOST_H: constexpr = (layer.KH + SH - 1) // SH  # of the taps of a phase
    MOST_W: constexpr = (layer.KW + SW - 1) // SW
    phase_h, phase_w = phase
    if SH == 1 and SW == 1:  # one phase: all is known at compile time
        first_h: constexpr = 0
        first_w: constexpr = 0
        taps_w: constexpr = layer.KW
        taps = sizes.taps
        up, leftwards = layer.PH, layer.PW
    else:
        first_h, first_w = (phase_h + layer.PH) % SH, (phase_w + layer.PW) % SW
        taps_w = (layer.KW - first_w + SW - 1) // SW
        taps = (layer.KH - first_h + SH - 1) // SH * taps_w
        up, leftwards = (phase_h + layer.PH) // SH, (phase_w + layer.PW) // SW
    bits, corner = windows_of_images(box, up, leftwards, sizes, layer, tile, MOST_H, MOST_W)
    row_step, column_step, channel_step = steps_of(sizes.h, sizes.w, K, layer.LAST)
    n, k = box[3] + tl.arange(0, BN), tl.arange(0, BK)
    codes += box[0].to(tl.int64) * K * sizes.h * sizes.w
    a_offset = corner[:, None] + (k * channel_step)[None, :]
    d_offset = k[:, None] * (layer.taps * C) + n[None, :]
    blocks: constexpr = (K + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, taps * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = tap // taps_w, tap % taps_w
        kept = tap_is_inside(bits, th, tw)
        shift = c * channel_step - th * row_step - tw * column_step
        a = load_block(codes + shift + a_offset, kept, k < K - c, True, SOME_ATOMS)  # [BM, BK]
        d_shift = c * (layer.taps * C) + ((first_h + SH * th) * layer.KW + first_w + SW * tw) * C
        d = load_block(dictionary + d_shift + d_offset, k < K - c, n < C, SOME_CHANNELS, SOME_CHANNELS)  # [BK, BN]
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
