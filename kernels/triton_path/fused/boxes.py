"""The box of pixels that a program makes, and where its elements lie in memory.

A box is TB images x TH rows x TW columns on a grid of pixels: the codes' in the analysis, one phase of the image's in
the synthesis. A program makes it for one block of channels (atoms in the analysis). No pixel needs a division by the
size of the image: only the program's index is divided. Offsets within a box are of 32 bits, and its first image is
addressed with 64.
"""

import triton.language as tl

from sdnet.kernels.triton_path.jit import constexpr, jit


@jit
def box_of_program(N, height, width, channels: constexpr, block: constexpr, tile: constexpr):
    """Return this program's box on [N, height, width] x channels.

    A box is its first image, row, column and channel, and the number of images from the first on.
    """
    pid = tl.program_id(0)
    blocks: constexpr = (channels + block - 1) // block
    index = pid // blocks  # the blocks of one box are neighbours, which share its pixels in the L2 cache
    across, down = (width + tile.columns - 1) // tile.columns, (height + tile.rows - 1) // tile.rows
    image = index // (across * down) * tile.images
    row, column = index // across % down * tile.rows, index % across * tile.columns
    return image, row, column, pid % blocks * block, N - image


@jit
def pixels_of(box, height, width, tile: constexpr):
    """Return a box's pixels [BM]: image within the box, row, column, whether the images have such a pixel."""
    _, row, column, _, images = box
    BM: constexpr = tile.pixels
    m = tl.arange(0, BM)
    b = m // (tile.rows * tile.columns)
    i = row + m // tile.columns % tile.rows
    j = column + m % tile.columns
    return b, i, j, (b < images) & (i < height) & (j < width)


@jit
def load_samples(ptr, box, tile: constexpr):
    """Return the number of each pixel's sample, [BM], from one number per sample."""
    BM: constexpr = tile.pixels
    b = tl.arange(0, BM) // (tile.rows * tile.columns)
    return tl.load(ptr + box[0].to(tl.int64) + b, mask=b < box[4], other=0.0)


@jit
def pixel_offset(b, i, j, height, width, channels: constexpr, LAST: constexpr):
    """Return the offset of channel 0 of a pixel of [., channels, height, width]."""
    return ((b * height + i) * width + j) * channels if LAST else (b * channels * height + i) * width + j


@jit
def steps_of(height, width, channels: constexpr, LAST: constexpr):
    """Return how far the next row, column and channel of [., channels, height, width] are."""
    return (width * channels, channels, 1) if LAST else (width, 1, height * width)


@jit
def codes_elements(box, sizes, layer: constexpr, tile: constexpr):
    """Return a box's elements in a tensor of codes: a 64-bit offset, offsets [BM, BN], and which of them there are."""
    b, i, j, inside = pixels_of(box, sizes.h, sizes.w, tile)
    BN: constexpr = tile.atoms
    n = box[3] + tl.arange(0, BN)
    step = 1 if layer.LAST else sizes.h * sizes.w
    offset = pixel_offset(b, i, j, sizes.h, sizes.w, layer.K, layer.LAST)[:, None] + (n * step)[None, :]
    start = box[0].to(tl.int64) * layer.K * sizes.h * sizes.w
    return start, offset, inside[:, None] & (n < layer.K)[None, :]
