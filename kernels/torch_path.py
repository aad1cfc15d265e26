"""The torch path of the operator: the forward loop with few passes over memory, and the gradients written by hand.

Same mathematics as `reference`. Two things make it fast. P is folded into the convolution: with
gamma = step_size / (1 + step_size mu),

    P(y + step_size A'r) = shrink(y / (1 + step_size mu) + conv(r, gamma W), gamma lam),

so a scalar threshold becomes the convolution's bias and the element-wise work runs in place. And autograd keeps the
input, the codes and, with `keep_residuals`, the residuals: the masks are in the codes.

Backward. From g_{k+1} = dL/dz_{k+1}, with m_{k+1} = [z_{k+1} != 0] g_{k+1}, residual r_k = x - A p_k, and c_k the
residual's scale (1, or 1/2 / |r_k| for the norm data term, taken as a constant):

    dr_k = c_k conv_transpose(m_{k+1}, gamma W)              dx  += dr_k
    dy_k = m_{k+1} / (1 + step_size mu)                      dp_k = -A' dr_k
    dW  += gamma corr(c_k r_k, m_{k+1}) - corr(dr_k, p_k)    dlam -= gamma sum m_{k+1} sign(z_{k+1})

and y_k = z_k + beta_k (z_k - z_{k-1}) hands dy_k (and dp_k, where p_k = y_k) on to the two codes before it.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import Pair, analysis, copies_of, momentum, residual_scale, synthesis


class Problem(NamedTuple):
    """What the loop solves, apart from x and the weight.

    Attributes:
        step_size: 0-d, of at least fp32.
        lam: 0-d, or [N, 1, 1, 1], [1, K, 1, 1] or [N, K, 1, 1]; of at least fp32.
        coding: the options.
        stride: of the convolution.
        padding: of the convolution.
    """

    step_size: Tensor
    lam: Tensor
    coding: Coding
    stride: Pair
    padding: Pair

    @property
    def damping(self) -> Tensor:
        """The factor 1 / (1 + step_size mu)."""
        return 1 / (1 + self.step_size * self.coding.mu)

    @property
    def gamma(self) -> Tensor:
        """The factor step_size / (1 + step_size mu)."""
        return self.step_size * self.damping

    def scaled(self, weight: Tensor) -> Tensor:
        """Return gamma W in W's dtype, rounded once."""
        return (weight.to(self.step_size.dtype) * self.gamma).to(weight.dtype)

    @staticmethod
    def extrapolated(codes: Tensor, previous: Tensor, beta: float) -> Tensor:
        """Return y = z + beta (z - z_prev)."""
        return torch.lerp(previous, codes, 1 + beta)


def residual_of(x: Tensor, gradient_point: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Return r = x - A p, [N, n_dict C, H, W]."""
    size = (x.shape[2], x.shape[3])
    reconstruction = synthesis(gradient_point, weight, size, problem.stride, problem.padding)
    return torch.sub(copies_of(x, problem.coding.n_dict), reconstruction, out=reconstruction)


def rescaled(residual: Tensor, scale: Tensor | None, in_place: bool) -> Tensor:
    """Return c r, in r's dtype and rounded once; r itself for c = None, which stands for one."""
    if scale is None:
        return residual
    return residual.mul_(scale) if in_place else (residual * scale).to(residual.dtype)


def shrink_step(y: Tensor | None, residual: Tensor, scaled_weight: Tensor, problem: Problem) -> Tensor:
    """Return shrink(y / (1 + step_size mu) + conv(r, gamma W), gamma lam); y = None stands for zero."""
    threshold = problem.gamma * problem.lam
    bias = None
    if problem.coding.nonnegative and (threshold.ndim == 0 or threshold.shape[0] == 1):
        bias = (-threshold).to(residual.dtype).flatten().expand(scaled_weight.shape[0])
    v = F.conv2d(residual, scaled_weight, bias, problem.stride, problem.padding)
    if y is not None and problem.coding.mu:
        v.addcmul_(y, problem.damping.to(v.dtype))
    elif y is not None:
        v.add_(y)
    if problem.coding.nonnegative:
        if bias is None:
            v.sub_(threshold.to(v.dtype))
        return v.clamp_min_(0)
    threshold = threshold.to(v.dtype)
    return v.sub_(torch.clamp(v, -threshold, threshold))


def forward(
    x: Tensor, weight: Tensor, problem: Problem, keep_residuals: bool = False, keep_codes: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Return all codes [z_1, ..., z_n], each [N, K, h, w], and the residuals [r_1, ..., r_{n-1}] if kept, else none.

    Without `keep_codes` return the last codes at least, and free those that no later step reads.
    """
    scaled, n_dict = problem.scaled(weight), problem.coding.n_dict
    # All n_dict copies of x are equal, so the first step correlates x with the sum of the dictionaries.
    first = reduce(scaled, "k (d c) h w -> k c h w", "sum", d=n_dict) if n_dict > 1 else scaled
    codes = [shrink_step(None, x, first, problem)]
    residuals: list[Tensor] = []
    for beta in momentum(problem.coding.n_steps, problem.coding.solver)[1:]:
        extrapolated = problem.extrapolated(codes[-1], codes[-2], beta) if beta else codes[-1]
        gradient_point = extrapolated if problem.coding.solver == "fista" else codes[-1]
        residual = residual_of(x, gradient_point, weight, problem)
        if keep_residuals:
            residuals.append(residual)
        residual = rescaled(residual, residual_scale(residual, problem.coding.data_term), in_place=not keep_residuals)
        codes.append(shrink_step(extrapolated, residual, scaled, problem))
        if not keep_codes:
            del codes[:-2]
    return codes, residuals


def weight_correlation(residual: Tensor, codes: Tensor, weight: Tensor, problem: Problem) -> Tensor:
    """Return corr(r, m), the gradient of sum(m * conv(r, W)) for W, in W's shape."""
    return torch.ops.aten.convolution_backward(
        codes, residual, weight, None, problem.stride, problem.padding, (1, 1), False, (0, 0), 1, (False, True, False)
    )[1]


def masked(grad: Tensor, codes: Tensor, nonnegative: bool) -> Tensor:
    """Return m = [z != 0] g."""
    if nonnegative:
        return torch.ops.aten.threshold_backward(grad, codes, 0)
    return torch.where(codes == 0, 0, grad)


def lam_correlation(m: Tensor, codes: Tensor, problem: Problem) -> Tensor:
    """Return sum m sign(z), in lam's shape and dtype."""
    products = m if problem.coding.nonnegative else m * codes.sign()
    if problem.lam.ndim == 0:
        return products.sum(dtype=problem.lam.dtype)
    broadcast = [dim for dim in range(4) if problem.lam.shape[dim] == 1]
    return products.sum(dim=broadcast, keepdim=True, dtype=problem.lam.dtype)


def accumulate(total: Tensor | None, term: Tensor) -> Tensor:
    """Return total + term, in total's memory; without a total the term itself."""
    return term if total is None else total.add_(term)


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    weight: bool
    lam: bool


class Gradients(NamedTuple):
    """The gradients dL/dx, dL/dweight and dL/dlam, None where not needed."""

    x: Tensor | None
    weight: Tensor | None
    lam: Tensor | None


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: list[Tensor],
    residuals: list[Tensor],
    problem: Problem,
    needs: Needs,
) -> Gradients:
    """Return the gradients for x, weight and lam.

    Args:
        grad: dL/dz_n, [N, K, h, w].
        x: the images.
        weight: the dictionary.
        codes: all codes of the forward pass, [z_1, ..., z_n].
        residuals: those of the forward pass; empty if it did not keep them: then they are computed again.
        problem: what the forward pass solved.
        needs: which gradients are needed.
    """
    size, stride, padding = (x.shape[2], x.shape[3]), problem.stride, problem.padding
    scaled = problem.scaled(weight)
    betas = momentum(problem.coding.n_steps, problem.coding.solver)
    d_target = d_lam = None  # d_target: for the n_dict copies of x
    analysis_correlation = synthesis_correlation = None  # dW = gamma analysis - synthesis

    d_codes: list[Tensor | None] = [None] * (problem.coding.n_steps - 1) + [grad]
    for k in range(problem.coding.n_steps - 1, 0, -1):
        z, beta = codes[k - 1], betas[k]
        y = problem.extrapolated(z, codes[k - 2], beta) if beta else z
        point = y if problem.coding.solver == "fista" else z

        m = masked(pop_entry(d_codes, k), codes[k], problem.coding.nonnegative)
        if needs.lam:
            d_lam = accumulate(d_lam, lam_correlation(m, codes[k], problem))
        d_residual = synthesis(m, scaled, size, stride, padding)
        if needs.weight or problem.coding.data_term == "norm":
            residual = residuals[k - 1] if residuals else residual_of(x, point, weight, problem)
            scale = residual_scale(residual, problem.coding.data_term)
            residual = rescaled(residual, scale, in_place=not residuals)
            d_residual = rescaled(d_residual, scale, in_place=True)
            if needs.weight:
                term = weight_correlation(residual, m, weight, problem)
                analysis_correlation = accumulate(analysis_correlation, term)
                term = weight_correlation(d_residual, point, weight, problem)
                synthesis_correlation = accumulate(synthesis_correlation, term)
        d_point = analysis(d_residual, weight, stride, padding).neg_()
        if needs.x:
            d_target = accumulate(d_target, d_residual)

        d_y = m.mul_(problem.damping.to(m.dtype)) if problem.coding.mu else m
        if problem.coding.solver == "fista":
            d_y.add_(d_point)
            d_point = None
        if beta:
            d_codes[k - 2] = accumulate(d_codes[k - 2], d_y * -beta)
            d_y.mul_(1 + beta)
        d_z = d_y if d_point is None else d_y.add_(d_point)
        d_codes[k - 1] = accumulate(d_codes[k - 1], d_z)

    m = masked(pop_entry(d_codes, 0), codes[0], problem.coding.nonnegative)
    if needs.lam:
        d_lam = accumulate(d_lam, lam_correlation(m, codes[0], problem))
    if needs.x:
        d_target = accumulate(d_target, synthesis(m, scaled, size, stride, padding))
    if needs.weight:
        term = weight_correlation(copies_of(x, problem.coding.n_dict), m, weight, problem)
        analysis_correlation = accumulate(analysis_correlation, term)

    if d_target is not None and problem.coding.n_dict > 1:
        d_target = reduce(d_target, "n (d c) h w -> n c h w", "sum", d=problem.coding.n_dict)
    if d_lam is not None:
        d_lam = -problem.gamma * d_lam
    return Gradients(d_target, weight_gradient(analysis_correlation, synthesis_correlation, problem), d_lam)


def pop_entry(tensors: list[Tensor | None], k: int) -> Tensor:
    """Return entry k and remove it from the list, so that its memory is freed once it has been used."""
    entry, tensors[k] = tensors[k], None
    assert entry is not None
    return entry


def weight_gradient(analysis: Tensor | None, synthesis: Tensor | None, problem: Problem) -> Tensor | None:
    """Return gamma analysis - synthesis, rounded once; None without the former, zero for a missing latter."""
    if analysis is None:
        return None
    gradient = analysis.to(problem.step_size.dtype) * problem.gamma
    if synthesis is not None:
        gradient -= synthesis
    return gradient.to(analysis.dtype)
