"""Mixup and CutMix: two pictures of a batch in one, and a target to match."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mixing:
    """How batches are mixed: by Mixup with lambda ~ Beta(mixup, mixup), by CutMix likewise, by either at random if
    both are above 0. The partner of a picture is its neighbour in the batch."""

    mixup: float
    cutmix: float
    classes: int

    def __call__(self, images: Tensor, labels: Tensor, generator: np.random.Generator) -> tuple[Tensor, Tensor]:
        """images [B, 3, H, W], labels [B] -> mixed images, and targets [B, classes] fp32 whose rows sum to 1."""
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


def _paste(images: Tensor, partner: Tensor, share: float, generator: np.random.Generator) -> tuple[float, Tensor]:
    """A box of 1 - share of the area from the partner, about a random centre; the share left, and the images."""
    height, width = images.shape[-2:]
    half = np.sqrt(1 - share) / 2
    y, x = generator.integers(height), generator.integers(width)
    top, bottom = (int(np.clip(y + sign * half * height, 0, height)) for sign in (-1, 1))
    left, right = (int(np.clip(x + sign * half * width, 0, width)) for sign in (-1, 1))
    images = images.clone()
    images[..., top:bottom, left:right] = partner[..., top:bottom, left:right]
    return 1 - (bottom - top) * (right - left) / (height * width), images
