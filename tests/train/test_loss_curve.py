"""The losses of the first 20 steps of a training run, committed: no change of the method may move them unnoticed.

The run is in double precision. In single precision, rounding in another order changes the weights by about 1e-7 of
themselves; soon a code lies on the other side of its threshold, and the loss differs by 1e-3. In double precision the
losses of 20 steps differ by about 1e-12 between processors. Two things are in single precision in every run, and would
bring its rounding back: the random numbers of the first weights, which the test takes from NumPy instead, and the step
sizes, which it rounds to four digits after each step.

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
from torch import nn

import sdnet
from sdnet.step_size import csc_layers
from sdnet.train.data.loader import Data, Rank
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.job import Job
from sdnet.train.recipes import cifar_sdnet18
from sdnet.train.run_folder import RunFolder
from sdnet.train.trainer import Trainer

# fmt: off
COMMITTED = (
    1.6785332035, 1.65385951994, 2.04206388174, 1.60605275419, 2.08608325162, 1.69823581307, 1.65714622223,
    1.28417167051, 2.10096434125, 1.61677582543, 1.75511756641, 1.73918123809, 1.41370137819, 1.84915554542,
    1.48180818449, 1.4547459864, 1.57220057597, 1.63012154946, 1.42601500449, 1.44676556151,
)
# fmt: on
TOLERANCE = 1e-8
"""Relative. The noise of `test_rounding_would_not_be_seen` makes 3e-12, 1 % more weight decay 3e-7."""

RECIPE = replace(cifar_sdnet18(), width=8, image_size=16, eval_resize=16, epochs=2, batch=16, lr=0.002)


def open_patterns(job: Job, rank: Rank, device: torch.device) -> Data:
    """160 noisy pictures in 4 classes, each class with a pattern of its own; the same on every machine."""
    generator = np.random.default_rng(1)
    labels = np.arange(176) % 4
    patterns = generator.integers(0, 256, (4, 3, 16, 16))
    noise = generator.integers(0, 256, (176, 3, 16, 16))
    images = ((patterns[labels] + 3 * noise) // 4).astype(np.uint8)
    options: dict[str, Any] = {"batch": 16, "device": device, "rank": rank, "seed": job.recipe.seed}
    options["dtype"] = torch.float64
    train = ResidentLoader(images[:160], labels[:160], name="train", digest="t", augment=True, padding=2, **options)
    val = ResidentLoader(images[160:], labels[160:], name="val", digest="v", augment=False, **options)
    return Data(train, val, 16, tuple("abcd"), "patterns")


@torch.no_grad()
def set_weights(model: nn.Module, noise: float) -> None:
    """Give a model weights that are the same on every machine, changed at random by `noise` of themselves."""
    generator = np.random.default_rng(2)
    for weight in model.parameters():
        if weight.ndim > 1:  # the others are 0 or 1
            fan_in = weight[0].numel()
            weight.copy_(torch.from_numpy(generator.normal(0, (2 / fan_in) ** 0.5, tuple(weight.shape))))
    for weight in model.parameters():
        weight.mul_(1 + noise * torch.from_numpy(generator.normal(size=tuple(weight.shape))))
    sdnet.project(model)


def round_step_sizes(model: nn.Module, factor: float = 1.0) -> None:
    """Round the step sizes to four digits, after they have been multiplied by a factor."""
    for layer in csc_layers(model).values():
        layer.step_size.fill_(float(f"{factor * float(layer.step_size):.4g}"))


def losses(
    run: Path, step_size: float = 1.0, noise: float = 0.0, step_noise: float = 0.0, **changes: Any
) -> list[float]:
    """The losses of 20 steps.

    Args:
        run: The run folder.
        step_size: What the step sizes are multiplied by.
        noise: Relative deviation of random changes of the first weights.
        step_noise: Relative deviation of random changes of the step sizes after each step.
        changes: Changed settings of the recipe.
    """
    job = Job(replace(RECIPE, **changes), Path(), RunFolder(run), log_every=1, tracker=("none",))
    trainer = Trainer(job, open_patterns)
    model, log, generator = trainer.model.double(), trainer.accelerator.log, np.random.default_rng(3)
    set_weights(model, noise)
    round_step_sizes(model, step_size)
    found: list[float] = []

    def note(values: dict[str, Any], *arguments: Any, **options: Any) -> None:
        """Called after each step."""
        if "train/loss" in values:
            found.append(values["train/loss"])
            round_step_sizes(model, step_size * (1 + step_noise * generator.normal()))
        log(values, *arguments, **options)

    trainer.accelerator.log = note
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return found


def deviation(found: list[float]) -> float:
    """The largest relative difference from the committed losses."""
    assert len(found) == len(COMMITTED)
    return max(abs(loss / committed - 1) for loss, committed in zip(found, COMMITTED, strict=True))


def test_the_losses_are_the_committed_ones(tmp_path: Path) -> None:
    assert deviation(losses(tmp_path / "run")) < TOLERANCE


@pytest.mark.slow
def test_rounding_would_not_be_seen(tmp_path: Path) -> None:
    """Noise as large as the rounding of fp64 in the weights, and of fp32 in the step sizes."""
    assert deviation(losses(tmp_path / "run", noise=1e-15, step_noise=1e-7)) < TOLERANCE / 100


@pytest.mark.parametrize(
    "change",
    [{"step_size": 1.001}, {"lr": 0.002002}, {"weight_decay": 5.05e-4}],
    ids=str,
)
@pytest.mark.slow
def test_a_small_mistake_would_be_seen(change: dict[str, Any], tmp_path: Path) -> None:
    assert deviation(losses(tmp_path / "run", **change)) > 10 * TOLERANCE


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        print(tuple(round(loss, 11) for loss in losses(Path(folder, "run"))))
