"""Corruptions have the moments of their definitions and the severities of the published scripts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.robustness import NOISES, SEVERITIES, corrupt, occlude, to_uint8
from sdnet.robustness.corruptions import NOISE_FUNCTIONS, Noise

PIXELS = 200_000


def grey(level: float, count: int = PIXELS) -> Tensor:
    return torch.full((1, 1, 1, count), level, dtype=torch.float64)


# In the middle of the range nothing is clipped: mean and variance are those of the definitions.
MOMENTS: dict[Noise, tuple[float, Callable[[float], tuple[float, float]]]] = {
    "gaussian": (0.05, lambda x: (x, 0.05**2)),
    "shot": (100.0, lambda x: (x, x / 100)),
    "impulse": (0.2, lambda x: (0.8 * x + 0.1, 0.8 * x**2 + 0.1 - (0.8 * x + 0.1) ** 2)),
    "speckle": (0.1, lambda x: (x, (0.1 * x) ** 2)),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("level", [0.4, 0.6])
def test_mean_and_variance_are_those_of_the_definition(noise: Noise, level: float) -> None:
    strength, moments = MOMENTS[noise]
    mean, variance = moments(level)
    noisy = NOISE_FUNCTIONS[noise](grey(level), strength, 0)
    assert float(noisy.mean()) == pytest.approx(mean, abs=5 * (variance / PIXELS) ** 0.5)
    assert float(noisy.var()) == pytest.approx(variance, rel=0.03)


@pytest.mark.parametrize("noise", NOISES)
def test_a_seed_gives_the_same_images_again_and_pixels_stay_in_range(noise: Noise) -> None:
    images = torch.rand(2, 3, 16, 16)
    first, second, other = (corrupt(images, noise, 5, scale="imagenet-c", generator=seed) for seed in (1, 1, 2))
    assert first.equal(second)
    assert not first.equal(other)
    channels_last = images.to(memory_format=torch.channels_last)
    assert first.equal(corrupt(channels_last, noise, 5, scale="imagenet-c", generator=1))
    assert float(first.min()) >= 0
    assert float(first.max()) <= 1
    assert first.dtype == images.dtype


def test_impulses_are_black_and_white_alike_and_independent_between_channels() -> None:
    noisy = NOISE_FUNCTIONS["impulse"](torch.full((1, 3, 300, 300), 0.5), 0.2, 0)
    white, black = (noisy == 1).double().mean(), (noisy == 0).double().mean()
    assert float(white) == pytest.approx(0.1, abs=0.005)
    assert float(black) == pytest.approx(0.1, abs=0.005)
    hit = noisy[0] != 0.5
    assert float((hit[0] & hit[1]).double().mean()) == pytest.approx(0.04, abs=0.005)


def test_uint8_is_rounded_down_as_in_the_published_sets() -> None:
    assert to_uint8(torch.tensor([0.0, 0.9999 / 255, 1.5 / 255, 254.99 / 255, 1.0, 1.2, -0.1])).tolist() == [
        0,
        0,
        1,
        254,
        255,
        255,
        0,
    ]
    images = torch.rand(1, 3, 8, 8)
    noisy = corrupt(images, "gaussian", 2, generator=3)
    assert corrupt(images, "gaussian", 2, generator=3, as_uint8=True).equal((noisy * 255).floor().to(torch.uint8))


def test_values_that_no_impulse_hits_come_back_from_uint8_unchanged() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 3, 64, 64)
    noisy = corrupt(images, "impulse", 5, generator=0, as_uint8=True)
    hit = noisy != images
    assert set(noisy[hit].tolist()) == {0, 255}
    assert float(hit.double().mean()) == pytest.approx(0.07, abs=0.015)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_uint8_is_rounded_down_from_the_noise_and_not_from_half_precision(dtype: torch.dtype) -> None:
    images = torch.rand(1, 3, 32, 32).to(dtype)
    expected = corrupt(images.float(), "gaussian", 3, generator=1, as_uint8=True)
    assert corrupt(images, "gaussian", 3, generator=1, as_uint8=True).equal(expected)
    assert corrupt(images, "gaussian", 3, generator=1).dtype == dtype
    assert to_uint8(torch.tensor([0.5], dtype=dtype)).tolist() == [127]


def test_uint8_images_are_read_as_pixels() -> None:
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert corrupt(images, "shot", 1, generator=0).equal(corrupt(images.float() / 255, "shot", 1, generator=0))


def test_severities_are_the_published_ones() -> None:
    assert SEVERITIES["cifar10-c"]["gaussian"] == (0.04, 0.06, 0.08, 0.09, 0.10)
    assert SEVERITIES["cifar10-c"]["shot"] == (500, 250, 100, 75, 50)
    assert SEVERITIES["cifar10-c"]["impulse"] == (0.01, 0.02, 0.03, 0.05, 0.07)
    assert SEVERITIES["cifar10-c"]["speckle"] == (0.06, 0.10, 0.12, 0.16, 0.20)
    assert SEVERITIES["imagenet-c"]["gaussian"] == (0.08, 0.12, 0.18, 0.26, 0.38)
    assert SEVERITIES["imagenet-c"]["shot"] == (60, 25, 12, 5, 3)
    assert SEVERITIES["imagenet-c"]["impulse"] == (0.03, 0.06, 0.09, 0.17, 0.27)
    assert SEVERITIES["imagenet-c"]["speckle"] == (0.15, 0.20, 0.35, 0.45, 0.60)


def test_official_grids() -> None:
    grids = SEVERITIES["official"]
    assert grids["gaussian"] == (0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2)
    assert grids["shot"] == (60, 54, 48, 42, 36, 30, 24, 18, 12, 6)
    assert grids["speckle"] == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    assert grids["impulse"] == (0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27)


def test_a_square_of_the_given_side_covers_every_image_somewhere_else() -> None:
    covered = occlude(torch.ones(50, 3, 12, 10), 4, generator=0) == 0
    assert covered.flatten(2).sum(2).tolist() == [[16] * 3] * 50
    rows, columns = covered[:, 0].any(2), covered[:, 0].any(1)
    assert (rows.sum(1) == 4).all()
    assert (columns.sum(1) == 4).all()
    assert len({tuple(r.tolist()) for r in rows}) == 9
    assert len({tuple(c.tolist()) for c in columns}) == 7


def test_no_square_and_a_square_of_another_value() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert occlude(images, 0, generator=0).equal(images)
    assert (occlude(images, 8, value=0.5) == 0.5).all()


IMAGES = torch.rand(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: corrupt(IMAGES, "rain", 1), "noise is 'rain'; it must be one of gaussian, shot, impulse, speckle"),  # type: ignore[arg-type]
        (lambda: corrupt(IMAGES, "shot", 6), "severity is 6; for shot noise of scale cifar10-c it must be at most 5"),
        (lambda: corrupt(IMAGES, "shot", 0), "severity is 0; it must be an int of at least 1"),
        (lambda: corrupt(IMAGES, "shot", 1, scale="mine"), "scale is 'mine'; it must be one of"),  # type: ignore[arg-type]
        (lambda: corrupt(IMAGES[0], "shot", 1), r"images is of type Tensor and shape \[3, 4, 4\]; it must be a tensor"),
        (lambda: corrupt(2 * IMAGES + 1, "shot", 1), r"must be pixels in \[0, 1\], not normalised"),
        (lambda: corrupt(IMAGES.long(), "shot", 1), "images is torch.int64; it must be uint8, or floating point"),
        (lambda: occlude(IMAGES, 5), "side is 5; for images of 4 x 4 it must be at most 4"),
        (lambda: to_uint8(IMAGES.byte()), "pixels is torch.uint8; it must be a floating-point tensor"),
        (lambda: corrupt(IMAGES, "shot", 1, as_uint8="yes"), "as_uint8 is 'yes'; it must be True or False"),  # type: ignore[arg-type]
        (lambda: corrupt(IMAGES, "shot", 1, generator=-1), "generator is -1; it must be an int of at least 0"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
