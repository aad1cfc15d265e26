"""Corruptions of images at test time: four noises with the severities of published benchmarks, and occluding squares.

| noise    | corrupted pixels                                        | strength         |
|----------|---------------------------------------------------------|------------------|
| gaussian | x + N(0, std²)                                          | std              |
| shot     | Poisson(c x) / c                                        | c, fewer is more |
| impulse  | a share of the values becomes 0 or 1, each half of them | the share        |
| speckle  | x + x N(0, std²)                                        | std              |

Pixels are in [0, 1], before normalisation, and the result is clipped to [0, 1]. The severities are those of the scripts
that made CIFAR-10-C and CIFAR-100-C (`make_cifar_c.py`) and ImageNet-C (`corruptions.py`) of Hendrycks and Dietterich
(2019), and the grids of the official robust inference of SDNet. ImageNet-C was stored as JPEG of quality 85 after the
noise, which is not done here; CIFAR-10-C was stored without loss.
"""

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from sdnet.kernels import checks

Noise = Literal["gaussian", "shot", "impulse", "speckle"]
Scale = Literal["cifar10-c", "imagenet-c", "official"]
Seed = torch.Generator | int | None
"""A generator on the device of the images, the seed of a new one, or None for torch's own."""

NOISES: tuple[Noise, ...] = get_args(Noise)
SCALES: tuple[Scale, ...] = get_args(Scale)

SEVERITIES: Mapping[Scale, Mapping[Noise, tuple[float, ...]]] = {
    "cifar10-c": {
        "gaussian": (0.04, 0.06, 0.08, 0.09, 0.10),
        "shot": (500, 250, 100, 75, 50),
        "impulse": (0.01, 0.02, 0.03, 0.05, 0.07),
        "speckle": (0.06, 0.10, 0.12, 0.16, 0.20),
    },
    "imagenet-c": {
        "gaussian": (0.08, 0.12, 0.18, 0.26, 0.38),
        "shot": (60, 25, 12, 5, 3),
        "impulse": (0.03, 0.06, 0.09, 0.17, 0.27),
        "speckle": (0.15, 0.20, 0.35, 0.45, 0.60),
    },
    "official": {
        "gaussian": tuple(round(0.02 * i, 2) for i in range(1, 11)),
        "shot": tuple(float(60 - 6 * i) for i in range(10)),
        "impulse": tuple(round(0.03 * i, 2) for i in range(1, 10)),
        "speckle": tuple(round(0.1 * i, 1) for i in range(1, 7)),
    },
}
"""The strength of every noise at severity 1, 2, ... of every scale.

The official script writes its grid of impulses as `np.arange(0.03, 0.3, 0.03)`, which has 0.3 as a tenth value by an
error of rounding; the grid here ends below 0.3, as the call says.
"""


def corrupt(
    images: Tensor,
    noise: Noise,
    severity: int,
    *,
    scale: Scale = "cifar10-c",
    generator: Seed = None,
    as_uint8: bool = False,
) -> Tensor:
    """Add noise of a published severity to images.

    Args:
        images: pixels in [0, 1], or uint8 in [0, 255].
        noise: "gaussian", "shot", "impulse" or "speckle".
        severity: 1 for the weakest; scales "cifar10-c" and "imagenet-c" have 5, "official" has 10, 10, 9 and 6.
        scale: whose severities, a key of `SEVERITIES`.
        generator: a `torch.Generator` on the device of the images, or a seed; the same seed gives the same images.
        as_uint8: return uint8, rounded down as in the published sets.

    Shape:
        - images: [N, C, H, W].
        - Output: [N, C, H, W].

    Returns:
        The corrupted pixels: uint8 for `as_uint8`, else in [0, 1] and in the type of `images`, fp32 for uint8.

    Raises:
        ValueError: an argument has a wrong type, shape or value.

    Example:
        >>> noisy = corrupt(torch.rand(8, 3, 32, 32), "gaussian", severity=3, generator=0)
    """
    strength = strength_of(noise, severity, scale)
    as_uint8 = checks.flag("as_uint8", as_uint8)
    corrupted = NOISE_FUNCTIONS[noise](_single(as_pixels(images)), strength, generator)
    return to_uint8(corrupted) if as_uint8 else _as(corrupted, images)


def strength_of(noise: Noise, severity: int, scale: Scale = "cifar10-c") -> float:
    """Return the strength of a noise at a severity of a scale.

    Args:
        noise: "gaussian", "shot", "impulse" or "speckle".
        severity: 1 for the weakest.
        scale: a key of `SEVERITIES`.

    Raises:
        ValueError: there is no such noise, severity or scale.
    """
    strengths = SEVERITIES[checks.choice("scale", scale, SCALES)][checks.choice("noise", noise, NOISES)]
    if checks.integer("severity", severity, 1) > len(strengths):
        raise ValueError(
            f"severity is {severity}; for {noise} noise of scale {scale} it must be at most {len(strengths)}."
        )
    return strengths[severity - 1]


def gaussian_noise(images: Tensor, std: float, generator: Seed = None) -> Tensor:
    """Add Gaussian noise of standard deviation `std`, and clip.

    Args:
        images: pixels in [0, 1], or uint8.
        std: the standard deviation, at least 0.
        generator: see `corrupt`.

    Returns:
        The corrupted pixels.
    """
    x, std = _single(as_pixels(images)), checks.number("std", std)
    return _as(x + std * _normal(x, generator), images)


def shot_noise(images: Tensor, photons: float, generator: Seed = None) -> Tensor:
    """Replace every value x by Poisson(photons x) / photons, and clip.

    Args:
        images: pixels in [0, 1], or uint8.
        photons: the mean count of a white pixel, above 0; the variance of the noise is x / photons.
        generator: see `corrupt`.

    Returns:
        The corrupted pixels.

    Raises:
        ValueError: `photons` is not above 0.
    """
    x = _single(as_pixels(images))
    if not checks.number("photons", photons):
        raise ValueError("photons is 0; it must be above 0.")
    counts = torch.poisson(x.clamp_min(0) * photons, generator=generator_for(generator, x.device))
    return _as(counts / photons, images)


def impulse_noise(images: Tensor, amount: float, generator: Seed = None) -> Tensor:
    """Set a share of the values to 0 or 1, with equal probability; channels are independent.

    Args:
        images: pixels in [0, 1], or uint8.
        amount: the share, in [0, 1].
        generator: see `corrupt`.

    Returns:
        The corrupted pixels.

    Raises:
        ValueError: `amount` is not in [0, 1].
    """
    x = _single(as_pixels(images))
    if checks.number("amount", amount) > 1:
        raise ValueError(f"amount is {amount}; it must be at most 1.")
    draw = torch.rand(x.shape, generator=generator_for(generator, x.device), device=x.device)
    return _as(x.masked_fill(draw < amount / 2, 1.0).masked_fill((draw >= amount / 2) & (draw < amount), 0.0), images)


def speckle_noise(images: Tensor, std: float, generator: Seed = None) -> Tensor:
    """Add to every value x Gaussian noise of standard deviation `std` x, and clip.

    Args:
        images: pixels in [0, 1], or uint8.
        std: the standard deviation at a white pixel, at least 0.
        generator: see `corrupt`.

    Returns:
        The corrupted pixels.
    """
    x, std = _single(as_pixels(images)), checks.number("std", std)
    return _as(x + std * x * _normal(x, generator), images)


NOISE_FUNCTIONS: Mapping[Noise, Callable[[Tensor, float, Seed], Tensor]] = {
    "gaussian": gaussian_noise,
    "shot": shot_noise,
    "impulse": impulse_noise,
    "speckle": speckle_noise,
}


def occlude(images: Tensor, side: int, *, value: float = 0.0, generator: Seed = None) -> Tensor:
    """Cover a square at a random place of every image.

    Args:
        images: pixels in [0, 1], or uint8.
        side: height and width of the square in pixels, at most those of the images; 0 covers nothing.
        value: the value of the covered pixels, in [0, 1].
        generator: see `corrupt`.

    Shape:
        - images: [N, C, H, W].
        - Output: [N, C, H, W].

    Returns:
        The images with squares, as pixels in [0, 1].

    Raises:
        ValueError: an argument has a wrong type, shape or value.
    """
    pixels = as_pixels(images)
    count, _, height, width = pixels.shape
    if checks.integer("side", side, 0) > min(height, width):
        raise ValueError(f"side is {side}; for images of {height} x {width} it must be at most {min(height, width)}.")
    if checks.number("value", value) > 1:
        raise ValueError(f"value is {value}; it must be at most 1.")
    draw = torch.rand(2, count, 1, 1, 1, generator=generator_for(generator, pixels.device), device=pixels.device)
    top, left = (draw[0] * (height - side + 1)).long(), (draw[1] * (width - side + 1)).long()
    rows = torch.arange(height, device=pixels.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=pixels.device)
    covered = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return pixels.masked_fill(covered, value)


def to_uint8(pixels: Tensor) -> Tensor:
    """Return pixels in [0, 1] as uint8: clipped, multiplied by 255 and rounded down, as in the published sets.

    Args:
        pixels: floating-point pixels of any shape.

    Raises:
        ValueError: `pixels` is no floating-point tensor.
    """
    if not isinstance(pixels, Tensor) or not pixels.is_floating_point():
        raise ValueError(f"pixels is {_type_of(pixels)}; it must be a floating-point tensor.")
    return (_single(pixels).clamp(0, 1) * 255).floor().to(torch.uint8)


def as_pixels(images: Tensor) -> Tensor:
    """Return images as floating-point pixels in [0, 1].

    Args:
        images: pixels in [0, 1], or uint8 in [0, 255], [N, C, H, W].

    Raises:
        ValueError: `images` is not such a tensor. The range of floating-point images is checked on a CPU only, because
            a check would make the host wait for another device.
    """
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise ValueError(f"images is {checks.shown(images)}; it must be a tensor [N, C, H, W].")
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ValueError(f"images is {images.dtype}; it must be uint8, or floating point in [0, 1].")
    if images.device.type == "cpu" and images.numel():
        least, most = float(images.detach().amin()), float(images.detach().amax())
        if not (least >= 0 and most <= 1):
            raise ValueError(
                f"images has values from {least:.4g} to {most:.4g}; they must be pixels in [0, 1], not normalised."
            )
    return images


def generator_for(seed: Seed, device: torch.device) -> torch.Generator | None:
    """Return the generator that `seed` stands for on a device.

    Raises:
        ValueError: `seed` is neither a generator nor an int of at least 0 nor None.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    return torch.Generator(device).manual_seed(checks.integer("generator", seed, 0))


def _normal(x: Tensor, generator: Seed) -> Tensor:
    return torch.randn(x.shape, generator=generator_for(generator, x.device), device=x.device, dtype=x.dtype)


def _type_of(value: object) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else checks.shown(value)


def _single(pixels: Tensor) -> Tensor:
    """Return pixels in fp32, or as they are in fp64."""
    return pixels if pixels.dtype == torch.float64 else pixels.float()


def _as(pixels: Tensor, images: Tensor) -> Tensor:
    """Return clipped pixels in the type of the images that they were made of."""
    return pixels.clamp(0, 1).to(images.dtype if images.is_floating_point() else pixels.dtype)
