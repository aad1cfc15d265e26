"""The steps of a CSC layer: each a convolution with all that surrounds it in the epilogue, one pass over its tensors.

With gamma = step / (1 + step mu), damping = 1 / (1 + step mu), and c one number per sample (one unless given):

    encode      z' = shrink(damping y + gamma c A'r, gamma lam),  y = z + beta (z - z_prev);  y' = z' + beta' (z' - z)
    residual    r  = x - A p,  x being compared with each of the n_dict reconstructions of p
    spread      dr = gamma c A m  (+ a gradient that is already there)
    backstep    m' = [z != 0] g,  g the gradient for z that came through m = dL/dz' masked, and dr:
                d_y = damping m - A'dr,   g = (1 + beta) d_y - beta' d_y'            if the gradient was taken at y
                d_y = damping m,          g = (1 + beta) d_y - A'dr - beta' d_y'     if it was taken at z

r, x, dr are images [N, C, H, W], all others codes [N, K, h, w]; y' and d_y are written only where a later step needs
them. step and lam are read on the device. Products accumulate in fp32; fp32 tensors are multiplied in tf32 where
torch.backends.cudnn allows it for convolutions, as cuDNN would.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdnet.kernels.reference import Pair, codes_size
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path import paths
from sdnet.kernels.triton_path.descriptors import aligned, matrix_blocks, pixel_boxes
from sdnet.kernels.triton_path.hardware import arch_of, gpu_of
from sdnet.kernels.triton_path.implicit_gemm import (
    analysis,
    corner,
    load_box,
    pixel,
    pixels,
    place,
    store_box,
    synthesis_by_descriptors,
    synthesis_by_pointers,
)
from sdnet.kernels.triton_path.tiles import Shape, Tile, Tiles, analysis_grid, synthesis_grid

jit: Any = triton.jit  # calls between kernels, and launches, are beyond a type checker


@jit
def encode_kernel(
    r, dictionary, z, previous, out, after, step_ptr, lam_ptr, scale_ptr, mu, beta, next_beta,
    N, taps, H, W, h, w, ONE_SIDED: tl.constexpr, PER_SAMPLE: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, channel = corner(h, w, K, TB, TH, TW, BN)
    v = analysis(
        r, dictionary, image, row, column, channel, N, taps, H, W, h, w,
        C, K, KH, KW, SH, SW, PH, PW, LAST, FORM, PRECISION, TB, TH, TW, BN, BK,
    )  # fmt: skip  # [BM, BN]
    step_size = tl.load(step_ptr).to(tl.float32)
    damping = 1 / (1 + step_size * mu)
    v = step_size * damping * v
    sample = image.to(tl.int64) + tl.arange(0, TB * TH * TW) // (TH * TW)  # [BM]
    if scale_ptr is not None:
        v *= tl.load(scale_ptr + sample, mask=sample < N, other=0.0)[:, None]
    if PER_SAMPLE:
        lam = tl.load(lam_ptr + sample, mask=sample < N, other=0.0).to(tl.float32)[:, None]  # [BM, 1]
    else:
        lam = tl.load(lam_ptr).to(tl.float32)
    threshold = step_size * damping * lam

    start, offset, kept = place(image, row, column, channel, N, h, w, K, LAST, TB, TH, TW, BN)
    codes = v
    if z is not None:
        codes = load_box(z, image, row, column, channel, start, offset, kept, FORM)
        y = codes
        if previous is not None:
            y += beta * (codes - load_box(previous, image, row, column, channel, start, offset, kept, FORM))
        v += damping * y
    # A NaN compares as false and so stays a NaN.
    if ONE_SIDED:
        v = tl.where(v < threshold, 0.0, v - threshold)
    else:
        v = tl.where(tl.abs(v) < threshold, 0.0, tl.where(v < 0, v + threshold, v - threshold))
    v = store_box(out, v, image, row, column, channel, start, offset, kept, FORM)
    if after is not None:  # from the rounded codes, as the backward pass will have it
        y = v + next_beta * (v - codes)
        store_box(after, y, image, row, column, channel, start, offset, kept, FORM)


@jit
def backstep_kernel(
    dr, dictionary, m, z, later, out, dy, step_ptr, mu, beta, next_beta,
    N, taps, H, W, h, w, AT_Y: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    image, row, column, channel = corner(h, w, K, TB, TH, TW, BN)
    through = analysis(
        dr, dictionary, image, row, column, channel, N, taps, H, W, h, w,
        C, K, KH, KW, SH, SW, PH, PW, LAST, FORM, PRECISION, TB, TH, TW, BN, BK,
    )  # fmt: skip  # [BM, BN]
    damping = 1 / (1 + tl.load(step_ptr).to(tl.float32) * mu)

    start, offset, kept = place(image, row, column, channel, N, h, w, K, LAST, TB, TH, TW, BN)
    direct = damping * load_box(m, image, row, column, channel, start, offset, kept, FORM)
    if AT_Y:
        direct -= through
        if dy is not None:
            store_box(dy, direct, image, row, column, channel, start, offset, kept, FORM)
        g = (1 + beta) * direct
    else:
        g = (1 + beta) * direct - through
    if later is not None:  # d_y' where the gradient was taken at y, else m' with d_y' = damping m'
        d_y = load_box(later, image, row, column, channel, start, offset, kept, FORM)
        g -= next_beta * d_y if AT_Y else next_beta * damping * d_y
    codes = load_box(z, image, row, column, channel, start, offset, kept, FORM)
    store_box(out, tl.where(codes != 0, g, 0.0), image, row, column, channel, start, offset, kept, FORM)


@jit
def synthesis_kernel(
    p, dictionary, x_ptr, add_ptr, out_ptr, step_ptr, scale_ptr, mu,
    N, taps, H, W, h, w, X: tl.constexpr,
    C: tl.constexpr, K: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, LAST: tl.constexpr, FORM: tl.constexpr, PRECISION: tl.constexpr,
    TB: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """residual if x [N, X, H, W] is given, else spread."""
    columns: tl.constexpr = C * SH * SW if FORM == "few" else C
    down, across = (H + SH - 1) // SH, (W + SW - 1) // SW
    image, top, left, n0 = corner(down, across, columns, TB, TH, TW, BN)
    b, i, j, inside = pixels(image, top, left, N, down, across, TB, TH, TW)
    first, n = image.to(tl.int64), n0 + tl.arange(0, BN)
    if FORM == "few":  # [1, BN]
        phase_h, phase_w, channel = (n // C // SW)[None, :], (n // C % SW)[None, :], (n % C)[None, :]
    else:
        phase_h, phase_w, channel = tl.program_id(1) // SW, tl.program_id(1) % SW, n[None, :]
    if FORM == "descriptors":
        sum = synthesis_by_descriptors(
            p, dictionary, image, top, left, n0, phase_h, phase_w, h, w,
            C, K, KH, KW, SH, SW, PH, PW, TB, BN, BK,
        )  # fmt: skip  # [BM, BN]
    else:
        sum = synthesis_by_pointers(
            p, dictionary, image, b, i, j, inside, n, phase_h, phase_w, taps, h, w,
            C, K, KH, KW, SH, SW, PH, PW, LAST, FORM == "few", BN, BK, PRECISION,
        )  # fmt: skip

    row, column = i[:, None] * SH + phase_h, j[:, None] * SW + phase_w  # [BM, 1], or [BM, BN] with few channels
    kept = inside[:, None] & (n < columns)[None, :] & (row < H) & (column < W)
    channel_step = 1 if LAST else H * W
    offset = pixel(b[:, None], row, column, H, W, C, LAST) + channel * channel_step
    start = first * C * H * W
    if x_ptr is not None:
        if C == X:
            x = tl.load(x_ptr + start + offset, mask=kept, other=0.0)
        else:
            x_offset = pixel(b[:, None], row, column, H, W, X, LAST) + channel % X * channel_step
            x = tl.load(x_ptr + first * X * H * W + x_offset, mask=kept, other=0.0)
        v = x.to(tl.float32) - sum
    else:
        step_size = tl.load(step_ptr).to(tl.float32)
        v = step_size / (1 + step_size * mu) * sum
        if scale_ptr is not None:
            v *= tl.load(scale_ptr + first + b, mask=inside, other=0.0)[:, None]
        if add_ptr is not None:
            v += tl.load(add_ptr + start + offset, mask=kept, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offset, v.to(out_ptr.dtype.element_ty), mask=kept)


@dataclass(frozen=True)
class Layer:
    """A dictionary [K, C, kh, kw] on images of one size: what the launchers need beside the tensors of a step."""

    weight: Tensor
    batch: int
    size: Pair
    stride: Pair
    padding: Pair
    layout: torch.memory_format
    given_tiles: Tiles | None = None
    """In the place of those that `choices` would choose."""

    @cached_property
    def grid(self) -> Pair:
        """Height and width of the codes."""
        height, width = self.weight.shape[2:]
        return codes_size(self.size, (height, width), self.stride, self.padding)

    @cached_property
    def packed(self) -> Tensor:
        """The dictionary in the memory order [K, kh, kw, C]."""
        return aligned(self.weight.contiguous(memory_format=torch.channels_last))

    @cached_property
    def precision(self) -> str:
        """What fp32 tensors are multiplied in."""
        cudnn: Any = torch.backends.cudnn
        return "tf32" if self.weight.dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else "ieee"

    def empty_codes(self) -> Tensor:
        shape = (self.batch, self.weight.shape[0], *self.grid)
        return torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device, memory_format=self.layout)

    def empty_image(self) -> Tensor:
        shape = (self.batch, self.weight.shape[1], *self.size)
        return torch.empty(shape, dtype=self.weight.dtype, device=self.weight.device, memory_format=self.layout)

    def arguments(self, tile: Tile, **flags: bool | int) -> dict[str, Any]:
        """The sizes at run time, the constexprs that all kernels share, one kernel's own, the options of the launch."""
        atoms, channels, kernel_h, kernel_w = self.weight.shape
        return {
            "N": self.batch, "taps": kernel_h * kernel_w,
            "H": self.size[0], "W": self.size[1], "h": self.grid[0], "w": self.grid[1],
            "C": channels, "K": atoms, "KH": kernel_h, "KW": kernel_w,
            "SH": self.stride[0], "SW": self.stride[1], "PH": self.padding[0], "PW": self.padding[1],
            "LAST": self.layout == torch.channels_last, "FORM": tile.form, "PRECISION": self.precision,
            "TB": tile.images, "TH": tile.rows, "TW": tile.columns, "BN": tile.channels, "BK": tile.reduction,
            "num_warps": tile.warps, "num_stages": tile.stages, **flags,
        }  # fmt: skip

    def boxes(self, tensor: Tensor | None, tile: Tile, channels: int) -> Any:
        """A tensor [N, ., ., .] as the tile's form reads it: one pixel and so many channels at a time, or anywhere."""
        if tensor is None or tile.form != "descriptors":
            return tensor
        return pixel_boxes(tensor, tile.images, channels)

    def dictionary(self, tile: Tile, atoms: int, channels: int) -> Any:
        """The packed dictionary as the tile's form reads it: so many atoms and channels of a tap at a time."""
        return matrix_blocks(self.packed, atoms, channels) if tile.form == "descriptors" else self.packed

    @cached_property
    def tiles(self) -> Tiles:
        """What the directions run with."""
        return self.given_tiles or paths.tiles_of(self.shape, gpu_of(self.weight.device))

    @cached_property
    def shape(self) -> Shape:
        """The layer as the rules for tiles see it."""
        atoms, channels, *kernel_size = self.weight.shape
        return Shape(
            self.batch, channels, atoms, self.size, self.grid, (kernel_size[0], kernel_size[1]), self.stride,
            self.weight.element_size(), self.precision, self.layout == torch.channels_last, arch_of(self.weight.device),
        )  # fmt: skip


def encode(
    layer: Layer,
    r: Tensor,
    problem: Problem,
    z: Tensor | None = None,
    previous: Tensor | None = None,
    beta: float = 0.0,
    scale: Tensor | None = None,
    next_beta: float = 0.0,
    keep_next: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """z' and, if keep_next, y'. z = None stands for zero, the first step; `previous` is read only if beta is not 0."""
    codes = layer.empty_codes()
    extrapolated = layer.empty_codes() if keep_next else None
    if codes.numel():
        tile = layer.tiles.analysis
        encode_kernel[analysis_grid(layer.shape, tile)](
            layer.boxes(aligned(r), tile, tile.reduction), layer.dictionary(tile, tile.channels, tile.reduction),
            *(layer.boxes(t, tile, tile.channels) for t in (z, previous if beta else None, codes, extrapolated)),
            problem.step_size, problem.lam, scale, problem.coding.mu, beta, next_beta,
            **layer.arguments(tile, ONE_SIDED=problem.coding.nonnegative, PER_SAMPLE=problem.lam.ndim > 0),
        )  # fmt: skip
    return codes, extrapolated


def backstep(
    layer: Layer,
    dr: Tensor,
    m: Tensor,
    z: Tensor,
    problem: Problem,
    beta: float = 0.0,
    later: Tensor | None = None,
    next_beta: float = 0.0,
    at_y: bool = True,
    keep_dy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """m' and, if keep_dy, d_y. `later` is d_y', or the m that d_y' is damping times of if not at_y."""
    masked = layer.empty_codes()
    d_y = layer.empty_codes() if keep_dy else None
    if masked.numel():
        tile = layer.tiles.analysis
        backstep_kernel[analysis_grid(layer.shape, tile)](
            layer.boxes(dr, tile, tile.reduction), layer.dictionary(tile, tile.channels, tile.reduction),
            *(layer.boxes(t, tile, tile.channels) for t in (m, z, later, masked, d_y)),
            problem.step_size, problem.coding.mu, beta, next_beta,
            **layer.arguments(tile, AT_Y=at_y),
        )  # fmt: skip
    return masked, d_y


def residual(layer: Layer, x: Tensor, point: Tensor, problem: Problem) -> Tensor:
    """x - A point, [N, n_dict C, H, W] for x [N, C, H, W]."""
    return _synthesis(layer, point, problem, x=x)


def spread(layer: Layer, m: Tensor, problem: Problem, scale: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """gamma c A m + add."""
    return _synthesis(layer, m, problem, scale=scale, add=add)


def _synthesis(
    layer: Layer,
    codes: Tensor,
    problem: Problem,
    x: Tensor | None = None,
    scale: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    image = layer.empty_image()
    if image.numel():
        tile = layer.tiles.synthesis
        synthesis_kernel[synthesis_grid(layer.shape, tile)](
            layer.boxes(codes, tile, tile.reduction), layer.dictionary(tile, tile.reduction, tile.channels),
            x, add, image, problem.step_size, scale, problem.coding.mu,
            **layer.arguments(tile, X=layer.weight.shape[1] if x is None else x.shape[1]),
        )  # fmt: skip
    return image
