"""`margins`: how far step sizes are from divergence while a network learns, one optimizer step after another.

The margin of a layer is its step size times the largest eigenvalue of A'A, converged anew after each optimizer step;
0.9 is exact, and the default solver, FISTA, diverges from 4/3 on. Three tasks learn from random weights:

    dictionary     CSCConv2d(1, 32, 9, n_steps=50, lam=0.3, nonnegative=False), Adam, crops of scikit-image's camera
    sdnet18        the CIFAR recipe: SGD, Nesterov's momentum 0.9, weight decay 5e-4, cropped and flipped pictures
    sdnet18_all    the same

A row holds some steps of one run: the largest margin after each step and of each layer. It is written as soon as they
are done, so a run may be stopped. The time of a row is that of the update, the projection and the estimates of all
layers; `step_ms` is the whole training step without the measurement of the margins.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdnet
from sdnet.bench.common_options import add_common_options, add_width_option, at_least, number, open_ledger
from sdnet.bench.isolation import wait_for
from sdnet.bench.ledger import Ledger
from sdnet.kernels import step_sizes
from sdnet.kernels.qualify.timing import fp32_products, percentiles
from sdnet.step_size import csc_layers
from sdnet.train.build import create_model
from sdnet.train.data.cifar import SmallPictures, read_small_pictures
from sdnet.train.data.resident import ResidentLoader
from sdnet.train.errors import UserError
from sdnet.train.recipes import CIFAR_RECIPES, Recipe

TASKS = ("dictionary", "sdnet18", "sdnet18_all")
FISTA_LIMIT = 4 / 3
"""The margin from which FISTA diverges."""
CROP, CROPS = 32, 4
"""Height and width of a crop of the camera picture, and crops of one step."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS), help="what learns; default: all")
    add_width_option(parser)
    parser.add_argument("--data", type=Path, help="CIFAR or a folder of small pictures, for the networks")
    parser.add_argument("--batch", type=at_least(1), nargs="+", default=[128], help="pictures of one step; default 128")
    parser.add_argument("--lr", type=number, nargs="+", default=[0.1], help="learning rates of the networks")
    parser.add_argument("--adam-lr", type=number, nargs="+", default=[3e-3, 1e-2, 3e-2], help="and of the dictionary")
    parser.add_argument(
        "--seed", type=at_least(0), nargs="+", default=[0, 1], help="of weights and pictures; default 0 1"
    )
    parser.add_argument("--steps", type=at_least(1), default=100, help="optimizer steps of each run; default 100")
    parser.add_argument("--every", type=at_least(1), default=10, help="optimizer steps of one row; default 10")
    add_common_options(parser)


def run(options: argparse.Namespace) -> int:
    """Measure every task with each of its settings."""
    device, ledger = open_ledger(options, "margins")
    networks = [task for task in options.task if task != "dictionary"]
    if networks and options.data is None:
        raise UserError(f"--data is missing: {networks[0]} learns from pictures.")
    pictures = pictures_of(options.data, max(options.batch)) if networks else None  # before any work: it may be refused
    for seed, lr in itertools.product(options.seed, options.adam_lr if "dictionary" in options.task else []):
        measure(DictionaryLearning(lr, seed, device), options, ledger)
    for seed, task, batch, lr in itertools.product(options.seed, networks, options.batch, options.lr):
        assert pictures is not None
        recipe = recipe_of(task, batch, lr, seed, options.width, pictures.train.images.shape[-1])
        measure(Classification(recipe, pictures, device), options, ledger)
    return 0


def pictures_of(data: Path, batch: int) -> SmallPictures:
    """Return the pictures that the networks learn from.

    Raises:
        UserError: There are none, they are not square, or there are fewer than a batch.
    """
    pictures = read_small_pictures(data)
    count, _, height, width = pictures.train.images.shape
    if height != width:
        raise UserError(f"The pictures in {data} are {width} x {height} pixels; they must be square.")
    if count < batch:
        raise UserError(f"--batch is {batch}; the training set in {data} has {count} pictures.")
    return pictures


class DictionaryLearning:
    """Learns the atoms of crops of one picture."""

    def __init__(self, lr: float, seed: int, device: torch.device) -> None:
        try:
            from skimage import data
        except ImportError as error:
            raise UserError("scikit-image is missing: it holds the picture of the dictionary's task.") from error
        torch.manual_seed(seed)
        image = torch.from_numpy(data.camera()).float()
        self.image = (image - image.mean()) / image.std()
        shape = {"batch": CROPS, "image_size": CROP, "n_steps": 50}
        self.facts: dict[str, Any] = {"provider": "dictionary", "shape": shape}
        self.settings = {"optimizer": "Adam", "lr": lr, "seed": seed}
        self.model = sdnet.CSCConv2d(1, 32, 9, n_steps=50, lam=0.3, nonnegative=False, input_size=CROP).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.device = device

    def losses(self) -> Iterator[Tensor]:
        """Yield the objective of each step's crops."""
        generator = torch.Generator().manual_seed(self.settings["seed"])
        while True:
            corners = torch.randint(0, self.image.shape[0] - CROP + 1, (CROPS, 2), generator=generator).tolist()
            crops = torch.stack([self.image[y : y + CROP, x : x + CROP] for y, x in corners])[:, None].to(self.device)
            yield self.model.objective(crops, self.model(crops)).mean()


def recipe_of(model: str, batch: int, lr: float, seed: int, width: int, size: int) -> Recipe:
    """Return the CIFAR recipe with these changes, for images of a height and width."""
    images = {"image_size": size, "eval_resize": size}
    return replace(CIFAR_RECIPES["cifar_sdnet18"](), model=model, batch=batch, lr=lr, seed=seed, width=width, **images)


class Classification:
    """Learns to classify pictures as the CIFAR recipe says."""

    def __init__(self, recipe: Recipe, pictures: SmallPictures, device: torch.device) -> None:
        shape = {name: getattr(recipe, name) for name in ("batch", "image_size", "width")}
        self.facts: dict[str, Any] = {"provider": recipe.model, "shape": shape | {"n_steps": recipe.coding.n_steps}}
        self.settings = {"optimizer": "SGD", "lr": recipe.lr, "seed": recipe.seed}
        self.device = device
        torch.manual_seed(recipe.seed)
        self.model: nn.Module = create_model(recipe, len(pictures.classes)).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
        )
        train = pictures.train
        self.loader = ResidentLoader(
            train.images,
            train.labels,
            name="The training set",
            digest="",
            batch=recipe.batch,
            augment=True,
            padding=recipe.crop_padding,
            device=device,
            seed=recipe.seed,
        )

    def losses(self) -> Iterator[Tensor]:
        """Yield the loss of each step's pictures."""
        for epoch in itertools.count():
            self.loader.set_epoch(epoch)
            for images, labels in self.loader:
                yield F.cross_entropy(self.model(images), labels)


class StepRecord(NamedTuple):
    """One optimizer step: the margin of each layer, the loss, and milliseconds of the update and of the whole step."""

    margins: dict[str, float]
    loss: float
    update_ms: float
    step_ms: float


@fp32_products(tf32=False)
def measure(task: DictionaryLearning | Classification, options: argparse.Namespace, ledger: Ledger) -> None:
    """Train for some steps, and write a row whenever `options.every` of them are done."""
    sdnet.refresh_step_size(task.model)
    layers = csc_layers(task.model)
    vectors = {name: layer.power_vector.clone() for name, layer in layers.items()}
    clock: list[float] = []

    def note(*_: Any) -> None:
        wait_for(task.device)  # which waits, so that times are those of the device and not of the launches
        clock.append(time.perf_counter())

    task.optimizer.register_step_post_hook(note)
    sdnet.attach(task.model, task.optimizer)
    task.optimizer.register_step_post_hook(note)
    records: list[StepRecord] = []
    source = task.losses()
    for step in range(1, options.steps + 1):
        begin = time.perf_counter()
        loss = next(source)
        task.optimizer.zero_grad()
        loss.backward()
        task.optimizer.step()
        before, after = clock[-2:]
        if not loss.isfinite() or not all(layer.weight.isfinite().all() for layer in layers.values()):
            if records:
                write(ledger, task, {"first_step": step - len(records), "last_step": step - 1}, records)
            reason = f"the loss or the atoms became infinite or NaN at step {step}"
            settings = task.settings | {"first_step": step, "last_step": step}
            ledger.add(**task.facts, mode="step", dtype="fp32", settings=settings, status="refused", reason=reason)
            print(task.facts["provider"], task.settings, reason, flush=True)
            return
        margins = {}
        for name, layer in layers.items():
            vectors[name], eigenvalue = step_sizes.largest_eigenvalue(
                layer.weight.detach(), vectors[name], layer.stride, layer.padding, tolerance=1e-4
            )
            margins[name] = float(layer.step_size * eigenvalue)
        records.append(StepRecord(margins, float(loss.detach()), 1e3 * (after - before), 1e3 * (after - begin)))
        if step % options.every == 0 or step == options.steps:
            write(ledger, task, {"first_step": step - len(records) + 1, "last_step": step}, records)
            records.clear()


def write(
    ledger: Ledger, task: DictionaryLearning | Classification, steps: dict[str, int], records: list[StepRecord]
) -> None:
    """Append one row, and print its summary."""
    margins = [record.margins for record in records]
    largest = [max(values.values()) for values in margins]
    metrics = {
        "largest_margin": max(largest),
        "least_margin": min(min(values.values()) for values in margins),
        "steps_above_1": sum(value > 1 for value in largest),
        "steps_above_1.05": sum(value > 1.05 for value in largest),
        "steps_above_4/3": sum(value >= FISTA_LIMIT for value in largest),
        "layers_above_4/3_at_once": max(sum(v >= FISTA_LIMIT for v in values.values()) for values in margins),
        "step_ms": median(record.step_ms for record in records),
    }
    details: dict[str, Any] = {
        "largest_margin_by_step": [round(value, 4) for value in largest],
        "largest_margin_by_layer": {name: round(max(m[name] for m in margins), 4) for name in margins[0]},
        "loss_by_step": [round(record.loss, 4) for record in records],
    }
    ledger.add(
        **task.facts,
        mode="step",
        dtype="fp32",
        layout="contiguous",
        metrics=metrics,
        settings=task.settings | steps | details,
        time_ms=percentiles([record.update_ms for record in records])._asdict(),
    )
    print(task.facts["provider"], task.settings | steps, {name: round(v, 3) for name, v in metrics.items()}, flush=True)
