"""The path whose convolutions are cuDNN's, with the pointwise kernels between them: for layers where these win."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels import reference
from sdnet.kernels.torch_path import Problem, rescaled
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.pointwise import mask, shrink_step, subtract


@dataclass(frozen=True)
class CudnnPath:
    """The products of a layer by cuDNN: see `paths.Path` for their formulas and arguments."""

    layer: Layer
    problem: Problem

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
        v = self._analysis(rescaled(residual, scale, in_place=False))
        after = shrink_step(v, self.problem, codes, previous, beta, in_place=True)
        if not next_beta:
            return after, None
        return after, self.problem.extrapolated(after, after if codes is None else codes, next_beta)

    def residual(self, x: Tensor, point: Tensor) -> Tensor:
        """Return x - A p."""
        reconstruction = self._synthesis(point, self.layer.weight)
        return subtract(x, reconstruction, self.problem.coding.n_dict, in_place=True)

    def residual_gradient(self, m: Tensor, scale: Tensor | None = None, add: Tensor | None = None) -> Tensor:
        """Return gamma c A m + add."""
        image = rescaled(self._synthesis(m, self.problem.scaled(self.layer.weight)), scale, in_place=True)
        return image if add is None else image.add_(add)

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
        v = self._analysis(d_residual)
        at_y, has_mu = self.problem.coding.solver == "fista", self.problem.coding.mu != 0
        damping = self.problem.damping.to(m.dtype)
        direct = m * damping if has_mu else m
        if not beta and after is None:
            return mask(direct, codes, minus=v), None
        if after is not None:
            after = next_beta * (after if at_y or not has_mu else after * damping)
        if at_y:
            d_y = direct - v
            return mask(d_y * (1 + beta), codes, minus=after), d_y if beta else None
        return mask(direct * (1 + beta) - v, codes, minus=after), m if beta else None

    def _analysis(self, images: Tensor) -> Tensor:
        return F.conv2d(images, self.layer.weight, stride=self.layer.stride, padding=self.layer.padding)

    def _synthesis(self, codes: Tensor, weight: Tensor) -> Tensor:
        layer = self.layer
        return reference.synthesis(codes, weight, layer.image_size, layer.stride, layer.padding)
