"""The three kernels of the fused path: a convolution each, with all that surrounds it in the same pass over memory.

With damping = 1 / (1 + s mu), gamma = s damping, s the step size and c one number per sample (1 unless given):

    proximal_step_kernel    z' = shrink(damping y + gamma c A'r, gamma lam),   y = z + beta (z - z_prev)
                            y' = z' + beta' (z' - z)
    codes_gradient_kernel   m' = [z != 0] g,  the gradient for z through the step z -> z', from m = dL/dz' (masked) and
                            dr = dL/dr:
                            d_y = damping m - A'dr,  g = (1 + beta) d_y - beta' d_y'          if A' was applied at y
                            d_y = damping m,         g = (1 + beta) d_y - A'dr - beta' d_y'   if at z
    synthesis_kernel        r = x - A p   or   dr = gamma c A m + add

Each program makes one box of pixels by one block of atoms or channels: `boxes` says which, `forms` how its operands are
read. Products accumulate in fp32.
"""

import triton.language as tl

from sdnet.kernels.triton_path.fused.boxes import box_of_program, codes_elements, load_samples, pixel_offset, pixels_of
from sdnet.kernels.triton_path.fused.forms import analysis, load_codes, store_codes, synthesis
from sdnet.kernels.triton_path.jit import constexpr, jit_of_batch


@jit_of_batch
def proximal_step_kernel(
    residual, dictionary, codes, previous, out, extrapolated, step_size_ptr, lam_ptr, scale_ptr, coefficients, N, sizes,
    layer: constexpr, tile: constexpr, NONNEGATIVE: constexpr, PER_SAMPLE: constexpr,
):  # fmt: skip
    """Write z' into `out` and, if it is given, y' into `extrapolated`: see the head of the file.

    Args:
        residual: r, images [N, C, H, W]; x itself in the first step.
        dictionary: the dictionary, packed as [K, taps, C].
        codes: z [N, K, h, w]; None stands for zero.
        previous: z_prev [N, K, h, w]; None where beta is zero.
        out: z' [N, K, h, w].
        extrapolated: y' [N, K, h, w], or None.
        step_size_ptr: s, one number.
        lam_ptr: lambda, one number, or one per sample.
        scale_ptr: c, one number per sample, or None.
        coefficients: mu, beta, beta'.
        N: number of images.
        sizes: `geometry.Sizes`.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
        NONNEGATIVE: whether codes are one-sided.
        PER_SAMPLE: whether lambda is one per sample.
    """
    mu, beta, next_beta = coefficients
    box = box_of_program(N, sizes.h, sizes.w, layer.K, tile.atoms, tile)
    v = analysis(residual, dictionary, box, sizes, layer, tile)  # [BM, BN]
    step_size = tl.load(step_size_ptr).to(tl.float32)
    damping = 1 / (1 + step_size * mu)
    v = step_size * damping * v
    if scale_ptr is not None:
        v *= load_samples(scale_ptr, box, tile)[:, None]
    lam = load_samples(lam_ptr, box, tile)[:, None] if PER_SAMPLE else tl.load(lam_ptr)  # [BM, 1], or one number
    threshold = step_size * damping * lam.to(tl.float32)

    elements = codes_elements(box, sizes, layer, tile)
    z = v
    if codes is not None:
        z = load_codes(codes, box, elements, tile)
        y = z
        if previous is not None:
            y += beta * (z - load_codes(previous, box, elements, tile))
        v += damping * y
    # A NaN compares as false and so stays a NaN.
    if NONNEGATIVE:
        v = tl.where(v < threshold, 0.0, v - threshold)
    else:
        v = tl.where(tl.abs(v) < threshold, 0.0, tl.where(v < 0, v + threshold, v - threshold))
    v = store_codes(out, v, box, elements, tile)
    if extrapolated is not None:  # from the rounded codes, as the backward pass computes it
        y = v + next_beta * (v - z)
        store_codes(extrapolated, y, box, elements, tile)


@jit_of_batch
def codes_gradient_kernel(
    d_residual, dictionary, m, codes, d_y_after, out, d_y, step_size_ptr, coefficients, N, sizes,
    layer: constexpr, tile: constexpr, AT_Y: constexpr,
):  # fmt: skip
    """Write m' into `out` and, if it is given, d_y into `d_y`: see the head of the file.

    Args:
        d_residual: dr, images [N, C, H, W].
        dictionary: the dictionary, packed as [K, taps, C].
        m: [z' != 0] dL/dz' [N, K, h, w].
        codes: z [N, K, h, w].
        d_y_after: d_y' [N, K, h, w] if AT_Y, else the m that d_y' is damping times of; None where beta' is zero.
        out: m' [N, K, h, w].
        d_y: d_y [N, K, h, w], or None.
        step_size_ptr: s, one number.
        coefficients: mu, beta, beta'.
        N: number of images.
        sizes: `geometry.Sizes`.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
        AT_Y: whether the step applied A' at y (FISTA), else at z.
    """
    mu, beta, next_beta = coefficients
    box = box_of_program(N, sizes.h, sizes.w, layer.K, tile.atoms, tile)
    through = analysis(d_residual, dictionary, box, sizes, layer, tile)  # [BM, BN]
    damping = 1 / (1 + tl.load(step_size_ptr).to(tl.float32) * mu)

    elements = codes_elements(box, sizes, layer, tile)
    direct = damping * load_codes(m, box, elements, tile)
    if AT_Y:
        direct -= through
        if d_y is not None:
            store_codes(d_y, direct, box, elements, tile)
        g = (1 + beta) * direct
    else:
        g = (1 + beta) * direct - through
    if d_y_after is not None:
        after = load_codes(d_y_after, box, elements, tile)
        g -= next_beta * after if AT_Y else next_beta * damping * after
    z = load_codes(codes, box, elements, tile)
    store_codes(out, tl.where(z != 0, g, 0.0), box, elements, tile)


@jit_of_batch
def synthesis_kernel(
    codes, dictionary, x_ptr, add_ptr, out_ptr, step_size_ptr, scale_ptr, mu, N, sizes,
    layer: constexpr, tile: constexpr, X_CHANNELS: constexpr,
):  # fmt: skip
    """Write x - A p into `out_ptr` if x is given, else gamma c A m + add.

    Args:
        codes: p or m [N, K, h, w].
        dictionary: the dictionary, packed as [K, taps, C].
        x_ptr: images [N, X_CHANNELS, H, W], or None. C is a multiple of X_CHANNELS: one reconstruction each.
        add_ptr: images [N, C, H, W], or None for zero.
        out_ptr: images [N, C, H, W].
        step_size_ptr: s, one number.
        scale_ptr: c, one number per sample, or None.
        mu: the weight of 1/2 |z|^2.
        N: number of images.
        sizes: `geometry.Sizes`.
        layer: `geometry.Geometry`.
        tile: `tiles.Tile`.
        X_CHANNELS: channels of x.
    """
    C: constexpr = layer.C
    SH: constexpr = layer.SH
    SW: constexpr = layer.SW
    BN: constexpr = tile.channels
    columns: constexpr = C * SH * SW if tile.form == "few" else C
    height, width = (sizes.H + SH - 1) // SH, (sizes.W + SW - 1) // SW
    box = box_of_program(N, height, width, columns, BN, tile)
    b, i, j, inside = pixels_of(box, height, width, tile)
    first, n = box[0].to(tl.int64), box[3] + tl.arange(0, BN)
    if tile.form == "few":  # [1, BN]
        phase_h, phase_w, channel = (n // C // SW)[None, :], (n // C % SW)[None, :], (n % C)[None, :]
    else:
        # The second axis of the grid counts a phase's first tap, so the phases of most taps, the longest, come first.
        first_h, first_w = tl.program_id(1) // SW, tl.program_id(1) % SW
        phase_h, phase_w = (first_h + (SH - layer.PH % SH)) % SH, (first_w + (SW - layer.PW % SW)) % SW
        channel = n[None, :]
    total = synthesis(codes, dictionary, box, (phase_h, phase_w), sizes, layer, tile)  # [BM, BN]

    row, column = i[:, None] * SH + phase_h, j[:, None] * SW + phase_w  # [BM, 1], or [BM, BN] with few channels
    kept = inside[:, None] & (n < columns)[None, :] & (row < sizes.H) & (column < sizes.W)
    channel_step = 1 if layer.LAST else sizes.H * sizes.W
    offset = pixel_offset(b[:, None], row, column, sizes.H, sizes.W, C, layer.LAST) + channel * channel_step
    start = first * C * sizes.H * sizes.W
    if x_ptr is not None:
        if C == X_CHANNELS:
            x = tl.load(x_ptr + start + offset, mask=kept, other=0.0)
        else:
            x_offset = pixel_offset(b[:, None], row, column, sizes.H, sizes.W, X_CHANNELS, layer.LAST)
            x_offset += channel % X_CHANNELS * channel_step
            x = tl.load(x_ptr + first * X_CHANNELS * sizes.H * sizes.W + x_offset, mask=kept, other=0.0)
        v = x.to(tl.float32) - total
    else:
        step_size = tl.load(step_size_ptr).to(tl.float32)
        v = step_size / (1 + step_size * mu) * total
        if scale_ptr is not None:
            v *= tl.load(scale_ptr + first + b, mask=inside, other=0.0)[:, None]
        if add_ptr is not None:
            v += tl.load(add_ptr + start + offset, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offset, v.to(out_ptr.dtype.element_ty), mask=kept)
