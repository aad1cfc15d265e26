"""The four steps of `fused` as cuDNN convolutions and pointwise kernels, where cuDNN's products win."""

import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels import reference
from sdnet.kernels.torch_path import Problem, rescaled
from sdnet.kernels.triton_path.fused import Layer
from sdnet.kernels.triton_path.pointwise import mask, shrink_step, subtract


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
    """z' and, if keep_next, y'."""
    r = rescaled(r, scale, in_place=False)
    v = F.conv2d(r, layer.weight, stride=layer.stride, padding=layer.padding)
    codes = shrink_step(v, problem, z, previous, beta, in_place=True)
    if not keep_next:
        return codes, None
    return codes, problem.extrapolated(codes, codes if z is None else z, next_beta)


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
    v = F.conv2d(dr, layer.weight, stride=layer.stride, padding=layer.padding)
    damping = problem.damping.to(m.dtype)
    direct = m * damping if problem.coding.mu else m
    if not beta and later is None:
        return mask(direct, z, minus=v), None
    if later is not None:
        later = next_beta * (later if at_y or not problem.coding.mu else later * damping)
    if at_y:
        d_y = direct - v
        return mask(d_y * (1 + beta), z, minus=later), d_y if keep_dy else None
    g = direct * (1 + beta) - v
    return mask(g, z, minus=later), None


def residual(layer: Layer, x: Tensor, point: Tensor, problem: Problem) -> Tensor:
    """x - A point, [N, n_dict C, H, W] for x [N, C, H, W]."""
    reconstruction = reference.synthesis(point, layer.weight, layer.size, layer.stride, layer.padding)
    return subtract(x, reconstruction, problem.coding.n_dict, in_place=True)


def spread(layer: Layer, m: Tensor, problem: Problem, scale: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """gamma c A m + add."""
    image = reference.synthesis(m, problem.scaled(layer.weight), layer.size, layer.stride, layer.padding)
    image = rescaled(image, scale, in_place=True)
    return image if add is None else image.add_(add)
