"""A training run of a benchmark: a registered model with `sdnet.attach`, or an official network in its own loop."""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdnet
from sdnet.bench.official import OfficialConfig, OfficialSDNet
from sdnet.bench.providers import DTYPES, LAYOUTS
from sdnet.bench.step_clock import StepClock
from sdnet.models import WIDTH, Stem
from sdnet.step_size import csc_layers
from sdnet.train.errors import UserError

OFFICIAL = {
    "official_sdnet18": {"depth": 18, "all_layers": False},
    "official_sdnet18_all": {"depth": 18, "all_layers": True},
    "official_sdnet34": {"depth": 34, "all_layers": False},
    "official_sdnet34_all": {"depth": 34, "all_layers": True},
}
CLASSES = {"cifar": 10, "imagenet": 1000}
BATCHES_OF_NOISE = 4
Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TrainingSetting:
    """What a training run computes.

    Attributes:
        model: A registered model or an official network.
        stem: The stem of the model.
        batch: Images of a batch.
        image_size: Height and width of the images.
        n_steps: Unrolled steps of a CSC layer.
        dtype: The type of autocast. Parameters are fp32; "fp32" and "tf32" run without autocast.
        layout: The memory format.
        compiled: Whether the model runs through `torch.compile`.
        impl: The implementation of the CSC operator.
        keep_residuals: Whether the forward pass keeps the residuals for the backward pass; None for the default.
        width: Channels of the stem and the first stage.
    """

    model: str
    stem: Stem
    batch: int
    image_size: int
    n_steps: int
    dtype: str
    layout: str
    compiled: bool
    impl: str = "auto"
    keep_residuals: bool | None = None
    width: int = WIDTH

    def __str__(self) -> str:
        words = [self.model, f"width {self.width}", f"{self.image_size} px", f"batch {self.batch}"]
        words += [f"n_steps {self.n_steps}", self.dtype, self.layout, f"impl {self.impl}"] + [
            "compiled"
        ] * self.compiled
        return ", ".join([*words, f"keep_residuals {self.keep_residuals}"])

    @property
    def half(self) -> bool:
        """Whether autocast is on."""
        return DTYPES[self.dtype] != torch.float32

    @property
    def tf32(self) -> bool:
        """Whether fp32 products are computed in tf32, as the training programs do beside autocast too."""
        return self.dtype != "fp32"

    def describe(self) -> dict[str, Any]:
        """Return the shape for the ledger."""
        names = ("batch", "image_size", "n_steps", "stem", "width")
        return {name: getattr(self, name) for name in names}


class TrainingRun:
    """A model and its optimizer; each training step marks the phases of a clock.

    The learning rate 0.1, momentum and weight decay of SGD are those of the CIFAR recipe, because the speed of the
    weights decides how many power iterations the official loop takes. Before every batch an official network refreshes
    all step sizes to tolerance, as its loop does; ours use the hook of `sdnet.attach`.

    Args:
        setting: What to run.
        device: Where to run it.
        model: The network, if it is not the one that the setting names.
    """

    def __init__(self, setting: TrainingSetting, device: torch.device, model: nn.Module | None = None) -> None:
        self.setting, self.device = setting, device
        torch.manual_seed(0)
        model = (model or make_model(setting)).to(device)
        model.to(memory_format=LAYOUTS[setting.layout])  # pyright: ignore[reportCallIssue]  # torch has it
        self.refresh: Callable[[], None] | None = None
        if isinstance(model, OfficialSDNet):
            model(torch.zeros(2, 3, setting.image_size, setting.image_size, device=device))  # makes its eigenvectors
            self.refresh = model.update_stepsize
        layers = csc_layers(model)
        for layer in layers.values():
            layer.keep_residuals = setting.keep_residuals
        self.model: nn.Module = model.train()
        self.forward: Callable[[Tensor], Tensor] = torch.compile(model, fullgraph=True) if setting.compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=setting.dtype == "fp16" and device.type == "cuda")
        self.clock = StepClock(device)
        # Hooks run in the order of registration: this one ends the optimizer's phase, that of attach is the refresh.
        self.optimizer.register_step_post_hook(lambda *_: self.clock.mark("optimiser"))
        if layers:
            sdnet.attach(model, self.optimizer)
        self.loss = torch.zeros((), device=device)

    def step(self, batches: Batches) -> None:
        """Take one training step on the next batch."""
        images, labels = next(batches)
        self.clock.mark("data")
        if self.refresh is not None:
            self.refresh()
            self.clock.mark("refresh")
        loss = self._loss(self.forward, images, labels)
        self.clock.mark("forward")
        self.scaler.scale(loss).backward()
        self.clock.mark("backward")
        self.scaler.step(self.optimizer)
        self.clock.mark("refresh")
        self.scaler.update()
        self.optimizer.zero_grad()
        self.clock.mark("optimiser")
        self.loss = loss.detach()

    def kept_for_backward(self, batches: Batches) -> float:
        """Return the memory that autograd holds after a forward pass, without parameters and buffers, in MiB."""
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        images, labels = next(batches)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self._loss(self.model, images, labels)
        # After the forward pass, because that of the official network moves its weights to other memory.
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            sizes.pop(tensor.untyped_storage().data_ptr(), None)
        del loss
        return sum(sizes.values()) / 2**20

    def _loss(self, forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.device.type, DTYPES[self.setting.dtype], enabled=self.setting.half):
            return F.cross_entropy(forward(images), labels)


def known_models() -> list[str]:
    """Return the names of the registered models and of the official networks."""
    return [*sdnet.list_models(), *OFFICIAL]


def make_model(setting: TrainingSetting) -> nn.Module:
    """Return the network of a setting."""
    classes = CLASSES[setting.stem]
    if setting.model in OFFICIAL:
        config = OfficialConfig(
            **OFFICIAL[setting.model], stem=setting.stem, num_classes=classes, n_steps=setting.n_steps
        )
        return OfficialSDNet(config)
    return sdnet.create_model(
        setting.model,
        classes,
        stem=setting.stem,
        width=setting.width,
        image_size=setting.image_size,
        n_steps=setting.n_steps,
        impl=setting.impl,
    )


def batches_of(setting: TrainingSetting, device: torch.device, options: argparse.Namespace) -> Batches:
    """Return batches of the pictures of --data, else of noise."""
    return pictures(setting, device, options.data, options.threads) if options.data else noise(setting, device)


def noise(setting: TrainingSetting, device: torch.device) -> Batches:
    """Yield a few batches of random images and labels on the device, again and again."""
    generator = torch.Generator(device).manual_seed(0)
    shape, classes = (setting.batch, 3, setting.image_size, setting.image_size), CLASSES[setting.stem]
    batches = [
        (
            torch.randn(shape, generator=generator, device=device).contiguous(memory_format=LAYOUTS[setting.layout]),
            torch.randint(classes, (setting.batch,), generator=generator, device=device),
        )
        for _ in range(BATCHES_OF_NOISE)
    ]
    return cycle(batches)


def pictures(setting: TrainingSetting, device: torch.device, data: Path, threads: int) -> Batches:
    """Yield training batches of an ImageFolder tree by DALI, epoch after epoch; labels modulo the number of classes."""
    from sdnet.train.data.dali import DaliLoader
    from sdnet.train.data.folder import read_image_folder

    loader = DaliLoader(
        read_image_folder(data)[0],
        batch=setting.batch,
        size=setting.image_size,
        augment=True,
        device=device,
        threads=threads,
        channels_last=setting.layout == "channels_last",
    )
    if not len(loader):
        raise UserError(f"The training set in {data} is smaller than one batch of {setting.batch}.")
    epoch = 0
    while True:
        loader.set_epoch(epoch)
        for images, labels in loader:
            yield images, labels % CLASSES[setting.stem]
        epoch += 1
