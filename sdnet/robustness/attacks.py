"""Projected gradient descent (PGD) in pixels, within a bound of L-infinity or L2 norm."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdnet.kernels import checks
from sdnet.robustness.corruptions import Seed, generator_for
from sdnet.robustness.fitting import check_classes, check_labels, finite_numbers, is_right

Norm = Literal["linf", "l2"]


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    *,
    norm: Norm = "linf",
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    generator: Seed = None,
) -> Tensor:
    """Search for images within a distance that a model classifies wrongly, by ascent of the cross-entropy.

        x_{t+1} = P(x_t + step_size · d),   d = sign(g) for L-infinity, g / |g|₂ for L2,

    with g the gradient of the cross-entropy and P the projection onto the ball around the image and onto `bounds`
    (Madry et al., 2018). Of all points of all restarts, the returned one is misclassified if any was; of these, and
    otherwise of all points, it has the highest cross-entropy.

    Args:
        model: a model of pixels that returns logits, in evaluation mode, see `PixelModel`. Gradients flow through the
            rule of a `RobustModel`, and through its noise estimate.
        images: the images, floating point, within `bounds`.
        labels: the classes.
        eps: the largest distance in pixels, at least 0.
        norm: "linf" for the largest difference of a pixel, "l2" for the Euclidean norm of the difference.
        steps: the number of gradient steps of a restart, at least 1.
        step_size: the length of a step; None is 2.5 eps / steps.
        restarts: how often the search starts again, at least 1.
        random_start: whether it starts at a random point of the ball, or at the image.
        bounds: the least and the largest value of a pixel.
        generator: a generator on the device of the images, or a seed.

    Shape:
        - images: [N, C, H, W].
        - labels: [N].
        - Output: [N, C, H, W].

    Returns:
        The images found. The parameters of the model get no gradients.

    Raises:
        ValueError: an argument has a wrong type, shape or value.

    Example:
        >>> pixels_to_logits = PixelModel(model, mean, std).eval()
        >>> adversarial = pgd(pixels_to_logits, images, labels, eps=1 / 255)
    """
    labels = check_labels(images, labels)
    if not images.is_floating_point():
        raise ValueError(f"images is {images.dtype}; it must be floating point.")
    low, high = check_bounds(bounds)
    eps, steps = checks.number("eps", eps), checks.integer("steps", steps, 1)
    restarts, norm = checks.integer("restarts", restarts, 1), checks.choice("norm", norm, get_args(Norm))
    length = 2.5 * eps / steps if step_size is None else checks.number("step_size", step_size)
    if not bool(((images >= low) & (images <= high)).all()):
        raise ValueError(f"images has values outside bounds, {list(bounds)}.")
    random_start = checks.flag("random_start", random_start)
    generator = generator_for(generator, images.device)

    def project(point: Tensor) -> Tensor:
        return (images + within(point - images, eps, norm)).clamp(low, high)

    with torch.inference_mode(False), torch.no_grad():
        images, labels = images.detach().clone(), labels.clone()  # no tensors of inference mode, which have no gradient
        found, logits = images, model(images)
        check_classes(labels, logits)
        wrong, highest = _judged(logits, labels)
        for _ in range(restarts):
            point = project(images + random_offset(images, eps, norm, generator)) if random_start else images
            for step in range(steps + 1):
                point = point.detach().requires_grad_()
                with torch.enable_grad():
                    logits = model(point)
                    total = F.cross_entropy(logits, labels, reduction="sum")
                now_wrong, loss = _judged(logits, labels)
                better = (now_wrong & ~wrong) | ((now_wrong == wrong) & (loss > highest))
                found = torch.where(better.view(-1, 1, 1, 1), point, found)
                wrong, highest = torch.where(better, now_wrong, wrong), torch.where(better, loss, highest)
                if step < steps:
                    (gradient,) = torch.autograd.grad(total, point)
                    point = project(point + length * direction(gradient, norm))
    return found.detach()


def check_bounds(bounds: Any) -> tuple[float, float]:
    """Return the least and the largest value of a pixel.

    Raises:
        ValueError: `bounds` is no pair of finite numbers, the first one below the second.
    """
    values = finite_numbers(bounds)
    if values is None or len(values) != 2 or values[0] >= values[1]:
        raise ValueError(f"bounds is {checks.shown(bounds)}; it must be two numbers, the first below the second.")
    return values[0], values[1]


def _judged(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return which images are misclassified, and the cross-entropy of each."""
    logits = logits.detach()
    return ~is_right(logits, labels), F.cross_entropy(logits, labels, reduction="none")


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Return the direction of steepest ascent: of entries of 1, or of Euclidean norm 1; zero for a zero gradient."""
    if norm == "linf":
        return gradient.sign()
    # Divided by its largest entry first, because the squares of small numbers underflow.
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    scaled = gradient / torch.where(largest > 0, largest, 1.0)
    return scaled / scaled.flatten(1).norm(dim=1).clamp_min(1).view(-1, 1, 1, 1)


def within(offset: Tensor, eps: float, norm: Norm) -> Tensor:
    """Return the nearest point to `offset` in the ball of radius eps."""
    if norm == "linf":
        return offset.clamp(-eps, eps)
    lengths = offset.flatten(1).norm(dim=1).clamp_min(torch.finfo(offset.dtype).tiny).view(-1, 1, 1, 1)
    return offset * (eps / lengths).clamp(max=1.0)


def random_offset(images: Tensor, eps: float, norm: Norm, generator: torch.Generator | None) -> Tensor:
    """Return a random point in the ball of radius eps: uniform for L-infinity, of uniform length for L2."""
    options = {"generator": generator, "device": images.device, "dtype": images.dtype}
    if norm == "linf":
        return eps * (2 * torch.rand(images.shape, **options) - 1)
    lengths = torch.rand(len(images), 1, 1, 1, **options)
    return eps * lengths * direction(torch.randn(images.shape, **options), norm)
