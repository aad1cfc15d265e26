"""A' and A by tensor descriptors: boxes go by TMA from memory to shared memory, and from there into wgmma.

For sm_90 and later and 16-bit channels_last tensors. A box is one pixel of BM images, so whether a tap falls inside the
image has one answer for the whole program, which leaves out the taps that do not: no product is made with the padding,
31 % of the products at 4 x 4 pixels and 18 % at 7 x 7. What lies outside a tensor reads as zeros.

A program multiplies pixels by atoms (or channels). With few of these the product has few columns, and a wgmma
instruction does little for each read of the pixels from shared memory. A tile that is `swapped` makes the transpose.

Images are described as [H, W, N, C], codes as [h, w, N, K], and the dictionary as the matrix [K, taps C].
"""

from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sdnet.kernels.triton_path.jit import constexpr, jit

ALIGNMENT = 16
"""Bytes that addresses and strides must be multiples of."""


@jit
def taps_inside(first, count, size):
    """Return the first of `count` places from `first` on that is inside [0, size), and the number of those inside."""
    before = tl.maximum(-first, 0)
    return before, tl.maximum(tl.minimum(count, size - first) - before, 0)


@jit
def analysis(images, dictionary, box, sizes, layer: constexpr, tile: constexpr):
    """Return A' of images at one pixel of the codes: see `forms`."""
    BM: constexpr = tile.images
    BN: constexpr = tile.atoms
    BK: constexpr = tile.channels
    blocks: constexpr = (layer.C + BK - 1) // BK
    image, row, column, atom, _ = box
    top, left = row * layer.SH - layer.PH, column * layer.SW - layer.PW
    first_h, count_h = taps_inside(top, layer.KH, sizes.H)
    first_w, count_w = taps_inside(left, layer.KW, sizes.W)
    total = tl.zeros((BN, BM) if tile.swapped else (BM, BN), tl.float32)
    for step in tl.range(0, count_h * count_w * blocks):
        tap, c = step // blocks, step % blocks * BK
        th, tw = first_h + tap // count_w, first_w + tap % count_w
        a = images.load([top + th, left + tw, image, c]).reshape(BM, BK)  # channels past C are zeros
        d = dictionary.load([atom, (th * layer.KW + tw) * layer.C + c])  # [BN, BK]
        total = tl.dot(d, a.T, total) if tile.swapped else tl.dot(a, d.T, total)
    return total.T if tile.swapped else total


@jit
def synthesis(codes, dictionary, box, phase, sizes, layer: constexpr, tile: constexpr):
    """Return A of codes at one pixel of a phase of the image: see `forms`."""
    KH: constexpr = layer.KH
    KW: constexpr = layer.KW
    SH: constexpr = layer.SH
    SW: constexpr = layer.SW
    BM: constexpr = tile.images
    BN: constexpr = tile.channels
    BK: constexpr = tile.atoms
    blocks: constexpr = (layer.K + BK - 1) // BK
    image, row, column, channel, _ = box
    phase_h, phase_w = phase
    tap_h, tap_w = (phase_h + layer.PH) % SH, (phase_w + layer.PW) % SW  # the phase's first; others follow in strides
    taps_h, taps_w = (KH - tap_h + SH - 1) // SH, (KW - tap_w + SW - 1) // SW
    top, left = row + (phase_h + layer.PH) // SH - taps_h + 1, column + (phase_w + layer.PW) // SW - taps_w + 1
    first_h, count_h = taps_inside(top, taps_h, sizes.h)  # top and left are those of the last tap
    first_w, count_w = taps_inside(left, taps_w, sizes.w)
    total = tl.zeros((BN, BM) if tile.swapped else (BM, BN), tl.float32)
    for step in tl.range(0, count_h * count_w * blocks):
        tap, k = step // blocks, step % blocks * BK
        y, x = first_h + tap // count_w, first_w + tap % count_w
        a = codes.load([top + y, left + x, image, k]).reshape(BM, BK)  # atoms past K are zeros
        rh, rw = tap_h + SH * (taps_h - 1 - y), tap_w + SW * (taps_w - 1 - x)
        d = dictionary.load([k, (rh * KW + rw) * layer.C + channel])  # [BK, BN]
        total = tl.dot(d.T, a.T, total) if tile.swapped else tl.dot(a, d, total)
    return total.T if tile.swapped else total


@jit
def load_codes(codes, box, elements, tile: constexpr):
    """Return a box of codes, [BM, BN]."""
    BM: constexpr = tile.images
    BN: constexpr = tile.atoms
    image, row, column, atom, _ = box
    return codes.load([row, column, image, atom]).reshape(BM, BN)


@jit
def store_codes(codes, value, box, elements, tile: constexpr):
    """Write [BM, BN] into a box of codes; return what it was rounded to."""
    BM: constexpr = tile.images
    BN: constexpr = tile.atoms
    image, row, column, atom, _ = box
    rounded = value.to(codes.dtype)
    codes.store([row, column, image, atom], rounded.reshape(1, 1, BM, BN))
    return rounded


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor at an address that a descriptor takes: itself, or a copy of a slice that lies elsewhere."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@lru_cache(maxsize=4096)
def pixel_form(shape: torch.Size, itemsize: int) -> tuple[list[int], list[int]]:
    """Return the sizes and strides of channels_last tensors [N, C, H, W] described as [H, W, N, C]."""
    batch, depth, height, width = shape
    # Not the tensor's own strides: an axis of length one may have any.
    strides = [width * depth, depth, height * width * depth, 1]
    if any(stride * itemsize % ALIGNMENT for stride in strides[:3]) or 0 in shape:
        raise ValueError(f"a descriptor cannot take a tensor of shape {list(shape)}; channels fill {ALIGNMENT} bytes.")
    return [height, width, batch, depth], strides


def descriptor(tensor: Tensor, sizes: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """Return `TensorDescriptor(tensor, sizes, strides, block)` without the checks of what the callers know."""
    if tensor.data_ptr() % ALIGNMENT:
        raise ValueError(f"a descriptor takes tensors at addresses that are multiples of {ALIGNMENT} alone.")
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape = tensor, sizes, strides, block
    made.padding, made.round_f32_to_tf32 = "zero", False
    return made


def pixel_boxes(tensor: Tensor, images: int, channels: int) -> TensorDescriptor:
    """Describe a channels_last tensor [N, C, H, W] as [H, W, N, C], in boxes of one pixel.

    Args:
        tensor: the tensor.
        images: images of a box.
        channels: channels of a box.

    Raises:
        ValueError: the tensor is not channels_last, so its memory is not what the descriptor would say.
    """
    if not tensor.is_contiguous(memory_format=torch.channels_last):
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} has strides {list(tensor.stride())}; a descriptor takes "
            "channels_last tensors alone."
        )
    sizes, strides = pixel_form(tensor.shape, tensor.itemsize)
    return descriptor(tensor, sizes, strides, [1, 1, images, channels])


def matrix_blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe a dense tensor as the matrix of its first axis and all others, in blocks of rows x columns."""
    count = tensor.shape[0]
    length = tensor.numel() // count
    if length * tensor.itemsize % ALIGNMENT:
        raise ValueError(f"a descriptor cannot take rows of {length} elements; they must fill {ALIGNMENT} bytes.")
    return descriptor(tensor, [count, length], [length, 1], [rows, columns])
