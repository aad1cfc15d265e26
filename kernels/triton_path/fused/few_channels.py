"""A' and A for images of few channels, as the stem's: a tap alone would not fill a block.

The analysis sums over (tap, channel) pairs as one axis, whose elements are gathered one by one. The synthesis makes all
phases of a pixel at once: its columns are (phase, channel) pairs, so the codes are read S^2 times less.
"""

import triton.language as tl

from sdnet.kernels.triton_path.fused.boxes import steps_of
from sdnet.kernels.triton_path.fused.pointers import tap_is_inside, windows_of_codes, windows_of_images
from sdnet.kernels.triton_path.jit import constexpr, jit


@jit
def analysis(images, dictionary, box, sizes, layer: constexpr, tile: constexpr):
    """Return A' of images at a box of the codes' pixels: see `forms`."""
    C: constexpr = layer.C
    BM: constexpr = tile.pixels
    BN: constexpr = tile.atoms
    BK: constexpr = tile.channels
    COUNT: constexpr = layer.taps * C
    bits, corner = windows_of_codes(box, sizes, layer, tile)
    row_step, column_step, channel_step = steps_of(sizes.H, sizes.W, C, layer.LAST)
    n, k = box[3] + tl.arange(0, BN), tl.arange(0, BK)
    images += box[0].to(tl.int64) * C * sizes.H * sizes.W
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.static_range(0, COUNT, BK):
        tap, c = (start + k) // C, (start + k) % C  # [BK]
        th, tw = tap // layer.KW, tap % layer.KW
        known = start + k < COUNT
        kept = tap_is_inside(bits[:, None], th[None, :], tw[None, :]) & known[None, :]
        shift = th * row_step + tw * column_step + c * channel_step
        a = tl.load(images + corner[:, None] + shift[None, :], mask=kept, other=0.0)  # [BM, BK]
        d_offset = (start + k)[:, None] + (n * COUNT)[None, :]
        d = tl.load(dictionary + d_offset, mask=known[:, None] & (n < layer.K)[None, :], other=0.0)  # [BK, BN]
        total = tl.dot(a, d, total, input_precision=layer.PRECISION)
    return total


@jit
def synthesis(codes, dictionary, box, phase, sizes, layer: constexpr, tile: constexpr):
    """Return A of codes at a box of all phases of the image: see `forms`.

    Column n is channel n % C of phase n // C. The rows i + u of the codes, u from UP down, are common to all phases.
    """
    C: constexpr = layer.C
    K: constexpr = layer.K
    SH: constexpr = layer.SH
    SW: constexpr = layer.SW
    PH: constexpr = layer.PH
    PW: constexpr = layer.PW
    BM: constexpr = tile.pixels
    BN: constexpr = tile.channels
    BK: constexpr = tile.atoms
    UP: constexpr = (SH - 1 + PH) // SH
    LEFT: constexpr = (SW - 1 + PW) // SW
    TAPS_H: constexpr = UP - (PH - layer.KH) // SH  # the last u is ceil((PH - KH + 1) / SH), above (PH - KH) // SH
    TAPS_W: constexpr = LEFT - (PW - layer.KW) // SW
    bits, corner = windows_of_images(box, UP, LEFT, sizes, layer, tile, TAPS_H, TAPS_W)
    row_step, column_step, channel_step = steps_of(sizes.h, sizes.w, K, layer.LAST)
    n, k = box[3] + tl.arange(0, BN), tl.arange(0, BK)
    first_h = n // C // SW + PH - SH * UP  # [BN]: the tap that the column's phase reads at u = UP
    first_w = n // C % SW + PW - SW * LEFT
    codes += box[0].to(tl.int64) * K * sizes.h * sizes.w
    a_offset = corner[:, None] + (k * channel_step)[None, :]
    blocks: constexpr = (K + BK - 1) // BK
    total = tl.zeros((BM, BN), tl.float32)
    for step in tl.range(0, TAPS_H * TAPS_W * blocks):  # pyright: ignore[reportGeneralTypeIssues]
        tap, c = step // blocks, step % blocks * BK
        th, tw = tap // TAPS_W, tap % TAPS_W
        kept = tap_is_inside(bits, th, tw)
        shift = c * channel_step - th * row_step - tw * column_step
        a = tl.load(codes + shift + a_offset, mask=kept[:, None] & (k < K - c)[None, :], other=0.0)  # [BM, BK]
        rh, rw = first_h + SH * th, first_w + SW * tw  # [BN]
        known = (rh >= 0) & (rh < layer.KH) & (rw >= 0) & (rw < layer.KW) & (n < SH * SW * C)
        d_offset = (c + k)[:, None] * (layer.taps * C) + ((rh * layer.KW + rw) * C + n % C)[None, :]
        d = tl.load(dictionary + d_offset, mask=known[None, :] & (k < K - c)[:, None], other=0.0)  # [BK, BN]
        total = tl.dot(a, d, total, input_precision=layer.PRECISION)
    return total
