"""The gradient of the dictionary: all correlations of a layer in one deterministic reduction.

For pairs of images r [N, C, H, W] and codes m [N, K, h, w], each with a scale s,

    dW[k, c, u, v] = sum over pairs of  s  sum over n, i, j of  m[n, k, i, j] r[n, c, i S + u - P, j S + v - P].

As a matrix product: atoms x pixels times pixels x (tap, channel). Pass 1 (`pointers` or `descriptors`) cuts the pixels
into splits; a program makes one [BA, BC] block of one split, for all pairs by consecutive loops into the same
accumulators, and writes it in fp32 to partial[split, K, taps, C]. Pass 2 adds the splits in a fixed order. There are no
atomics: the same call gives the same bits. Offsets are of 64 bits where a tensor passes 2^31 elements.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest

import torch
import triton.language as tl
from torch import Tensor

from sdnet.kernels.reference import Pair
from sdnet.kernels.triton_path import hardware
from sdnet.kernels.triton_path.correlation.descriptors import correlate_by_descriptors_kernel
from sdnet.kernels.triton_path.correlation.pixels import Launch
from sdnet.kernels.triton_path.correlation.pointers import correlate_kernel
from sdnet.kernels.triton_path.fused.descriptors import ALIGNMENT, pixel_boxes
from sdnet.kernels.triton_path.geometry import Geometry
from sdnet.kernels.triton_path.grids import boxes, correlation_blocks, splits_of
from sdnet.kernels.triton_path.jit import constexpr, jit_of_batch
from sdnet.kernels.triton_path.launch import launch
from sdnet.kernels.triton_path.tiles import VECTOR, Shape, Tile, ceil_div, correlation_tile

ScaledPair = tuple[Tensor, Tensor, Tensor | float]
"""Images [N, C, H, W], codes [N, K, h, w] and the scale of their correlation, 0-d fp32 or a number."""

PAIRS = 3
"""Pairs of a launch: two steps need three. More run as further launches that share pass 2."""

SPLITS, REDUCED = 32, 64
"""The block of pass 2, splits x elements: many programs, for few elements can have hundreds of splits."""


@jit_of_batch
def add_splits_kernel(
    partial_ptr, out_ptr, splits, numel, strides,
    C: constexpr, KH: constexpr, KW: constexpr, BS: constexpr, BE: constexpr,
):  # fmt: skip
    """Write out[k, c, u, v] = sum over splits of partial[split, k, u, v, c], in a fixed order."""
    ok, oc, ou, ov = strides
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


def launches_of(pairs: Sequence[ScaledPair]) -> Iterator[tuple[list[ScaledPair], list[ScaledPair]]]:
    """Cut the pairs into launches of at most PAIRS: some with one scale on the device, then some with one number.

    Between the two the accumulator is multiplied by scale / number, so pairs of the number zero are left out.
    """
    on_device: dict[int, list[ScaledPair]] = {}
    numbers: dict[float, list[ScaledPair]] = {}
    for pair in pairs:
        scale = pair[2]
        if isinstance(scale, Tensor):
            on_device.setdefault(id(scale), []).append(pair)
        elif scale != 0:
            numbers.setdefault(scale, []).append(pair)
    for head, tail in zip_longest(on_device.values(), numbers.values(), fillvalue=[]):
        while head or tail:
            count = min(len(head), PAIRS - bool(tail))
            yield head[:count], tail[: PAIRS - count]
            head, tail = head[count:], tail[PAIRS - count :]


def with_equal_strides(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors with the strides of the first, copied where they differ."""
    if len({tensor.stride() for tensor in tensors}) == 1:
        return tensors
    layout = torch.channels_last if tensors[0].stride(1) == 1 else torch.contiguous_format
    return [tensor.contiguous(memory_format=layout) for tensor in tensors]


def shape_of(images: list[Tensor], codes: list[Tensor], weight: Tensor, stride: Pair, precision: str) -> Shape:
    """Return the layer as the rules see it."""
    r, m = images[0], codes[0]
    itemsize = m.itemsize
    aligned = all(
        tensor.is_contiguous(memory_format=torch.channels_last) and tensor.data_ptr() % ALIGNMENT == 0
        for tensor in images + codes
    )
    atoms, channels, height, width = weight.shape
    return Shape(
        batch=m.shape[0],
        channels=channels,
        atoms=atoms,
        image_size=(r.shape[2], r.shape[3]),
        codes_size=(m.shape[2], m.shape[3]),
        kernel_size=(height, width),
        stride=stride,
        itemsize=itemsize,
        precision=precision,
        channels_last=m.stride(1) == 1,
        arch=hardware.arch_of(weight.device),
        aligned=aligned,
    )


def is_wide(tensors: tuple[Tensor, ...], images: int) -> bool:
    """Return whether offsets within a box of this many images can pass 2^31."""
    return any(
        (min(images, t.shape[0]) - 1) * t.stride(0)
        + sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:], strict=True))
        >= 2**31
        for t in tensors
    )


def weight_correlation(
    pairs: Sequence[ScaledPair],
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    precision: str = "tf32",
    tile: Tile | None = None,
    splits: int | None = None,
) -> Tensor:
    """Return the sum of scale corr(r, m) over pairs, in the shape, type and memory format of `weight`.

    Args:
        pairs: (r [N, C, H, W], m [N, K, h, w], scale). All r and m are of one type, fp32, fp16 or bf16; sums are fp32.
            Any strides do; pairs whose strides differ are copied. Pairs of one scale should come with one tensor
            object: they share a launch.
        weight: the dictionary [K, C, kh, kw].
        stride: of the convolution.
        padding: of the convolution.
        precision: the products of fp32, "tf32" or "ieee".
        tile: how the work is cut; chosen by a rule unless given and able to read these tensors.
        splits: into how many parts the pixels are cut; chosen by a rule unless given.
    """
    runs = list(launches_of(pairs))
    if not runs or pairs[0][1].numel() == 0:
        return torch.zeros_like(weight)
    ordered = [pair for head, tail in runs for pair in (*head, *tail)]
    images, codes = with_equal_strides([r for r, _, _ in ordered]), with_equal_strides([m for _, m, _ in ordered])
    r, m = images[0], codes[0]
    shape = shape_of(images, codes, weight, stride, precision)
    if tile is None or (tile.form == "descriptors" and not shape.aligned):
        tile = correlation_tile(shape)
    layer = Geometry.of(weight, stride, padding, shape.channels_last, precision)
    blocks, count = correlation_blocks(shape, tile), boxes(tile, shape.batch, shape.codes_size)
    if splits is None:
        splits = splits_of(blocks, count, hardware.processors_of(weight.device))

    partial = weight.new_empty((len(runs) * splits, weight.numel()), dtype=torch.float32)
    operands = zip(images, codes, strict=True)
    sizes = (*shape.image_size, *shape.codes_size)
    for (head, tail), part in zip(runs, partial.split(splits), strict=True):
        used = [next(operands) for _ in (*head, *tail)]
        used += used[:1] * (PAIRS - len(used))  # the kernel does not look at these
        scales = head[0][2] if head else part, part, tail[0][2] if tail else 1.0
        dense = r.shape[1] % VECTOR == 0 and tile.form == "few" and r.is_contiguous(memory_format=torch.channels_last)
        constants = Launch(len(head), len(tail), is_wide((r, m), tile.images), dense)
        if tile.form == "descriptors":
            sides = tile.channels, tile.atoms
            described = [pixel_boxes(t, tile.images, n) for pair in used for t, n in zip(pair, sides, strict=True)]
            groups = ceil_div(shape.batch, tile.images)
            arguments = (*described, *scales, groups, sizes, constants, layer, tile)
            launch(correlate_by_descriptors_kernel, (blocks, splits), arguments, tile.options)
        else:
            strides = (*r.stride(), *m.stride())
            operands_of_launch = (tensor for pair in used for tensor in pair)
            arguments = (*operands_of_launch, *scales, count, shape.batch, sizes, strides, constants, layer, tile)
            launch(correlate_kernel, (blocks, splits), arguments, tile.options)

    out = torch.empty_like(weight)
    grid = (ceil_div(out.numel(), REDUCED),)
    sums = (partial, out, partial.shape[0], out.numel(), out.stride(), layer.C, layer.KH, layer.KW, SPLITS, REDUCED)
    launch(add_splits_kernel, grid, sums)
    return out
