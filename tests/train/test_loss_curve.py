"""The first losses of a training run, committed: no change of the package may move them unnoticed.

`python tests/train/test_loss_curve.py` prints the losses of this machine.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from sdnet.step_size import csc_layers
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.job import Job
from sdnet.train.recipes import cifar_sdnet18
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

COMMITTED = (1.660944, 1.662142, 1.639585)
TOLERANCE = 5e-4
"""Relative. Rounding in another order, on other processors, changes the weights by about 1e-7 of themselves. This grows
by a factor of about ten with each step, so three steps are as many as can be compared.
"""

RECIPE = replace(cifar_sdnet18(), width=8, image_size=16, eval_resize=16, epochs=1, batch=16, lr=0.002)


def open_patterns(job: Job, rank: Rank, device: torch.device) -> Data:
    """96 noisy pictures in 4 classes, each class with a pattern of its own; the same on every machine."""
    generator = np.random.default_rng(1)
    labels = np.arange(112) % 4
    patterns = generator.integers(0, 256, (4, 3, 16, 16))
    noise = generator.integers(0, 256, (112, 3, 16, 16))
    images = ((patterns[labels] + 3 * noise) // 4).astype(np.uint8)
    options: dict[str, Any] = {"batch": 16, "device": device, "rank": rank, "seed": job.recipe.seed}
    train = ResidentLoader(images[:96], labels[:96], name="train", digest="t", augment=True, padding=2, **options)
    val = ResidentLoader(images[96:], labels[96:], name="val", digest="v", augment=False, **options)
    return Data(train, val, 16, tuple("abcd"), "patterns")


def losses(run: Path, step_size_factor: float = 1.0, noise: float = 0.0, **changes: Any) -> list[float]:
    """The losses of the first three steps.

    Args:
        run: The run folder.
        step_size_factor: What the first step sizes are multiplied by.
        noise: Relative deviation of random changes of the first weights.
        changes: Changed settings of the recipe.
    """
    job = Job(replace(RECIPE, **changes), Path(), RunFolder(run), log_every=1, tracker=("none",))
    trainer = Trainer(job, open_patterns)
    for layer in csc_layers(trainer.model).values():
        layer.step_size.mul_(step_size_factor)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.mul_(1 + noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)))
    found: list[float] = []
    log = trainer.accelerator.log

    def note(values: dict[str, Any], *arguments: Any, **options: Any) -> None:
        found.extend(value for name, value in values.items() if name == "train/loss")
        log(values, *arguments, **options)

    trainer.accelerator.log = note
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return found[:3]


def deviation(found: list[float]) -> float:
    """The largest relative difference from the committed losses."""
    assert len(found) == len(COMMITTED)
    return max(abs(loss / committed - 1) for loss, committed in zip(found, COMMITTED, strict=True))


def test_the_losses_are_the_committed_ones(tmp_path: Path) -> None:
    assert deviation(losses(tmp_path / "run")) < TOLERANCE


@pytest.mark.slow
def test_rounding_would_not_be_seen(tmp_path: Path) -> None:
    """Noise as large as the rounding of fp32."""
    assert deviation(losses(tmp_path / "run", noise=1e-7)) < TOLERANCE / 2


@pytest.mark.parametrize(
    "change",
    [{"step_size_factor": 0.9}, {"lr": 0.0024}],
    ids=str,
)
@pytest.mark.slow
def test_a_small_mistake_would_be_seen(change: dict[str, Any], tmp_path: Path) -> None:
    assert deviation(losses(tmp_path / "run", **change)) > 2 * TOLERANCE


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(tuple(round(loss, 6) for loss in losses(Path(folder, "run"))))
