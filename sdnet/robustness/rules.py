"""Rules that choose lambda of the first CSC layer at test time, without labels of the test images.

| rule            | per    | uses at test time                        | fitted on                               |
|-----------------|--------|------------------------------------------|-----------------------------------------|
| `ResidualRule`  | sample | the residual at the training lambda      | corrupted held-out training images      |
| `NoiseRule`     | sample | an estimate of the noise in the image    | clean held-out images, synthetic noise  |
| `UnlabelledRule`| batch  | residuals of an unlabelled batch         | nothing                                 |

A rule is a function (first layer, its input) -> lambda. `sdnet.robustness.RobustModel` applies it.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import reduce, repeat
from torch import Tensor, nn

from sdnet.kernels import checks
from sdnet.kernels.autocast import without_autocast
from sdnet.layers import CSCConv2d, at_least_single
from sdnet.robustness.noise import estimate_noise


class Rule(nn.Module):
    """Choose lambda of the first CSC layer from the input of that layer. Subclasses write `forward`."""

    per_sample = True
    """Whether lambda of an image depends on this image alone, not on the others of the batch."""

    @abstractmethod
    def forward(self, layer: CSCConv2d, x: Tensor) -> Tensor:
        """Return lambda for a batch.

        Args:
            layer: the first CSC layer, whose `lam` is the training lambda.
            x: the input of the layer.

        Shape:
            - x: [N, C, H, W].
            - Output: [N], or 0-d for a rule that is not per sample; [N, K, 1, 1] for a per-sample rule if the training
              lambda has a value per atom.
        """


class NoiseRule(Rule):
    """Choose lambda by an estimate of the noise in every image: lambda = max(training lambda, k sigma).

    sigma is `estimate_noise` of the input of the layer, which is normalised: noise of standard deviation s in pixels
    is s / std there. An atom has unit norm, so white noise of standard deviation sigma has the same standard deviation
    in the product with an atom, and lambda = k sigma removes what noise alone gives up to k standard deviations. The
    rule needs neither labels nor corrupted images, and treats every image by itself.

    Args:
        k: the factor, at least 0. `sdnet.robustness.calibrate_noise_rule` chooses it.

    Raises:
        ValueError: `k` is negative or no number.

    Example:
        >>> robust = RobustModel(model, NoiseRule(k=1.5))
    """

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = checks.number("k", k)

    def forward(self, layer: CSCConv2d, x: Tensor) -> Tensor:
        """Return max(training lambda, k sigma) for every image, see `Rule.forward`; gradients flow to x."""
        return at_least_training(self.k * estimate_noise(x), layer)

    def extra_repr(self) -> str:
        """Return the factor, for `repr`."""
        return f"k={self.k:.4g}"


class ResidualRule(Rule):
    """Choose lambda by a line over the residual of every image: lambda = slope · r + intercept.

    r = |x - A z|² / n_dict is the residual of the image with the training lambda. This is the rule of the paper; the
    official code fits the line and does not apply it. Lambda is kept between the training lambda and `most`.

    Args:
        slope: the slope of the line.
        intercept: lambda of a residual of 0.
        most: the largest lambda, at least 0; `fit_residual_rule` takes the largest one that it tried.

    Raises:
        ValueError: a number is not finite, or `most` is negative.

    Example:
        >>> rule = fit_residual_rule(model, batches, lambdas=[0.1, 0.2, 0.4, 0.8])
        >>> robust = RobustModel(model, rule)
    """

    def __init__(self, slope: float, intercept: float, most: float) -> None:
        super().__init__()
        for name, value in (("slope", slope), ("intercept", intercept)):
            if not checks.is_finite(value):
                raise ValueError(f"{name} is {checks.shown(value)}; it must be a finite number.")
        self.slope, self.intercept = float(slope), float(intercept)
        self.most = checks.number("most", most)

    def forward(self, layer: CSCConv2d, x: Tensor) -> Tensor:
        """Return lambda of every image, see `Rule.forward`; differentiable with respect to x."""
        line = self.slope * residual_of(layer, x) + self.intercept
        return at_least_training(line.clamp(max=self.most), layer)

    def extra_repr(self) -> str:
        """Return the line, for `repr`."""
        return f"slope={self.slope:.4g}, intercept={self.intercept:.4g}, most={self.most:.4g}"


class UnlabelledRule(Rule):
    """Choose one lambda for an unlabelled batch by the loss of ACSC.

    ACSC is adaptive convolutional sparse coding (Qin, Liu, Cui and Xing, 2026). The rule decreases

        loss(lambda) = mean over images of R / (lambda + epsilon),   R = |x - A z|² / |x|²,

    with lambda = softplus(u), by `steps` steps of gradient descent on u with Adam, from the training lambda. R is the
    squared residual over that of codes of zero. R grows with lambda and is at most about 1, so the loss has no
    minimum and decreases to zero as lambda grows: the number of steps and the learning rate bound lambda. ACSC
    sums over all layers, takes about 100 images, and may re-estimate batch-norm statistics too; here only the first
    layer is adapted, and batch norm is a switch of `RobustModel`. Lambda of an image depends on others of its batch.

    No gradient flows through this rule.

    Args:
        steps: the number of steps, at least 1.
        lr: the learning rate of Adam for u, at least 0.
        epsilon: the constant in the denominator, above 0.
        images: the loss is the mean over the first so many images of a batch, at least 1.

    Raises:
        ValueError: an argument is out of range.
    """

    per_sample = False

    def __init__(self, steps: int = 20, lr: float = 0.1, epsilon: float = 1e-3, images: int = 100) -> None:
        super().__init__()
        self.images = checks.integer("images", images, 1)
        self.steps, self.lr = checks.integer("steps", steps, 1), checks.number("lr", lr)
        self.epsilon = checks.number("epsilon", epsilon)
        if not epsilon:
            raise ValueError("epsilon is 0; it must be above 0.")

    def forward(self, layer: CSCConv2d, x: Tensor) -> Tensor:
        """Return lambda of the batch, 0-d."""
        adapt: Callable[[CSCConv2d, Tensor], Tensor] = torch.compiler.disable(self._adapt)  # pyright: ignore[reportAssignmentType]
        return adapt(layer, x)

    def _adapt(self, layer: CSCConv2d, x: Tensor) -> Tensor:
        """Minimise the loss of a batch by gradient descent."""
        with torch.inference_mode(False), torch.enable_grad(), without_autocast(x.device):
            x = x[: self.images].detach().to(layer.weight.dtype, copy=True)
            start = layer.lam.detach().mean().clamp_min(1e-6)
            u = (start + torch.log(-torch.expm1(-start))).requires_grad_()  # softplus(u) is the training lambda
            optimizer = torch.optim.Adam([u], lr=self.lr)
            for _ in range(self.steps):
                loss = self.loss(layer, x, F.softplus(u))
                (u.grad,) = torch.autograd.grad(loss, u)
                optimizer.step()
            return F.softplus(u).detach()

    def loss(self, layer: CSCConv2d, x: Tensor, lam: Tensor) -> Tensor:
        """Return the loss of a batch at one lambda, 0-d."""
        energy = layer.coding.n_dict * reduce(at_least_single(x).square(), "n c h w -> n", "sum")
        relative = layer.coding.n_dict * residual_of(layer, x, lam) / energy.clamp_min(1e-12)
        return (relative / (lam + self.epsilon)).mean()

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"steps={self.steps}, lr={self.lr:.4g}, epsilon={self.epsilon:.4g}, images={self.images}"


def at_least_training(lam: Tensor, layer: CSCConv2d) -> Tensor:
    """Return the larger of lambda of every image, [N], and the training lambda of a layer: [N], or [N, K, 1, 1].

    Raises:
        ValueError: the training lambda is one of as many other images.
    """
    training = layer.lam
    if training.ndim and training.shape[0] not in (1, len(lam)):
        raise ValueError(
            f"lam of the first layer has shape {list(training.shape)}; for {len(lam)} images it must be 0-d, hold "
            f"{len(lam)} values or be [1, {layer.out_channels}, 1, 1]."
        )
    larger = torch.maximum(lam.view(-1, 1, 1, 1), training.to(lam.dtype))
    return larger.flatten() if larger.shape[1] == 1 else larger


def residual_of(layer: CSCConv2d, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
    """Compute the residual |x - A z|² / n_dict of every image, with z the codes of the layer.

    Args:
        layer: a CSC layer.
        x: its input.
        lam: lambda; None is the layer's own.

    Shape:
        - x: [N, C, H, W].
        - Output: [N].

    Returns:
        The residuals, in fp32 or better; differentiable with respect to x and lam.

    Raises:
        ValueError: `layer` is no CSC layer, or x or lam has a wrong shape or value.
    """
    if not isinstance(layer, CSCConv2d):
        raise ValueError(f"layer is of type {type(layer).__name__}; it must be a CSC layer.")
    codes = layer(x, lam)
    with without_autocast(x.device):
        x, codes = at_least_single(x), at_least_single(codes)
        target = repeat(x, "n c h w -> n (d c) h w", d=layer.coding.n_dict)
        error = target - layer.reconstruct(codes, (x.shape[2], x.shape[3]))
        return reduce(error.square(), "n c h w -> n", "sum") / layer.coding.n_dict


def line_through(residuals: Sequence[float], lambdas: Sequence[float]) -> tuple[float, float]:
    """Return slope and intercept of the least-squares line of lambda over the residual.

    Args:
        residuals: the residuals, two different ones at least.
        lambdas: lambda of each residual.

    Raises:
        ValueError: the lengths differ, there are fewer than two different residuals, or a number is not finite.
    """
    if len(residuals) != len(lambdas):
        raise ValueError(f"residuals has {len(residuals)} values and lambdas {len(lambdas)}; they must be as many.")
    r, lam = torch.tensor(residuals, dtype=torch.float64), torch.tensor(lambdas, dtype=torch.float64)
    if not bool(r.isfinite().all() and lam.isfinite().all()):
        raise ValueError("residuals and lambdas must be finite.")
    if len(set(residuals)) < 2:
        raise ValueError(f"residuals has {len(set(residuals))} different values; a line needs two at least.")
    centred = r - r.mean()
    slope = (centred * (lam - lam.mean())).sum() / centred.square().sum()
    return float(slope), float(lam.mean() - slope * r.mean())
