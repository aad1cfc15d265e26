"""Disk space for the files of a run, checked before any work."""

import os
from collections.abc import Sequence

import torch

from sdnet.train.build import create_model
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder

SLACK = 1 << 16  # bytes of a file beside its tensors


def check_disk_space(run: RunFolder, recipe: Recipe, resume: bool) -> None:
    """Reserve the disk space that the files of a run take at most, and release it.

    This detects a full disk, a quota and a limit on the size of a file. A run that is resumed has most of its files
    already: it needs space for the next ones beside them.

    Args:
        run: The run folder, which exists.
        recipe: The recipe of the run.
        resume: Whether the run is resumed.

    Raises:
        UserError: There is not enough space.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    made = []
    with run.writing():
        try:
            for number, size in enumerate(sizes(recipe, resume)):
                made.append(run.path / f".space{number}.tmp")
                descriptor = os.open(made[-1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
                try:
                    os.posix_fallocate(descriptor, 0, size)
                finally:
                    os.close(descriptor)
        finally:
            for file in made:
                file.unlink(missing_ok=True)


def sizes(recipe: Recipe, resume: bool) -> Sequence[int]:
    """Return the sizes, in bytes, of the files that a run has at the same time: checkpoints first, then weights."""
    with torch.device("meta"):
        model = create_model(recipe, num_classes=1000)
    parameters = sum(value.nbytes for value in model.parameters())
    weights = sum(value.nbytes for value in model.state_dict().values()) + SLACK
    moments = 2 if recipe.optimizer == "adamw" else 1 if recipe.momentum else 0
    models = 2 if recipe.ema else 1
    checkpoint = models * weights + moments * parameters + SLACK
    if resume:
        return [checkpoint, *[weights] * models]
    # The last one, the one before and the one in work; of the weights the last, the best and those in work.
    return [*[checkpoint] * 3, *[weights] * (2 * models + 1)]
