"""A held-out part of the training set, on which the best weights of a run are chosen."""

from collections.abc import Sequence

import numpy as np

from sdnet.train.errors import UserError

SPLIT_SEED = 2022
"""Fixed, so that runs with other seeds hold out the same images and their results can be compared."""


def divide(labels: Sequence[int] | np.ndarray, count: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Divide a training set into the images to train on and those to hold out.

    Every class gives in proportion to its size. The division depends on the labels and `count` alone, not on the seed
    of the run.

    Args:
        labels: The labels of the N images.
        count: How many images are held out; at least 1.
        name: The name of the set, for messages.

    Returns:
        The sorted positions of the images to train on, [N - count], and of those held out, [count].

    Raises:
        UserError: The set is too small, or a class would lose all its images.
    """
    labels = np.asarray(labels)
    if count >= len(labels):
        raise UserError(f"{name} has {len(labels)} images and holdout is {count}; some must be left to train on.")
    generator = np.random.default_rng(SPLIT_SEED)
    by_class = np.lexsort((generator.permutation(len(labels)), labels))
    held_out = np.zeros(len(labels), bool)
    held_out[by_class[(2 * np.arange(count) + 1) * len(labels) // (2 * count)]] = True
    kept, held = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    if emptied := set(labels.tolist()) - set(labels[kept].tolist()):
        raise UserError(f"{name} would have no images of class number {min(emptied)} left; holdout is {count}.")
    return kept, held
