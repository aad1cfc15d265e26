"""The kernels that estimate the largest eigenvalue of M = AA' for many layers at once.

`step_sizes` of this folder launches them and says in which order; `sdnet.kernels.step_sizes` describes the method.

Layers of any shapes share a launch: `owner` tells a program its layer and its index among the layer's programs, and a
row of a table the layer's addresses and sizes. Everything is fp32, and sums run in a fixed order.

A block is summed at once, as `tl.sum(block)`. A sum of the sums of its rows does not compile for sm_100 with Triton
3.7.1.

A' and A are implicit GEMMs over one reduction axis, (channel, tap) or (atom, tap), and a stride multiplies by zeros in
A: a single image is little work, and launches are what it costs.
"""

import triton.language as tl

from sdnet.kernels import step_sizes
from sdnet.kernels.triton_path.jit import jit
from sdnet.kernels.triton_path.lanczos_arithmetic import (
    TINY,
    at_least,
    element,
    is_finite,
    sum_every,
    sum_rows,
    top_eigenvector,
)

jit_of_index = jit(do_not_specialize=["j", "source"])  # one compilation for all values

SHARE, KNEE = tl.constexpr(step_sizes.RESIDUAL_SHARE), tl.constexpr(step_sizes.RESIDUAL_KNEE)
LEAST_SHARE, BREAKDOWN = tl.constexpr(step_sizes.LEAST_SHARE), tl.constexpr(step_sizes.BREAKDOWN)

# A row of the table: addresses, of several tensors in a row where a number follows, then sizes.
WEIGHT, VECTOR, STEP, CODES, IMAGE, REST = (tl.constexpr(i) for i in (0, 1, 2, 3, 5, 9))  # 2 of codes, 4 images
BASIS, SUMS, MEAN, SQUARES, PATTERN = (tl.constexpr(i) for i in (10, 14, 15, 16, 17))  # 4 directions, 2 patterns
OVERLAPS, LEFT, FINAL = (tl.constexpr(i) for i in (19, 23, 24))  # 4 arrays of overlaps
C, K, H, W, CH, CW, KH, KW, SH, SW, PH, PW = (tl.constexpr(25 + i) for i in range(12))
LAST, VECTOR_LAST, PARTS, CHUNKS, GROUPS, SPANS, SQUARE_PARTS = (tl.constexpr(37 + i) for i in range(7))
COLUMNS = tl.constexpr(44)


@jit
def place(owner_ptr, table_ptr):
    """Return this program's index among its layer's, and the layer's row."""
    pid = tl.program_id(0)
    return tl.load(owner_ptr + 2 * pid + 1).to(tl.int32), table_ptr + tl.load(owner_ptr + 2 * pid) * COLUMNS


@jit
def tensor(row_ptr, column):
    """Return the fp32 tensor whose address stands in a column."""
    return tl.load(row_ptr + column).to(tl.pointer_type(tl.float32))


@jit
def size(row_ptr, column):
    """Return the size that stands in a column."""
    return tl.load(row_ptr + column).to(tl.int32)


@jit
def project_kernel(owner_ptr, table_ptr, floor, BLOCK: tl.constexpr):
    """Divide one atom, which lies in one piece in both memory formats, by its norm, and write the sums of its taps."""
    k, row_ptr = place(owner_ptr, table_ptr)
    channels, taps, last = size(row_ptr, C), size(row_ptr, KH) * size(row_ptr, KW), size(row_ptr, LAST) != 0
    length = channels * taps
    atom_ptr, sums_ptr = tensor(row_ptr, WEIGHT) + k * length, tensor(row_ptr, SUMS) + k * channels
    c = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, length, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        w = tl.load(atom_ptr + start + c, mask=c < length - start, other=0.0)
        squares += w * w
    norm = at_least(tl.sqrt(tl.sum(squares, axis=0)), floor)
    for start in tl.range(0, channels, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        total = tl.zeros((BLOCK,), tl.float32)
        for tap in tl.range(0, taps):  # pyright: ignore[reportGeneralTypeIssues]
            at_ptr = atom_ptr + tl.where(last, tap * channels + start + c, (start + c) * taps + tap)
            w = tl.load(at_ptr, mask=c < channels - start, other=0.0) / norm
            tl.store(at_ptr, w, mask=c < channels - start)
            total += w
        tl.store(sums_ptr + start + c, total, mask=c < channels - start)


@jit
def mean_kernel(owner_ptr, table_ptr, BC: tl.constexpr, BP: tl.constexpr, SPAN: tl.constexpr):
    """Write sums over SPAN pixels of BC channels of the power vector, and the sum of their squares."""
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, pixels, last = size(row_ptr, C), size(row_ptr, H) * size(row_ptr, W), size(row_ptr, VECTOR_LAST) != 0
    blocks = tl.cdiv(channels, BC)
    c = index % blocks * BC + tl.arange(0, BC)
    begin = index // blocks * SPAN
    total = tl.zeros((BC, BP), tl.float32)
    squares = tl.zeros((BC, BP), tl.float32)
    for start in tl.range(begin, tl.minimum(begin + SPAN, pixels), BP):  # pyright: ignore[reportGeneralTypeIssues]
        p = start + tl.arange(0, BP)
        at = tl.where(last, p[None, :] * channels + c[:, None], c[:, None] * pixels + p[None, :])
        u = tl.load(tensor(row_ptr, VECTOR) + at, mask=(c < channels)[:, None] & (p < pixels)[None, :], other=0.0)
        total += u
        squares += u * u
    tl.store(tensor(row_ptr, MEAN) + index // blocks * channels + c, tl.sum(total, axis=1), mask=c < channels)
    tl.store(tensor(row_ptr, SQUARES) + index, tl.sum(squares))


@jit_of_index
def pattern_kernel(owner_ptr, table_ptr, source, FIRST: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr):
    """Write the share of BK atoms in S'S d / |d|; d is a sum of such shares, or of means if FIRST."""
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, atoms = size(row_ptr, C), size(row_ptr, K)
    k = index * BK + tl.arange(0, BK)
    scale, equal = 1.0, 0.0
    if FIRST:
        d_ptr, rows = tensor(row_ptr, MEAN), size(row_ptr, SPANS)
        norm, total = 0.0, 0.0
        for start in tl.range(0, channels, BC):  # pyright: ignore[reportGeneralTypeIssues]
            d = sum_rows(d_ptr, rows, channels, start + tl.arange(0, BC))
            norm += tl.sum(d * d, axis=0)
            total += tl.sum(d, axis=0)
        finite = is_finite(norm)
        scale = tl.where(finite, 1 / tl.sqrt(at_least(norm, TINY)), 0.0)
        equal = tl.where(finite & (total < 0), -1.0, 1.0) / tl.sqrt(channels.to(tl.float32))
    else:
        d_ptr, rows = tensor(row_ptr, source + PATTERN), size(row_ptr, GROUPS)
    norm = 0.0
    z = tl.zeros((BK,), tl.float32)
    for start in tl.range(0, channels, BC):  # pyright: ignore[reportGeneralTypeIssues]
        c = start + tl.arange(0, BC)
        d = sum_rows(d_ptr, rows, channels, c)
        d = tl.where(c < channels, tl.where(scale == 0, 0.0, d * scale) + equal, 0.0)
        kept = (k < atoms)[:, None] & (c < channels)[None, :]
        s = tl.load(tensor(row_ptr, SUMS) + k[:, None] * channels + c[None, :], mask=kept, other=0.0)  # [BK, BC]
        norm += tl.sum(d * d, axis=0)
        z += tl.sum(s * d[None, :], axis=1)
    z = z / at_least(tl.sqrt(norm), TINY)
    out_ptr = tensor(row_ptr, 1 - source + PATTERN) + index * channels
    for start in tl.range(0, channels, BC):  # pyright: ignore[reportGeneralTypeIssues]
        c = start + tl.arange(0, BC)
        kept = (k < atoms)[:, None] & (c < channels)[None, :]
        s = tl.load(tensor(row_ptr, SUMS) + k[:, None] * channels + c[None, :], mask=kept, other=0.0)
        tl.store(out_ptr + c, tl.sum(s * z[:, None], axis=0), mask=c < channels)


@jit
def write_rest(row_ptr, index, image, rest, n, e, kept):
    """Write what is left of an image at the elements e, and its products with q_0 .. q_{n-1}, itself and the image."""
    out_ptr = tensor(row_ptr, LEFT) + 8 * index
    tl.store(tensor(row_ptr, REST) + e, rest, mask=kept)
    for i in tl.range(0, n):  # pyright: ignore[reportGeneralTypeIssues]
        q_i = tl.load(tensor(row_ptr, i + BASIS) + e, mask=kept, other=0.0)
        tl.store(out_ptr + i, tl.sum(rest * q_i, axis=0))
    tl.store(out_ptr + 4, tl.sum(rest * rest, axis=0))
    tl.store(out_ptr + 5, tl.sum(image * image, axis=0))


@jit_of_index
def start_kernel(owner_ptr, table_ptr, source, BLOCK: tl.constexpr, BC: tl.constexpr):
    """Write BLOCK elements of q_0, the power vector u, and of what it leaves of the constant image of the pattern d."""
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, pixels, groups = size(row_ptr, C), size(row_ptr, H) * size(row_ptr, W), size(row_ptr, GROUPS)
    mean_ptr, pattern_ptr = tensor(row_ptr, MEAN), tensor(row_ptr, source + PATTERN)
    norm, overlap = 0.0, 0.0
    for start in tl.range(0, channels, BC):  # pyright: ignore[reportGeneralTypeIssues]
        c = start + tl.arange(0, BC)
        d = sum_rows(pattern_ptr, groups, channels, c)
        norm += tl.sum(d * d, axis=0)
        overlap += tl.sum(d * sum_rows(mean_ptr, size(row_ptr, SPANS), channels, c), axis=0)
    scale = at_least(tl.sqrt(norm), TINY) * tl.sqrt(pixels.to(tl.float32))
    squares = sum_every(tensor(row_ptr, SQUARES), size(row_ptr, SQUARE_PARTS), 1, BLOCK)
    finite = is_finite(squares)
    length = at_least(tl.sqrt(squares), TINY)
    e = index * BLOCK + tl.arange(0, BLOCK)
    kept = e < channels * pixels
    c, p = e // pixels, e % pixels
    at = tl.where(size(row_ptr, VECTOR_LAST) != 0, p * channels + c, e)
    q = tl.where(finite, tl.load(tensor(row_ptr, VECTOR) + at, mask=kept, other=0.0) / length, 0.0)
    tl.store(tensor(row_ptr, BASIS) + e, q, mask=kept)
    image = tl.where(kept, sum_rows(pattern_ptr, groups, channels, c) / scale, 0.0)
    rest = image - tl.where(finite, overlap / (scale * length), 0.0) * q
    write_rest(row_ptr, index, image, rest, 0, e, kept)
    tl.store(tensor(row_ptr, LEFT) + 8 * index, tl.sum(rest * q, axis=0))


@jit_of_index
def analysis_kernel(
    owner_ptr, table_ptr, j, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Write a = A'q for BM pixels and BN atoms.

    a[k, i, j] = sum over c, s, t of W[k, c, s, t] q[c, i S + s - P, j S + t - P]

    The grid's second axis counts the directions q_j, q_{j+1} of one launch.
    """
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, atoms, height, width = size(row_ptr, C), size(row_ptr, K), size(row_ptr, H), size(row_ptr, W)
    h, w, kh, kw = size(row_ptr, CH), size(row_ptr, CW), size(row_ptr, KH), size(row_ptr, KW)
    last = size(row_ptr, LAST) != 0
    which = tl.program_id(1)
    weight_ptr, vector_ptr = tensor(row_ptr, WEIGHT), tensor(row_ptr, j + which + BASIS)
    a_ptr = tensor(row_ptr, which + CODES)
    p = index // tl.cdiv(atoms, BN) * BM + tl.arange(0, BM)
    k = index % tl.cdiv(atoms, BN) * BN + tl.arange(0, BN)
    top = p // w * size(row_ptr, SH) - size(row_ptr, PH)  # [BM]
    left = p % w * size(row_ptr, SW) - size(row_ptr, PW)
    length = channels * kh * kw
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, length, BK):  # pyright: ignore[reportGeneralTypeIssues]
        q = start + tl.arange(0, BK)  # as the atom's elements lie in memory
        c = tl.where(last, q % channels, q // (kh * kw))
        tap = tl.where(last, q // channels, q % (kh * kw))
        y, x = top[:, None] + (tap // kw)[None, :], left[:, None] + (tap % kw)[None, :]  # [BM, BK]
        kept = (p < h * w)[:, None] & (q < length)[None, :] & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        u = tl.load(vector_ptr + c[None, :] * (height * width) + y * width + x, mask=kept, other=0.0)
        known = (q < length)[:, None] & (k < atoms)[None, :]
        d = tl.load(weight_ptr + k[None, :] * length + q[:, None], mask=known, other=0.0)  # [BK, BN]
        total = tl.dot(u, d, total, input_precision=PRECISION)
    tl.store(a_ptr + k[None, :] * (h * w) + p[:, None], total, mask=(p < h * w)[:, None] & (k < atoms)[None, :])


@jit_of_index
def synthesis_kernel(
    owner_ptr, table_ptr, j, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Write w = A a = M q_j for BM pixels and BN channels, and this program's sums of the products q_i'w for i <= j.

    w[c, y, x] = sum over k, s, t of W[k, c, s, t] a[k, (y + P - s) / S, (x + P - t) / S] where that is a pixel
    """
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, atoms, height, width = size(row_ptr, C), size(row_ptr, K), size(row_ptr, H), size(row_ptr, W)
    h, w, kw, taps = size(row_ptr, CH), size(row_ptr, CW), size(row_ptr, KW), size(row_ptr, KH) * size(row_ptr, KW)
    stride_y, stride_x, last = size(row_ptr, SH), size(row_ptr, SW), size(row_ptr, LAST) != 0
    weight_ptr, a_ptr = tensor(row_ptr, WEIGHT), tensor(row_ptr, tl.program_id(1) + CODES)
    j += tl.program_id(1)
    p = index // tl.cdiv(channels, BN) * BM + tl.arange(0, BM)
    c = index % tl.cdiv(channels, BN) * BN + tl.arange(0, BN)
    bottom, right = p // width + size(row_ptr, PH), p % width + size(row_ptr, PW)  # [BM]
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, atoms * taps, BK):  # pyright: ignore[reportGeneralTypeIssues]
        q = start + tl.arange(0, BK)
        k, tap = q // taps, q % taps
        y, x = bottom[:, None] - (tap // kw)[None, :], right[:, None] - (tap % kw)[None, :]  # [BM, BK]
        row, column = y // stride_y, x // stride_x
        kept = (p < height * width)[:, None] & (k < atoms)[None, :] & (y >= 0) & (x >= 0) & (row < h) & (column < w)
        kept = kept & (row * stride_y == y) & (column * stride_x == x)
        a = tl.load(a_ptr + k[None, :] * (h * w) + row * w + column, mask=kept, other=0.0)
        shift = tl.where(last, tap[:, None] * channels + c[None, :], c[None, :] * taps + tap[:, None])
        known = (k < atoms)[:, None] & (c < channels)[None, :]
        d = tl.load(weight_ptr + k[:, None] * (channels * taps) + shift, mask=known, other=0.0)  # [BK, BN]
        total = tl.dot(a, d, total, input_precision=PRECISION)
    kept = (p < height * width)[:, None] & (c < channels)[None, :]
    at = c[None, :] * (height * width) + p[:, None]
    tl.store(tensor(row_ptr, j + IMAGE) + at, total, mask=kept)
    out_ptr = tensor(row_ptr, j + OVERLAPS) + 4 * index
    for i in tl.range(0, j + 1):  # pyright: ignore[reportGeneralTypeIssues]
        q_i = tl.load(tensor(row_ptr, i + BASIS) + at, mask=kept, other=0.0)
        tl.store(out_ptr + i, tl.sum(total * q_i))


@jit
def overlap_of(row_ptr, i, j, BLOCK: tl.constexpr):
    """Return q_i'M q_j for i <= j."""
    return sum_every(tensor(row_ptr, j + OVERLAPS) + i, size(row_ptr, PARTS), 4, BLOCK)


@jit
def overlaps_of(row_ptr, n, BLOCK: tl.constexpr):
    """Return the symmetric matrix q_i'M q_j of the first n directions, and zeros, [4, 4]."""
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :]
    matrix = tl.zeros((4, 4), tl.float32)
    for j in tl.range(0, n):  # pyright: ignore[reportGeneralTypeIssues]
        for i in tl.range(0, j + 1):  # pyright: ignore[reportGeneralTypeIssues]
            overlap = overlap_of(row_ptr, i, j, BLOCK)
            matrix += tl.where((tl.minimum(row, column) == i) & (tl.maximum(row, column) == j), overlap, 0.0)
    return matrix


@jit
def mix(row_ptr, column, shares, n, e, kept):
    """Return the sum over i < n of shares[i] times the tensor at `column` + i, at the elements e."""
    total = tl.zeros(e.shape, tl.float32)
    for i in tl.range(0, n):  # pyright: ignore[reportGeneralTypeIssues]
        total += element(shares, i) * tl.load(tensor(row_ptr, i + column) + e, mask=kept, other=0.0)
    return total


@jit
def combine_kernel(owner_ptr, table_ptr, BLOCK: tl.constexpr):
    """Write BLOCK elements of what q_0 and q_1 leave of M x, where x is close to the best vector of their span."""
    index, row_ptr = place(owner_ptr, table_ptr)
    e = index * BLOCK + tl.arange(0, BLOCK)
    kept = e < size(row_ptr, C) * size(row_ptr, H) * size(row_ptr, W)
    matrix = overlaps_of(row_ptr, 2, BLOCK)
    best = top_eigenvector(matrix)
    shares = tl.where(best < 0, -1.0, 1.0) * at_least(tl.abs(best), LEAST_SHARE)
    shares = tl.where(tl.arange(0, 4) < 2, shares, 0.0)
    image = mix(row_ptr, IMAGE, shares, 2, e, kept)
    overlaps = tl.sum(matrix * shares[None, :], axis=1)  # [4], of the image with q_0 and q_1
    write_rest(row_ptr, index, image, image - mix(row_ptr, BASIS, overlaps, 2, e, kept), 2, e, kept)


@jit
def remove_kernel(owner_ptr, table_ptr, BLOCK: tl.constexpr):
    """Write BLOCK elements of what q_0, q_1 and q_2 leave of M q_2."""
    index, row_ptr = place(owner_ptr, table_ptr)
    e = index * BLOCK + tl.arange(0, BLOCK)
    kept = e < size(row_ptr, C) * size(row_ptr, H) * size(row_ptr, W)
    image = tl.load(tensor(row_ptr, IMAGE + 2) + e, mask=kept, other=0.0)
    rest = image
    for i in tl.range(0, 3):  # pyright: ignore[reportGeneralTypeIssues]
        rest -= overlap_of(row_ptr, i, 2, BLOCK) * tl.load(tensor(row_ptr, i + BASIS) + e, mask=kept, other=0.0)
    write_rest(row_ptr, index, image, rest, 3, e, kept)


@jit_of_index
def extend_kernel(owner_ptr, table_ptr, j, BLOCK: tl.constexpr):
    """Write BLOCK elements of q_j, of norm 1 and without what rounding left of the directions before it."""
    index, row_ptr = place(owner_ptr, table_ptr)
    e = index * BLOCK + tl.arange(0, BLOCK)
    kept = e < size(row_ptr, C) * size(row_ptr, H) * size(row_ptr, W)
    left_ptr, chunks = tensor(row_ptr, LEFT), size(row_ptr, CHUNKS)
    rest = tl.load(tensor(row_ptr, REST) + e, mask=kept, other=0.0)
    square = sum_every(left_ptr + 4, chunks, 8, BLOCK)
    for i in tl.range(0, j):  # pyright: ignore[reportGeneralTypeIssues]
        overlap = sum_every(left_ptr + i, chunks, 8, BLOCK)
        square -= overlap * overlap
        rest -= overlap * tl.load(tensor(row_ptr, i + BASIS) + e, mask=kept, other=0.0)
    norm, whole = tl.sqrt(at_least(square, 0.0)), tl.sqrt(sum_every(left_ptr + 5, chunks, 8, BLOCK))
    direction = tl.where(norm > whole * BREAKDOWN, rest / at_least(norm, TINY), 0.0)
    tl.store(tensor(row_ptr, j + BASIS) + e, direction, mask=kept)


@jit
def finish_kernel(owner_ptr, table_ptr, floor, BLOCK: tl.constexpr):
    """Write BLOCK elements of the power vector u = Q s, and their sums of u'M u and |M u|^2."""
    index, row_ptr = place(owner_ptr, table_ptr)
    channels, pixels = size(row_ptr, C), size(row_ptr, H) * size(row_ptr, W)
    e = index * BLOCK + tl.arange(0, BLOCK)
    kept = e < channels * pixels
    matrix = overlaps_of(row_ptr, 4, BLOCK)
    shares = top_eigenvector(matrix)
    theta = tl.sum(shares * tl.sum(matrix * shares[None, :], axis=1), axis=0)
    u, image = mix(row_ptr, BASIS, shares, 4, e, kept), mix(row_ptr, IMAGE, shares, 4, e, kept)
    written = tl.where((theta > floor) & (theta < float("inf")), channels * pixels, 0)
    at = tl.where(size(row_ptr, VECTOR_LAST) != 0, e % pixels * channels + e // pixels, e)
    tl.store(tensor(row_ptr, VECTOR) + at, u, mask=e < written)
    tl.store(tensor(row_ptr, FINAL) + 2 * index, tl.sum(u * image, axis=0))
    tl.store(tensor(row_ptr, FINAL) + 2 * index + 1, tl.sum(image * image, axis=0))


@jit
def step_kernel(table_ptr, floor, safety, BLOCK: tl.constexpr):
    """Write the step size of one layer, which stays as it is if the estimate is not finite."""
    row_ptr = table_ptr + tl.program_id(0) * COLUMNS
    final_ptr, chunks = tensor(row_ptr, FINAL), size(row_ptr, CHUNKS)
    theta, square = sum_every(final_ptr, chunks, 2, BLOCK), sum_every(final_ptr + 1, chunks, 2, BLOCK)
    residual = tl.sqrt(at_least(square - theta * theta, 0.0))
    estimate = theta + residual * residual * SHARE / at_least(residual + theta * KNEE, TINY)
    step_ptr = tensor(row_ptr, STEP)
    tl.store(step_ptr, tl.where(is_finite(estimate), safety / at_least(estimate, floor), tl.load(step_ptr)))
