"""The shapes of the CSC layers of the registered models, read from the models themselves on the meta device."""

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import torch

from sdnet.kernels.reference import Pair, codes_size
from sdnet.models import VARIANTS, WIDTH, Stem, create_model
from sdnet.step_size import csc_layers as layers_of


class LayerShape(NamedTuple):
    """The shape of one CSC layer, [N, channels, *size] -> [N, atoms, *codes_size], with square atoms."""

    name: str
    channels: int
    atoms: int
    kernel_size: int
    stride: int
    size: Pair

    @property
    def padding(self) -> int:
        """Padding on each side of the input."""
        return self.kernel_size // 2

    @property
    def codes_size(self) -> Pair:
        """Height and width of the codes."""
        return codes_size(self.size, *self.pairs)

    @property
    def pairs(self) -> tuple[Pair, Pair, Pair]:
        """Size of the atoms, stride and padding, each as a (vertical, horizontal) pair."""
        kernel_size, stride, padding = self.kernel_size, self.stride, self.padding
        return (kernel_size, kernel_size), (stride, stride), (padding, padding)

    @property
    def products(self) -> int:
        """Number of (code pixel, tap) pairs whose tap lies inside the image, that is, without the padding."""
        inside = 1
        for size, codes in zip(self.size, self.codes_size, strict=True):
            rows = (i * self.stride - self.padding + tap for i in range(codes) for tap in range(self.kernel_size))
            inside *= sum(0 <= row < size for row in rows)
        return inside

    @property
    def geometry(self) -> "LayerShape":
        """The shape without its name: equal for layers that cost the same."""
        return self._replace(name="")

    def __str__(self) -> str:
        height, width = self.size
        shape = f"{self.channels}->{self.atoms} {self.kernel_size}x{self.kernel_size}"
        return f"{shape}/{self.stride} @ {height}x{width}"


def stem_for(image_size: int) -> Stem:
    """Return the stem that benchmarks use at an image size: CIFAR's up to 64 pixels, ImageNet's above."""
    return "cifar" if image_size <= 64 else "imagenet"


@cache
def csc_layers(model: str = "sdnet18_all", image_size: int = 224, width: int = WIDTH) -> tuple[LayerShape, ...]:
    """Return the CSC layers of a registered model, named as its modules, in the order of the data."""
    with torch.device("meta"):
        network = create_model(model, stem=stem_for(image_size), width=width, image_size=image_size)
    return tuple(
        LayerShape(name, layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], size)
        for name, layer in layers_of(network).items()
        for size in [(layer.power_vector.shape[2], layer.power_vector.shape[3])]
    )


def csc_models() -> list[str]:
    """Return the names of the registered models that have CSC layers."""
    return [name for name, variant in VARIANTS.items() if variant.csc_stem]


def distinct(layers: Iterable[LayerShape]) -> list[LayerShape]:
    """Return the first layer of each geometry."""
    found: dict[LayerShape, LayerShape] = {}
    for layer in layers:
        found.setdefault(layer.geometry, layer)
    return list(found.values())


def distinct_layers() -> list[LayerShape]:
    """Return one layer of each geometry of all registered models at 32 and 224 pixels."""
    return distinct(layer for size in (32, 224) for model in csc_models() for layer in csc_layers(model, size))
