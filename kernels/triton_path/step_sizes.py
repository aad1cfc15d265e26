"""The power iterations of all layers of a network in five launches, whatever the number of layers.

    project     W[k] <- W[k] / |W[k]|
    analysis    a = A'u
    synthesis   v = A a, and partial sums of |v|^2; one launch for layers of few channels, one for the others
    finish      u <- v / |v|,   step <- 0.9 / |v|

Layers of any shapes share a launch: `owner` tells a program its layer and its index among the layer's programs, and a
row of a table the layer's addresses and sizes. Everything is fp32 and stays on the device; sums run in a fixed order.
The table is made once for a set of tensors, so a CUDA graph can hold the launches as long as these tensors live; call
once before the capture, which must not wait for the host.

A' and A are implicit GEMMs over one reduction axis, (channel, tap) or (atom, tap), and a stride multiplies by zeros in
A: a single image is little work, and launches are what it costs.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdnet.kernels.reference import codes_size
from sdnet.kernels.step_sizes import ATOM_FLOOR, FLOOR, SAFETY, DictionaryState
from sdnet.kernels.triton_path.tiles import ceil_div

jit: Any = triton.jit  # calls between kernels, and launches, are beyond a type checker

PIXELS, REDUCTION = 64, 32
WIDE, NARROW = 32, 16
"""Output channels of a program, and of one that makes the few channels of pictures."""
CHUNK = 4096
"""Elements of a program of `finish`."""

ADDRESSES, COLUMNS = tl.constexpr(6), tl.constexpr(20)
"""A row of the table: addresses of weight, vector, step, a, v, partial sums; 13 sizes; how many partial sums."""


@jit
def place(owner_ptr, table_ptr):
    """This program's index among its layer's, and the layer's row."""
    pid = tl.program_id(0)
    return tl.load(owner_ptr + 2 * pid + 1).to(tl.int32), table_ptr + tl.load(owner_ptr + 2 * pid) * COLUMNS


@jit
def tensor(row_ptr, column: tl.constexpr):
    """The fp32 tensor whose address stands in a column."""
    return tl.load(row_ptr + column).to(tl.pointer_type(tl.float32))


@jit
def size(row_ptr, index: tl.constexpr):
    """A size: C, K, H, W, h, w, kh, kw, the strides, the paddings, and whether channels lie last in the dictionary."""
    return tl.load(row_ptr + ADDRESSES + index).to(tl.int32)


@jit
def at_least(x, floor):
    """max(x, floor) that leaves a NaN."""
    return tl.where(x < floor, floor, x)


@jit
def project_kernel(owner_ptr, table_ptr, floor, BLOCK: tl.constexpr):
    """One atom, which lies in one piece in both memory formats."""
    k, row_ptr = place(owner_ptr, table_ptr)
    length = size(row_ptr, 0) * size(row_ptr, 6) * size(row_ptr, 7)
    atom_ptr = tensor(row_ptr, 0) + k * length
    e = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, length, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        w = tl.load(atom_ptr + start + e, mask=e < length - start, other=0.0)
        squares += w * w
    norm = at_least(tl.sqrt(tl.sum(squares, axis=0)), floor)
    for start in tl.range(0, length, BLOCK):  # pyright: ignore[reportGeneralTypeIssues]
        w = tl.load(atom_ptr + start + e, mask=e < length - start, other=0.0)
        tl.store(atom_ptr + start + e, w / norm, mask=e < length - start)


@jit
def analysis_kernel(
    owner_ptr, table_ptr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """a[k, i, j] = sum over c, s, t of W[k, c, s, t] u[c, i S + s - P, j S + t - P] for BM pixels and BN atoms."""
    index, row_ptr = place(owner_ptr, table_ptr)
    C, K, H, W = size(row_ptr, 0), size(row_ptr, 1), size(row_ptr, 2), size(row_ptr, 3)
    h, w, KH, KW = size(row_ptr, 4), size(row_ptr, 5), size(row_ptr, 6), size(row_ptr, 7)
    last = size(row_ptr, 12) != 0
    weight_ptr, vector_ptr, a_ptr = tensor(row_ptr, 0), tensor(row_ptr, 1), tensor(row_ptr, 3)
    p = index // tl.cdiv(K, BN) * BM + tl.arange(0, BM)
    k = index % tl.cdiv(K, BN) * BN + tl.arange(0, BN)
    top = p // w * size(row_ptr, 8) - size(row_ptr, 10)  # [BM]
    left = p % w * size(row_ptr, 9) - size(row_ptr, 11)
    length = C * KH * KW
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, length, BK):  # pyright: ignore[reportGeneralTypeIssues]
        q = start + tl.arange(0, BK)  # as the atom's elements lie in memory
        c = tl.where(last, q % C, q // (KH * KW))
        tap = tl.where(last, q // C, q % (KH * KW))
        y, x = top[:, None] + (tap // KW)[None, :], left[:, None] + (tap % KW)[None, :]  # [BM, BK]
        kept = (p < h * w)[:, None] & (q < length)[None, :] & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        u = tl.load(vector_ptr + c[None, :] * (H * W) + y * W + x, mask=kept, other=0.0)
        known = (q < length)[:, None] & (k < K)[None, :]
        d = tl.load(weight_ptr + k[None, :] * length + q[:, None], mask=known, other=0.0)  # [BK, BN]
        total = tl.dot(u, d, total, input_precision=PRECISION)
    tl.store(a_ptr + k[None, :] * (h * w) + p[:, None], total, mask=(p < h * w)[:, None] & (k < K)[None, :])


@jit
def synthesis_kernel(
    owner_ptr, table_ptr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """v[c, y, x] = sum over k, s, t of W[k, c, s, t] a[k, (y + P - s) / S, (x + P - t) / S] where that is a pixel."""
    index, row_ptr = place(owner_ptr, table_ptr)
    C, K, H, W = size(row_ptr, 0), size(row_ptr, 1), size(row_ptr, 2), size(row_ptr, 3)
    h, w, KH, KW = size(row_ptr, 4), size(row_ptr, 5), size(row_ptr, 6), size(row_ptr, 7)
    SH, SW, last = size(row_ptr, 8), size(row_ptr, 9), size(row_ptr, 12) != 0
    weight_ptr, a_ptr, v_ptr = tensor(row_ptr, 0), tensor(row_ptr, 3), tensor(row_ptr, 4)
    p = index // tl.cdiv(C, BN) * BM + tl.arange(0, BM)
    c = index % tl.cdiv(C, BN) * BN + tl.arange(0, BN)
    bottom, right = p // W + size(row_ptr, 10), p % W + size(row_ptr, 11)  # [BM]
    taps = KH * KW
    total = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(0, K * taps, BK):  # pyright: ignore[reportGeneralTypeIssues]
        q = start + tl.arange(0, BK)
        k, tap = q // taps, q % taps
        y, x = bottom[:, None] - (tap // KW)[None, :], right[:, None] - (tap % KW)[None, :]  # [BM, BK]
        i, j = y // SH, x // SW
        kept = (p < H * W)[:, None] & (k < K)[None, :] & (y >= 0) & (x >= 0) & (i < h) & (j < w)
        kept = kept & (i * SH == y) & (j * SW == x)
        a = tl.load(a_ptr + k[None, :] * (h * w) + i * w + j, mask=kept, other=0.0)
        shift = tl.where(last, tap[:, None] * C + c[None, :], c[None, :] * taps + tap[:, None])
        known = (k < K)[:, None] & (c < C)[None, :]
        d = tl.load(weight_ptr + k[:, None] * (C * taps) + shift, mask=known, other=0.0)  # [BK, BN]
        total = tl.dot(a, d, total, input_precision=PRECISION)
    tl.store(v_ptr + c[None, :] * (H * W) + p[:, None], total, mask=(p < H * W)[:, None] & (c < C)[None, :])
    tl.store(tensor(row_ptr, 5) + index, tl.sum(tl.sum(total * total, axis=1), axis=0))


@jit
def finish_kernel(owner_ptr, table_ptr, floor, safety, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """BLOCK elements of u; the first program of a layer writes the step as well."""
    index, row_ptr = place(owner_ptr, table_ptr)
    parts = tl.load(row_ptr + COLUMNS - 1).to(tl.int32)
    e = tl.arange(0, PARTS)
    squares = tl.zeros((PARTS,), tl.float32)
    for start in tl.range(0, parts, PARTS):  # pyright: ignore[reportGeneralTypeIssues]
        squares += tl.load(tensor(row_ptr, 5) + start + e, mask=e < parts - start, other=0.0)
    eigenvalue = at_least(tl.sqrt(tl.sum(squares, axis=0)), floor)
    element = index * BLOCK + tl.arange(0, BLOCK)
    kept = element < size(row_ptr, 0) * size(row_ptr, 2) * size(row_ptr, 3)
    v = tl.load(tensor(row_ptr, 4) + element, mask=kept)
    tl.store(tensor(row_ptr, 1) + element, v / eigenvalue, mask=kept)
    if index == 0:
        tl.store(tensor(row_ptr, 2), safety / eigenvalue)


class Layer(NamedTuple):
    """A dictionary as the kernels see it: addresses and sizes."""

    weight: int
    power_vector: int
    step_size: int
    channels: int
    atoms: int
    size: tuple[int, int]
    codes: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    last: bool

    @staticmethod
    def of(dictionary: DictionaryState) -> "Layer":
        weight, power_vector, step_size, stride, padding = dictionary
        atoms, channels, kh, kw = weight.shape
        grid = (power_vector.shape[2], power_vector.shape[3])
        codes = codes_size(grid, (kh, kw), stride, padding)
        addresses = (weight.data_ptr(), power_vector.data_ptr(), step_size.data_ptr())
        return Layer(*addresses, channels, atoms, grid, codes, (kh, kw), stride, padding, not weight.is_contiguous())

    @property
    def pixels(self) -> tuple[int, int]:
        """Of the image and of the codes."""
        return self.size[0] * self.size[1], self.codes[0] * self.codes[1]

    @property
    def block(self) -> int:
        """Image channels of a program."""
        return NARROW if self.channels <= NARROW else WIDE


class Plan(NamedTuple):
    """What the launches read. An owner has one row for each program: its layer and its index there."""

    table: Tensor
    project: Tensor
    analysis: Tensor
    synthesis: dict[int, Tensor]
    finish: Tensor
    scratch: Tensor


@lru_cache(maxsize=16)
def plan_of(layers: tuple[Layer, ...], device: torch.device) -> Plan:
    """The plan for these layers at these addresses; the one thing here that the host waits for, once."""
    parts = [ceil_div(layer.pixels[0], PIXELS) * ceil_div(layer.channels, layer.block) for layer in layers]
    needed = [
        (layer.atoms * layer.pixels[1], layer.channels * layer.pixels[0], part)
        for layer, part in zip(layers, parts, strict=True)
    ]
    scratch = torch.empty(sum(map(sum, needed)), dtype=torch.float32, device=device)
    free, rows = scratch.data_ptr(), []
    for layer, part, lengths in zip(layers, parts, needed, strict=True):
        addresses = [layer.weight, layer.power_vector, layer.step_size]
        for length in lengths:
            addresses.append(free)
            free += 4 * length
        sizes = (*layer.size, *layer.codes, *layer.kernel_size, *layer.stride, *layer.padding)
        rows.append([*addresses, layer.channels, layer.atoms, *sizes, int(layer.last), part])

    def owners(counts: Sequence[int]) -> Tensor:
        pairs = [(layer, index) for layer, count in enumerate(counts) for index in range(count)]
        return torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)

    return Plan(
        table=torch.tensor(rows, dtype=torch.int64, device=device),
        project=owners([layer.atoms for layer in layers]),
        analysis=owners([ceil_div(layer.pixels[1], PIXELS) * ceil_div(layer.atoms, WIDE) for layer in layers]),
        synthesis={
            block: owners([part * (layer.block == block) for layer, part in zip(layers, parts, strict=True)])
            for block in sorted({layer.block for layer in layers})
        },
        finish=owners([ceil_div(layer.channels * layer.pixels[0], CHUNK) for layer in layers]),
        scratch=scratch,
    )


def update_dictionaries(
    dictionaries: Sequence[DictionaryState], iterations: int = 1, precision: str | None = None
) -> None:
    """`step_sizes.follow` for fp32 dictionaries on one device, densely packed, and contiguous vectors.

    Multiplies in tf32 where cuDNN may, unless `precision` is "ieee".
    """
    if precision is None:
        cudnn: Any = torch.backends.cudnn
        precision = "tf32" if cudnn.conv.fp32_precision == "tf32" else "ieee"
    device = dictionaries[0].weight.device
    plan = plan_of(tuple(Layer.of(dictionary) for dictionary in dictionaries), device)
    project_kernel[(len(plan.project),)](plan.project, plan.table, ATOM_FLOOR, BLOCK=1024)
    blocks = {"BM": PIXELS, "BK": REDUCTION, "PRECISION": precision}
    for _ in range(iterations):
        analysis_kernel[(len(plan.analysis),)](plan.analysis, plan.table, BN=WIDE, **blocks)
        for block, owner in plan.synthesis.items():
            synthesis_kernel[(len(owner),)](owner, plan.table, BN=block, **blocks)
        finish_kernel[(len(plan.finish),)](plan.finish, plan.table, FLOOR, SAFETY, BLOCK=CHUNK, PARTS=1024)
    for weight, power_vector, step_size, *_ in dictionaries:  # autograd must know of what it did not see
        torch.autograd.graph.increment_version([weight, power_vector, step_size])
