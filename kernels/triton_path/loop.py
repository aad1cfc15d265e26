"""The Triton path of the operator: the loops of `torch_path`, each step one kernel. The mathematics stands there.

For two steps on a stride-1 layer the forward pass reads and writes 8 tensors of the codes' size: x to z_1, (z_1, x) to
r, and (r, z_1) to z_2. The backward pass computes r again unless the forward pass kept it, and takes all weight
correlations in one reduction. From `MOST_PENDING` pairs on it takes them in turns, and so holds no more than a few
tensors beside the codes.
"""

from dataclasses import replace

import torch
from einops import reduce
from torch import Tensor

from sdnet.kernels import torch_path
from sdnet.kernels.reference import Pair, momentum, residual_scale
from sdnet.kernels.torch_path import Gradients, Needs, Problem, accumulate, copies_of, lam_correlation, rescaled
from sdnet.kernels.triton_path.correlation.weight_gradient import ScaledPair, weight_correlation
from sdnet.kernels.triton_path.cudnn import CudnnPath
from sdnet.kernels.triton_path.fused.descriptors import aligned
from sdnet.kernels.triton_path.fused.path import FusedPath
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.padding import padded, without_padding
from sdnet.kernels.triton_path.paths import AUTO, ChosenPath, Path, choose_path
from sdnet.kernels.triton_path.pointwise import mask

MOST_PENDING = 6
"""The most pairs (residual, codes) that wait for their weight correlation."""


def layer_of(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, layout: torch.memory_format) -> Layer:
    """Return the layer that a call runs on."""
    return Layer(weight, x.shape[0], (x.shape[2], x.shape[3]), stride, padding, layout)


def choice_of(layer: Layer, asked: str = AUTO) -> ChosenPath:
    """Return the path and the tiles of a layer; `asked` is for `choose_path`."""
    return choose_path(layer.shape, asked)


def path_of(layer: Layer, problem: Problem, choice: ChosenPath) -> Path:
    """Return the chosen path for a layer and a problem."""
    return CudnnPath(layer, problem) if choice.name == "cudnn" else FusedPath(layer, problem, choice.tiles)


def pads(choice: ChosenPath, problem: Problem) -> bool:
    """Return whether images and dictionary get channels of zeros; those of several dictionaries get none."""
    return choice.name == "padded" and problem.coding.n_dict == 1


def dense(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """Return the tensor as kernels read it: dense, in the layer's memory format, at an address for descriptors."""
    return aligned(tensor.contiguous(memory_format=layout))


def forward(
    x: Tensor,
    weight: Tensor,
    problem: Problem,
    layout: torch.memory_format,
    keep_residuals: bool = False,
    asked: str = AUTO,
    keep_codes: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return all codes [z_1, ..., z_n], each [N, K, h, w], and the residuals [r_1, ..., r_{n-1}] if kept, else none.

    Without `keep_codes` return the last codes at least, and free those that no later step reads.
    """
    x, coding = dense(x, layout), problem.coding
    layer = layer_of(x, weight, problem.stride, problem.padding, layout)
    choice = choice_of(layer, asked)
    if pads(choice, problem):
        x, layer = dense(padded(x), layout), replace(layer, weight=padded(weight))
    path = first = path_of(layer, problem, choice)
    betas = [*momentum(coding.n_steps, coding.solver), 0.0]
    if coding.n_dict > 1:  # the first step correlates x with the sum of the dictionaries
        summed = reduce(weight.float(), "k (d c) h w -> k c h w", "sum", d=coding.n_dict).to(weight.dtype)
        summed_layer = replace(layer, weight=summed)
        first = path_of(summed_layer, problem, choice_of(summed_layer, choice.name))
    z, _ = first.proximal_step(x)
    codes, y = [z], None
    residuals: list[Tensor] = []
    for k in range(1, coding.n_steps):
        beta, next_beta = betas[k], betas[k + 1]
        residual = path.residual(x, z if y is None else y)
        if keep_residuals:
            residuals.append(residual)
        needs_next = coding.solver == "fista" and k + 1 < coding.n_steps
        previous = codes[-2] if beta else None
        z, y = path.proximal_step(
            residual, z, previous, beta, residual_scale(residual, coding.data_term), next_beta if needs_next else 0.0
        )
        codes.append(z)
        if not keep_codes:
            del codes[:-2]
    return codes, [without_padding(residual, weight.shape[1]) for residual in residuals]


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    codes: list[Tensor],
    residuals: list[Tensor],
    problem: Problem,
    needs: Needs,
    layout: torch.memory_format,
    asked: str = AUTO,
) -> Gradients:
    """Return the gradients for x, weight and lam from grad = dL/dz_n [N, K, h, w].

    Args:
        grad: dL/dz_n.
        x: the images.
        weight: the dictionary.
        codes: all codes of the forward pass.
        residuals: those of the forward pass; empty if it did not keep them: then they are computed again.
        problem: what the forward pass solved.
        needs: which gradients are needed.
        layout: the memory format of the layer. Saved tensors may come back in another one, and are copied to it.
        asked: what the forward pass was asked for.
    """
    grad, x, *saved = (dense(tensor, layout) for tensor in (grad, x, *codes, *residuals))
    codes, residuals = saved[: len(codes)], saved[len(codes) :]
    coding = problem.coding
    layer = layer_of(x, weight, problem.stride, problem.padding, layout)
    choice = choice_of(layer, asked)
    if pads(choice, problem):
        x, *residuals = (dense(padded(tensor), layout) for tensor in (x, *residuals))
        layer = replace(layer, weight=padded(weight))
    path = path_of(layer, problem, choice)
    betas = [*momentum(coding.n_steps, coding.solver), 0.0]
    fista, norm = coding.solver == "fista", coding.data_term == "norm"
    d_weight, gamma = WeightGradient(layer, choice, problem), problem.gamma
    d_target = d_lam = after = None

    m = mask(grad, codes[-1])
    for k in range(coding.n_steps - 1, 0, -1):
        z, beta, next_beta = codes[k - 1], betas[k], betas[k + 1]
        kept = residuals[k - 1] if residuals else None
        point, scale = z, None
        if fista and beta and (needs.weight or (norm and kept is None)):
            point = problem.extrapolated(z, codes[k - 2], beta)
        if needs.weight or norm:
            residual = path.residual(x, point) if kept is None else kept
            scale = residual_scale(residual, coding.data_term)
            if needs.weight:
                d_weight.add(rescaled(residual, scale, in_place=False), m, gamma)
        if needs.lam:
            d_lam = accumulate(d_lam, lam_correlation(m, codes[k], problem))
        d_residual = path.residual_gradient(m, scale)
        if needs.weight:
            d_weight.add(d_residual, point, -1.0)
        if needs.x:
            d_target = d_residual if d_target is None else d_target + d_residual
        m, after = path.codes_gradient(d_residual, m, z, beta, after, next_beta)

    if needs.lam:
        d_lam = accumulate(d_lam, lam_correlation(m, codes[0], problem))
    if needs.x:
        d_target = path.residual_gradient(m, add=d_target)
        if coding.n_dict > 1:
            d_target = reduce(d_target, "n (d c) h w -> n c h w", "sum", d=coding.n_dict)
    if needs.weight:
        d_weight.add(dense(copies_of(x, coding.n_dict), layout), m, gamma)
    if d_lam is not None:
        d_lam = -gamma * d_lam
    d_x = None if d_target is None else without_padding(d_target, weight.shape[1])
    return Gradients(d_x, without_padding(d_weight.total(), weight.shape[1]) if needs.weight else None, d_lam)


class WeightGradient:
    """The sum of scale corr(r, m) over pairs (r, m) that come one after the other, rounded once."""

    def __init__(self, layer: Layer, choice: ChosenPath, problem: Problem) -> None:
        self.layer, self.choice, self.problem, self.weight = layer, choice, problem, layer.weight
        self.pairs: list[ScaledPair] = []
        self.partial: Tensor | None = None

    def add(self, residual: Tensor, codes: Tensor, scale: Tensor | float) -> None:
        """Add scale corr(residual, codes), at once or later."""
        if len(self.pairs) == MOST_PENDING:
            self.partial = accumulate(self.partial, self._correlation(self.weight.float()))
        self.pairs.append((residual, codes, scale))

    def total(self) -> Tensor:
        """Return the sum, in the dictionary's type."""
        if self.partial is None:
            return self._correlation(self.weight)
        return accumulate(self.partial, self._correlation(self.weight.float())).to(self.weight.dtype)

    def _correlation(self, weight: Tensor) -> Tensor:
        """Return the sum of the pending pairs in the type of `weight`."""
        pairs, self.pairs = self.pairs, []
        layer, tile = self.layer, self.choice.tiles.correlation
        if self.choice.correlation:
            return weight_correlation(pairs, weight, layer.stride, layer.padding, layer.precision, tile)
        total = None
        for residual, codes, scale in pairs:
            term = torch_path.weight_correlation(residual, codes, layer.weight, self.problem).float()
            total = accumulate(total, term * scale)
        return torch.zeros_like(weight) if total is None else total.to(weight.dtype)
