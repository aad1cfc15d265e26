"""Fit the rules that choose lambda, on held-out training images; and the accuracy of a model over lambda."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sdnet.kernels import checks
from sdnet.robustness.corruptions import NOISES, Noise, Scale, Seed, as_pixels, corrupt, generator_for, strength_of
from sdnet.robustness.model import RobustModel, first_layer
from sdnet.robustness.rules import NoiseRule, ResidualRule, line_through, residual_of

Group = tuple[Tensor, Tensor]
"""Images of one corruption and severity, normalised as the model takes them, and their labels."""

FACTORS = tuple(round(0.25 * i, 2) for i in range(17))
"""The factors k that `calibrate_noise_rule` tries: 0 to 4."""

DEFAULT_BATCH = 200


class PixelModel(nn.Module):
    """Normalise pixels, then apply a model: for attacks, whose bounds are in pixels.

    Args:
        model: a model of normalised images.
        mean: the mean of every channel that is subtracted from pixels in [0, 1].
        std: the deviation of every channel that they are divided by, above 0.

    Shape:
        - Input: [N, C, H, W], pixels in [0, 1], or uint8.
        - Output: that of `model`.

    Raises:
        ValueError: `mean` and `std` do not have one number per channel, or a deviation is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        means, stds = finite_numbers(mean), finite_numbers(std)
        if not means or not stds or len(means) != len(stds) or min(stds) <= 0:
            raise ValueError(
                f"mean is {checks.shown(mean)} and std {checks.shown(std)}; they must be sequences of one number per "
                "channel, and std above 0."
            )
        self.model = model
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return (pixels - mean) / std.

        Args:
            pixels: pixels in [0, 1], or uint8, [N, C, H, W].

        Raises:
            ValueError: `pixels` is no tensor [N, C, H, W] of these types with as many channels as `mean`.
        """
        if isinstance(pixels, Proxy):  # torch.fx traces
            return (pixels - self.mean) / self.std
        channels = len(self.mean)
        if not isinstance(pixels, Tensor) or pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ValueError(f"pixels is {checks.shown(pixels)}; it must be a tensor [N, {channels}, H, W].")
        if pixels.dtype == torch.uint8:
            pixels = pixels.to(self.mean.dtype) / 255
        if not pixels.is_floating_point():
            raise ValueError(f"pixels is {pixels.dtype}; it must be uint8, or floating point in [0, 1].")
        return (pixels - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Return what the model gives for the normalised pixels."""
        return self.model(self.normalise(pixels))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch: int = DEFAULT_BATCH) -> float:
    """Return the accuracy of a model, in percent.

    Args:
        model: a model of `images`, in the mode in which it is to be used.
        images: the images, [N, ...].
        labels: the classes, [N] integers.
        batch: images of one forward.

    Raises:
        ValueError: there are no images, not as many labels as images, or labels that are no classes of the model.
    """
    labels = check_labels(images, labels)
    right = torch.zeros((), dtype=torch.long, device=images.device)
    for begin in range(0, len(images), checks.integer("batch", batch, 1)):
        logits = model(images[begin : begin + batch])
        if not begin:
            check_classes(labels, logits)
        right += is_right(logits, labels[begin : begin + batch]).sum()
    return 100 * float(right) / len(images)


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which labels have the largest logit, [N] bool; none where a logit is NaN."""
    return (logits.argmax(1) == labels) & ~logits.isnan().any(1)


def finite_numbers(values: Any) -> list[float] | None:
    """Return a sequence, array or tensor of finite numbers as floats, None if `values` is something else."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        return None
    return [float(value) for value in values] if all(map(checks.is_finite, values)) else None


def check_labels(images: Tensor, labels: Tensor) -> Tensor:
    """Return labels as int64.

    Raises:
        ValueError: there are no images, or not one integer label for each.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        raise ValueError(f"images is {checks.shown(images)}; it must be a tensor [N, C, H, W] with images.")
    if not isinstance(labels, Tensor) or labels.shape != images.shape[:1]:
        raise ValueError(f"labels is {checks.shown(labels)}; it must hold {len(images)} integers, one per image.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels is {labels.dtype}; it must hold {len(images)} integers, one per image.")
    return labels.long()


def check_classes(labels: Tensor, logits: Tensor) -> None:
    """Raise a ValueError if a label is no class of a model that computes these logits."""
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= logits.shape[1]:
        raise ValueError(
            f"labels holds {least if least < 0 else most}; the model has classes 0 to {logits.shape[1] - 1}."
        )


def accuracy_over_lambda(
    model: nn.Module, images: Tensor, labels: Tensor, lambdas: Sequence[float], *, batch: int = DEFAULT_BATCH
) -> list[float]:
    """Return the accuracy of an SDNet, in percent, for every lambda of its first layer.

    Args:
        model: an `SDNet`.
        images: the images, normalised, [N, 3, H, W].
        labels: the classes, [N] integers.
        lambdas: values of at least 0.
        batch: images of one forward.

    Raises:
        ValueError: an argument has a wrong type, shape or value.
    """
    robust = [RobustModel(model, lam) for lam in grid_of(lambdas)]
    return [accuracy(each, images, labels, batch=batch) for each in robust]


def grid_of(lambdas: Any) -> list[float]:
    """Return values of lambda as floats.

    Raises:
        ValueError: `lambdas` is no sequence of numbers of at least 0, or is empty.
    """
    if not (values := checks.numbers("lambdas", lambdas)):
        raise ValueError("lambdas is empty; it must hold one value at least.")
    return values


@torch.no_grad()
def mean_residual(model: nn.Module, images: Tensor, *, batch: int = DEFAULT_BATCH) -> float:
    """Return the mean residual |x - A z|² / n_dict of the first layer with the training lambda.

    Args:
        model: an `SDNet`.
        images: the images, normalised, [N, 3, H, W].
        batch: images of one forward.
    """
    layer = first_layer(model)
    parts = [residual_of(layer, images[begin : begin + batch]) for begin in range(0, len(images), batch)]
    return float(torch.cat(parts).double().mean())


def fit_residual_rule(
    model: nn.Module, groups: Iterable[Group], lambdas: Sequence[float], *, batch: int = DEFAULT_BATCH
) -> ResidualRule:
    """Fit the line of the paper: the best lambda over the residual.

    For every group of held-out training images, each with a corruption and a severity of its own, the lambda with the
    highest accuracy is found on a grid (the smallest one of equals). The line is the least-squares line of these
    lambdas over the mean residuals of the groups.

    Args:
        model: an `SDNet` in evaluation mode.
        groups: (images, labels) of every group: images [N, 3, H, W], normalised, labels [N]; two groups at least.
        lambdas: the grid.
        batch: images of one forward.

    Returns:
        The rule, whose largest lambda is the largest of the grid.

    Raises:
        ValueError: an argument has a wrong type, shape or value, or all groups have the same residual.
    """
    points: list[tuple[float, float]] = []
    lambdas = grid_of(lambdas)
    if not isinstance(groups, Iterable):
        raise ValueError(f"groups is {checks.shown(groups)}; it must hold pairs of images and labels.")
    for group in groups:
        if not isinstance(group, Sequence) or len(group) != 2:
            raise ValueError(f"groups holds {checks.shown(group)}; it must hold pairs of images and labels.")
        images, labels = group
        scores = accuracy_over_lambda(model, images, labels, lambdas, batch=batch)
        points.append((mean_residual(model, images, batch=batch), best_of(lambdas, scores)))
    if len(points) < 2:
        raise ValueError(f"groups holds {len(points)} groups; a line needs two at least.")
    slope, intercept = line_through([residual for residual, _ in points], [lam for _, lam in points])
    return ResidualRule(slope, intercept, most=max(lambdas))


def best_of(values: Sequence[float], scores: Sequence[float]) -> float:
    """Return the value with the highest score, the smallest one of equals."""
    return min(zip(values, scores, strict=True), key=lambda pair: (-pair[1], pair[0]))[0]


def noisy_copies(
    images: Tensor,
    severities: Sequence[int] = (1, 3, 5),
    noises: Sequence[Noise] = NOISES,
    *,
    scale: Scale = "cifar10-c",
    generator: Seed = 0,
) -> dict[tuple[Noise, int], Tensor]:
    """Return copies of images with every noise at every severity, in fp32 as read back from published uint8 files.

    Args:
        images: pixels in [0, 1] or uint8, [N, C, H, W].
        severities: the severities.
        noises: the noises.
        scale: whose severities.
        generator: see `corrupt`; one generator makes all copies, in the order of the noises.
    """
    pixels = as_pixels(images)
    severities, noises = checks.sequence("severities", severities), checks.sequence("noises", noises, "names")
    for noise in noises:
        for severity in severities:
            strength_of(noise, severity, scale)
    generator = generator_for(generator, pixels.device)
    return {
        (noise, severity): as_pixels(corrupt(pixels, noise, severity, scale=scale, generator=generator, as_uint8=True))
        for noise in noises
        for severity in severities
    }


def calibrate_noise_rule(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    factors: Sequence[float] = FACTORS,
    severities: Sequence[int] = (1, 3, 5),
    scale: Scale = "cifar10-c",
    most_lost: float = 0.3,
    batch: int = DEFAULT_BATCH,
    generator: Seed = 0,
) -> NoiseRule:
    """Choose the factor k of a `NoiseRule` on clean held-out training images with synthetic Gaussian noise.

    Of the factors that lose at most `most_lost` points on the clean images, compared with the training lambda, it is
    the one with the highest mean accuracy over the clean images and the noisy copies; the smallest one of equals.

    Args:
        model: an `SDNet` in evaluation mode.
        images: clean pixels in [0, 1] or uint8, [N, 3, H, W], that the model was not trained on.
        labels: the classes, [N] integers.
        mean: the mean of every channel, see `PixelModel`.
        std: the deviation of every channel, see `PixelModel`.
        factors: the values of k that are tried; 0, the training lambda, always is.
        severities: the severities of the Gaussian noise.
        scale: whose severities.
        most_lost: the percentage points that clean images may lose, at least 0.
        batch: images of one forward.
        generator: see `corrupt`.

    Returns:
        The rule.

    Raises:
        ValueError: an argument has a wrong type, shape or value.
    """
    check_labels(images, labels)
    tried, most_lost = {0.0, *checks.numbers("factors", factors)}, checks.number("most_lost", most_lost)
    clean = as_pixels(images)
    pixels = [clean, *noisy_copies(clean, severities, ["gaussian"], scale=scale, generator=generator).values()]
    scores: dict[float, list[float]] = {}
    for k in sorted(tried):
        robust = PixelModel(RobustModel(model, NoiseRule(k)), mean, std).to(clean.device)
        scores[k] = [accuracy(robust, copy, labels, batch=batch) for copy in pixels]
    allowed = {k: sum(row) for k, row in scores.items() if row[0] >= scores[0.0][0] - most_lost}
    return NoiseRule(best_of(list(allowed), list(allowed.values())))
