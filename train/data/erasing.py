"""Random erasing: a rectangle of an image becomes the mean colour."""

import math

import numpy as np
import torch
from torch import Tensor

AREA = (0.02, 1 / 3)
"""Least and largest share of the image that a rectangle covers."""
ASPECT = (0.3, 3.3)
"""Least and largest ratio of height to width; the logarithm is uniform."""


def boxes(count: int, share: float, size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return the rectangle of each image.

    Args:
        count: The number of images.
        share: The probability that an image has one.
        size: Height and width of the images.
        generator: The source of randomness.

    Returns:
        Top, bottom, left and right of each rectangle, [4, count] int64; an image without one has an empty rectangle.
    """
    height, width = size
    area = generator.uniform(*AREA, count) * height * width
    aspect = np.exp(generator.uniform(math.log(ASPECT[0]), math.log(ASPECT[1]), count))
    tall = np.clip(np.round(np.sqrt(area * aspect)), 1, height).astype(np.int64)
    wide = np.clip(np.round(np.sqrt(area / aspect)), 1, width).astype(np.int64)
    top = generator.integers(0, height - tall + 1)
    left = generator.integers(0, width - wide + 1)
    tall[generator.random(count) >= share] = 0
    return np.stack([top, top + tall, left, left + wide])


def erase(images: Tensor, share: float, generator: np.random.Generator) -> Tensor:
    """Set a random rectangle of some of the images to 0, which is the mean colour of normalised images.

    Args:
        images: The normalised images.
        share: The probability that an image loses a rectangle.
        generator: The source of randomness.

    Shape:
        - images: [B, 3, H, W]
        - output: [B, 3, H, W]
    """
    height, width = images.shape[-2:]
    chosen = torch.from_numpy(boxes(len(images), share, (height, width), generator)).to(images.device)
    top, bottom, left, right = chosen[:, :, None]
    rows, columns = (torch.arange(n, device=images.device) for n in (height, width))
    inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return images.masked_fill(inside_rows[:, None, :, None] & inside_columns[:, None, None, :], 0.0)
