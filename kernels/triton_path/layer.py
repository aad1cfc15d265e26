"""A dictionary on images of one size, as the launchers see it: `Layer`."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.reference import Pair
from sdnet.kernels.reference import codes_size as codes_size_of
from sdnet.kernels.triton_path import hardware
from sdnet.kernels.triton_path.fused.descriptors import aligned
from sdnet.kernels.triton_path.geometry import Geometry, Sizes
from sdnet.kernels.triton_path.tiles import Shape


@dataclass(frozen=True)
class Layer:
    """A dictionary [K, C, kh, kw] on a batch of images of one size.

    Attributes:
        weight: the dictionary.
        batch: number of images.
        image_size: height and width of the images.
        stride: vertical and horizontal stride.
        padding: vertical and horizontal padding.
        layout: the memory format of images and codes.
    """

    weight: Tensor
    batch: int
    image_size: Pair
    stride: Pair
    padding: Pair
    layout: torch.memory_format

    @property
    def codes_size(self) -> Pair:
        """Height and width of the codes."""
        return self.facts.shape.codes_size

    @cached_property
    def packed(self) -> Tensor:
        """The dictionary in the memory order [K, kh, kw, C], which analysis and synthesis both read."""
        return aligned(self.weight.contiguous(memory_format=torch.channels_last))

    @cached_property
    def precision(self) -> str:
        """The products of fp32 tensors: "tf32" where torch allows it for convolutions, else "ieee"."""
        cudnn: Any = torch.backends.cudnn
        return "tf32" if self.weight.dtype == torch.float32 and cudnn.conv.fp32_precision == "tf32" else "ieee"

    @cached_property
    def facts(self) -> "Facts":
        """What the launchers derive from the layer."""
        weight = self.weight
        key = weight.shape, weight.element_size(), self.batch, self.image_size, self.stride, self.padding
        return facts_of(*key, self.layout == torch.channels_last, self.precision, hardware.arch_of(weight.device))

    @property
    def geometry(self) -> Geometry:
        """The compile-time constants of the kernels."""
        return self.facts.geometry

    @property
    def sizes(self) -> Sizes:
        """The sizes that kernels take at run time."""
        return self.facts.sizes

    @property
    def shape(self) -> Shape:
        """The layer as the rules for paths and tiles see it."""
        return self.facts.shape

    def empty_codes(self) -> Tensor:
        """Return codes [N, K, h, w] without values."""
        return self._empty(self.weight.shape[0], self.codes_size)

    def empty_images(self) -> Tensor:
        """Return images [N, C, H, W] without values."""
        return self._empty(self.weight.shape[1], self.image_size)

    def _empty(self, channels: int, size: Pair) -> Tensor:
        shape, weight = (self.batch, channels, *size), self.weight
        return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=self.layout)


class Facts(NamedTuple):
    """What follows from a layer's sizes, types and device.

    Attributes:
        geometry: the compile-time constants of the kernels.
        sizes: the sizes that kernels take at run time.
        shape: the layer as the rules for paths and tiles see it.
    """

    geometry: Geometry
    sizes: Sizes
    shape: Shape


@lru_cache(maxsize=1024)
def facts_of(
    weight_shape: torch.Size,
    itemsize: int,
    batch: int,
    image_size: Pair,
    stride: Pair,
    padding: Pair,
    channels_last: bool,
    precision: str,
    arch: int,
) -> Facts:
    """Return the facts of a layer, the same for each of its calls."""
    atoms, channels, height, width = weight_shape
    codes_size = codes_size_of(image_size, (height, width), stride, padding)
    geometry = Geometry(channels, atoms, height, width, *stride, *padding, channels_last, precision)
    sizes = Sizes(*image_size, *codes_size, taps=height * width)
    shape = Shape(
        batch=batch,
        channels=channels,
        atoms=atoms,
        image_size=image_size,
        codes_size=codes_size,
        kernel_size=(height, width),
        stride=stride,
        itemsize=itemsize,
        precision=precision,
        channels_last=channels_last,
        arch=arch,
    )
    return Facts(geometry, sizes, shape)
