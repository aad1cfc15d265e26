"""Mixup and CutMix: two images of a batch become one, with a target to match."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.train.recipes import Recipe


@dataclass(frozen=True)
class Mixing:
    """Mixup with a share of Beta(mixup, mixup), or CutMix likewise; one of them at random if both are above 0.

    The partner of an image is its neighbour in the batch.

    Attributes:
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none.
        classes: The number of classes.
    """

    mixup: float
    cutmix: float
    classes: int

    def __call__(self, images: Tensor, labels: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Mix a batch.

        Shape:
            - images: [B, 3, H, W]
            - labels: [B]
            - output: mixed images [B, 3, H, W], and targets [B, classes] fp32 whose rows sum to 1
        """
        cut = self.cutmix > 0 and (self.mixup == 0 or generator.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        share = float(generator.beta(alpha, alpha))
        partner = images.roll(1, 0)
        if cut:
            share, images = _paste(images, partner, share, generator)
        else:
            images = torch.lerp(partner, images, share)
        targets = F.one_hot(labels, self.classes).float()
        return images, torch.lerp(targets.roll(1, 0), targets, share)


def mixing_of(recipe: Recipe, classes: int) -> Mixing | None:
    """Return the mixing that a recipe asks for; None if it asks for none."""
    return Mixing(recipe.mixup, recipe.cutmix, classes) if recipe.mixup or recipe.cutmix else None


def _paste(images: Tensor, partner: Tensor, share: float, generator: np.random.Generator) -> tuple[float, Tensor]:
    """Paste a box of 1 - share of the area from the partner around a random centre; return the share that is left."""
    height, width = images.shape[-2:]
    half = np.sqrt(1 - share) / 2
    y, x = generator.integers(height), generator.integers(width)
    top, bottom = (int(np.clip(y + sign * half * height, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * half * width, 0, width)) for sign in (-1, 1))
    images = images.clone()
    images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
    return 1 - (bottom - top) * (right - left) / (height * width), images
