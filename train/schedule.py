"""The learning rate as a pure function of the global step, and the size of the training images of the epoch."""

import math

from sdnet.train.recipes import Recipe

FULL_SIZE_FROM = 0.8
"""The share of the epochs after which training images have the full size."""


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of an optimizer step.

    With e = step / steps_per_epoch, W warm-up epochs and E epochs in all:
        warm-up, e < W:  lr (step + 1) / (W steps_per_epoch)
        "step":          lr gamma^(number of milestones <= e)
        "cosine":        lr_min + (lr - lr_min) (1 + cos(pi (e - W) / (E - W))) / 2
        "onecycle":      lr_min + (lr - lr_min) (1 - (e - W) / (E - W))

    Args:
        recipe: The recipe.
        step: The optimizer step, counted from 0 over the whole run.
        steps_per_epoch: The number of optimizer steps in an epoch.
    """
    epoch = step / steps_per_epoch
    if epoch < recipe.warmup_epochs:
        return recipe.lr * min(1.0, (step + 1) / (recipe.warmup_epochs * steps_per_epoch))
    if recipe.schedule == "step":
        return recipe.lr * recipe.gamma ** sum(epoch >= milestone for milestone in recipe.milestones)
    progress = (epoch - recipe.warmup_epochs) / (recipe.epochs - recipe.warmup_epochs)
    share = 1 - progress if recipe.schedule == "onecycle" else (1 + math.cos(math.pi * progress)) / 2
    return recipe.lr_min + (recipe.lr - recipe.lr_min) * share


def training_size(recipe: Recipe, epoch: int) -> int:
    """Return the height and width of the training images of an epoch.

    With E epochs, the full size S and the first size F it is F + 32 floor((S - F) (e / G) / 32) in the epochs e before
    G = min(0.8 E, E - 1), and S from then on: the last fifth of the epochs, at least the last one, has the full size.

    Args:
        recipe: The recipe.
        epoch: The epoch, counted from 0.
    """
    first, full = recipe.first_image_size or recipe.image_size, recipe.image_size
    growing = min(FULL_SIZE_FROM * recipe.epochs, recipe.epochs - 1)
    return full if epoch >= growing else first + int((full - first) * epoch / growing) // 32 * 32
