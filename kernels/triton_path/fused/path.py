"""The path whose kernels are the convolutions themselves: `FusedPath` launches the kernels of `fused.kernels`.

The step size and lambda are read on the device. Products accumulate in fp32; fp32 tensors are multiplied in tf32 where
torch allows it for convolutions.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path.fused.descriptors import aligned, matrix_blocks, pixel_boxes
from sdnet.kernels.triton_path.fused.kernels import codes_gradient_kernel, proximal_step_kernel, synthesis_kernel
from sdnet.kernels.triton_path.grids import analysis_programs, synthesis_programs
from sdnet.kernels.triton_path.launch import launch
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.tiles import Tile, Tiles


@dataclass(frozen=True)
class FusedPath:
    """The products of a layer by fused kernels: see `paths.Path` for their formulas and arguments."""

    layer: Layer
    problem: Problem
    tiles: Tiles

    def proximal_step(
        self,
        residual: Tensor,
        codes: Tensor | None = None,
        previous: Tensor | None = None,
        beta: float = 0.0,
        scale: Tensor | None = None,
        next_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return z' and y'."""
        layer, problem, tile = self.layer, self.problem, self.tiles.analysis
        out = layer.empty_codes()
        extrapolated = layer.empty_codes() if next_beta else None
        if out.numel():
            lam = problem.lam.contiguous()  # a view of one number per sample may have any strides
            arguments = (
                _boxes(aligned(residual), tile, tile.channels), _dictionary(layer, tile),
                *(_boxes(t, tile, tile.atoms) for t in (codes, previous if beta else None, out, extrapolated)),
                problem.step_size, lam, scale, (float(problem.coding.mu), float(beta), float(next_beta)),
                layer.batch, layer.sizes, layer.geometry, tile, problem.coding.nonnegative, lam.ndim > 0,
            )  # fmt: skip
            launch(proximal_step_kernel, analysis_programs(layer.shape, tile), arguments, tile.options)
        return out, extrapolated

    def residual(self, x: Tensor, point: Tensor) -> Tensor:
        """Return x - A p."""
        return self._synthesis(point, x=x)

    def residual_gradient(self, m: Tensor, scale: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Return gamma c A m + add."""
        return self._synthesis(m, scale=scale, add=add)

    def codes_gradient(
        self,
        d_residual: Tensor,
        m: Tensor,
        codes: Tensor,
        beta: float = 0.0,
        after: Tensor | None = None,
        next_beta: float = 0.0,
    ) -> tuple[Tensor, Tensor | None]:
        """Return m', and d_y or m."""
        layer, problem, tile = self.layer, self.problem, self.tiles.analysis
        at_y = problem.coding.solver == "fista"
        out = layer.empty_codes()
        d_y = layer.empty_codes() if at_y and beta else None
        if out.numel():
            arguments = (
                _boxes(d_residual, tile, tile.channels), _dictionary(layer, tile),
                *(_boxes(t, tile, tile.atoms) for t in (m, codes, after, out, d_y)),
                problem.step_size, (float(problem.coding.mu), float(beta), float(next_beta)),
                layer.batch, layer.sizes, layer.geometry, tile, at_y,
            )  # fmt: skip
            launch(codes_gradient_kernel, analysis_programs(layer.shape, tile), arguments, tile.options)
        return out, d_y if at_y or not beta else m

    def _synthesis(
        self, codes: Tensor, x: Tensor | None = None, scale: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        layer, problem, tile = self.layer, self.problem, self.tiles.synthesis
        image = layer.empty_images()
        if image.numel():
            arguments = (
                _boxes(codes, tile, tile.atoms), _dictionary(layer, tile),
                x, add, image, problem.step_size, scale, float(problem.coding.mu), layer.batch, layer.sizes,
                layer.geometry, tile,
                image.shape[1] if x is None else x.shape[1],
            )  # fmt: skip
            launch(synthesis_kernel, synthesis_programs(layer.shape, tile), arguments, tile.options)
        return image


def _boxes(tensor: Tensor | None, tile: Tile, channels: int) -> Any:
    """Return a tensor as the tile's form reads it: itself, or described by boxes of one pixel and so many channels."""
    if tensor is None or tile.form != "descriptors":
        return tensor
    return pixel_boxes(tensor, tile.images, channels)


def _dictionary(layer: Layer, tile: Tile) -> Any:
    """Return the packed dictionary as the tile's form reads it."""
    return matrix_blocks(layer.packed, tile.atoms, tile.channels) if tile.form == "descriptors" else layer.packed
