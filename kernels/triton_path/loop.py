"""The Triton path of the operator: the loops of `torch_path`, each step one kernel. The mathematics stands there.

For two steps on a stride-1 layer the forward pass reads and writes 8 tensors of the codes' size: x to z_1, (z_1, x) to
r, and (r, z_1) to z_2. The backward pass recomputes r unless the forward pass kept it, and takes all weight
correlations in one reduction; from `FLUSH` pairs on in turns, and so holds no more than a few tensors beside the codes.
"""

from dataclasses import replace
from types import ModuleType

import torch
from einops import reduce
from torch import Tensor

from sdnet.kernels.reference import NORM_FLOOR, Pair, momentum
from sdnet.kernels.torch_path import Gradients, Needs, Problem, accumulate, copies_of, lam_correlation
from sdnet.kernels.triton_path import cudnn, fused, paths
from sdnet.kernels.triton_path.correlation import Correlated, weight_correlation
from sdnet.kernels.triton_path.fused import Layer
from sdnet.kernels.triton_path.hardware import gpu_of
from sdnet.kernels.triton_path.paths import Path
from sdnet.kernels.triton_path.pointwise import mask

FLUSH = 6
"""How many pairs (residual, codes) may wait for their weight correlation."""


def layer_of(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, layout: torch.memory_format) -> Layer:
    """The layer that a call runs on."""
    return Layer(weight, x.shape[0], (x.shape[2], x.shape[3]), stride, padding, layout)


def path_of(layer: Layer) -> Path:
    """How the four steps run, and why."""
    return paths.path_of(layer.shape, gpu_of(layer.weight.device))


def steps_for(layer: Layer) -> ModuleType:
    """The module that has the four steps."""
    return fused if path_of(layer).fused else cudnn


def residual_scale(residual: Tensor, problem: Problem) -> Tensor | None:
    """1/2 / |r| of each sample in fp32, [N, 1, 1, 1], for the norm data term; None stands for one."""
    if problem.coding.data_term == "squared":
        return None
    norm = torch.linalg.vector_norm(residual, dim=(1, 2, 3), keepdim=True, dtype=torch.float32)
    return 0.5 / norm.clamp_min(NORM_FLOOR)


def forward(
    x: Tensor, weight: Tensor, problem: Problem, layout: torch.memory_format, keep_residuals: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """All codes [z_1, ..., z_n], each [N, K, h, w]; the residuals [r_1, ..., r_{n-1}] if kept, else none."""
    layer = layer_of(x, weight, problem.stride, problem.padding, layout)
    steps = steps_for(layer)
    betas = [*momentum(problem.coding.n_steps, problem.coding.solver), 0.0]
    fista = problem.coding.solver == "fista"

    first = layer
    if problem.coding.n_dict > 1:  # the copies of x meet the sum of their dictionaries
        summed = reduce(weight.float(), "k (d c) h w -> k c h w", "sum", d=problem.coding.n_dict).to(weight.dtype)
        first = replace(layer, weight=summed)
    z, _ = steps.encode(first, x, problem)
    codes, y = [z], None
    residuals: list[Tensor] = []
    for k in range(1, problem.coding.n_steps):
        beta, next_beta = betas[k], betas[k + 1]
        residual = steps.residual(layer, x, z if y is None else y, problem)
        if keep_residuals:
            residuals.append(residual)
        scale = residual_scale(residual, problem)
        keep_next = fista and next_beta != 0 and k + 1 < problem.coding.n_steps
        previous = codes[-2] if beta else None
        z, y = steps.encode(layer, residual, problem, z, previous, beta, scale, next_beta, keep_next)
        codes.append(z)
    return codes, residuals


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: list[Tensor],
    residuals: list[Tensor],
    problem: Problem,
    needs: Needs,
    layout: torch.memory_format,
) -> Gradients:
    """The gradients for x, weight and lam from grad = dL/dz_n. `residuals` may be empty: then they are recomputed."""
    layer = layer_of(x, weight, problem.stride, problem.padding, layout)
    steps = steps_for(layer)
    betas = [*momentum(problem.coding.n_steps, problem.coding.solver), 0.0]
    fista, norm = problem.coding.solver == "fista", problem.coding.data_term == "norm"
    d_weight, gamma = WeightGradient(layer), problem.gamma
    d_target = d_lam = later = None

    m = mask(grad, codes[-1])
    for k in range(problem.coding.n_steps - 1, 0, -1):
        z, beta, next_beta = codes[k - 1], betas[k], betas[k + 1]
        kept = residuals[k - 1] if residuals else None
        point, scale = z, None
        if fista and beta and (needs.weight or (norm and kept is None)):
            point = problem.extrapolated(z, codes[k - 2], beta)
        if needs.weight or norm:
            residual = steps.residual(layer, x, point, problem) if kept is None else kept
            scale = residual_scale(residual, problem)
            if needs.weight:
                d_weight.add(residual if scale is None else residual * scale.to(residual.dtype), m, gamma)
        if needs.lam:
            d_lam = accumulate(d_lam, lam_correlation(m, codes[k], problem))
        dr = steps.spread(layer, m, problem, scale)
        if needs.weight:
            d_weight.add(dr, point, -1.0)
        if needs.x:
            d_target = dr if d_target is None else d_target + dr
        # y_k hands d_y_k on to z_{k-1} too: that is `later` for the next turn. The official loop's is damping m.
        m_before, d_y = steps.backstep(
            layer, dr, m, z, problem, beta, later, next_beta, at_y=fista, keep_dy=fista and beta != 0
        )
        later = (d_y if fista else m) if beta else None
        m = m_before

    if needs.lam:
        d_lam = accumulate(d_lam, lam_correlation(m, codes[0], problem))
    if needs.x:
        d_target = steps.spread(layer, m, problem, add=d_target)
        if problem.coding.n_dict > 1:
            d_target = reduce(d_target, "n (d c) h w -> n c h w", "sum", d=problem.coding.n_dict)
    if needs.weight:
        d_weight.add(copies_of(x, problem.coding.n_dict).contiguous(memory_format=layout), m, gamma)
    if d_lam is not None:
        d_lam = -gamma * d_lam
    return Gradients(d_target, d_weight.total() if needs.weight else None, d_lam)


class WeightGradient:
    """sum_i scale_i corr(r_i, m_i) over pairs (r_i, m_i) that come one after the other; rounded once."""

    def __init__(self, layer: Layer) -> None:
        self.layer, self.weight = layer, layer.weight
        self.pairs: list[Correlated] = []
        self.partial: Tensor | None = None

    def add(self, residual: Tensor, codes: Tensor, scale: Tensor | float) -> None:
        if len(self.pairs) == FLUSH:
            self.partial = accumulate(self.partial, self.correlation(self.weight.float()))
        self.pairs.append((residual, codes, scale))

    def correlation(self, like: Tensor) -> Tensor:
        """The waiting pairs' sum in the type of `like`."""
        pairs, self.pairs = self.pairs, []
        return weight_correlation(pairs, like, self.layer.stride, self.layer.padding, self.layer.precision)

    def total(self) -> Tensor:
        if self.partial is None:
            return self.correlation(self.weight)
        return accumulate(self.partial, self.correlation(self.weight.float())).to(self.weight.dtype)
