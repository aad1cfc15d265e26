"""A dictionary on images of one size, as the launchers see it: `Layer`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

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

    @cached_property
    def codes_size(self) -> Pair:
        """Height and width of the codes."""
        height, width = self.weight.shape[2:]
        return codes_size_of(self.image_size, (height, width), self.stride, self.padding)

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
    def geometry(self) -> Geometry:
        """The compile-time constants of the kernels."""
        last = self.layout == torch.channels_last
        return Geometry.of(self.weight, self.stride, self.padding, last, self.precision)

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes that kernels take at run time."""
        return Sizes(*self.image_size, *self.codes_size, taps=self.geometry.taps)

    @cached_property
    def shape(self) -> Shape:
        """The layer as the rules for paths and tiles see it."""
        atoms, channels, height, width = self.weight.shape
        return Shape(
            batch=self.batch,
            channels=channels,
            atoms=atoms,
            image_size=self.image_size,
            codes_size=self.codes_size,
            kernel_size=(height, width),
            stride=self.stride,
            itemsize=self.weight.element_size(),
            precision=self.precision,
            channels_last=self.layout == torch.channels_last,
            arch=hardware.arch_of(self.weight.device),
        )

    def empty_codes(self) -> Tensor:
        """Return codes [N, K, h, w] without values."""
        return self._empty(self.weight.shape[0], self.codes_size)

    def empty_images(self) -> Tensor:
        """Return images [N, C, H, W] without values."""
        return self._empty(self.weight.shape[1], self.image_size)

    def _empty(self, channels: int, size: Pair) -> Tensor:
        shape, weight = (self.batch, channels, *size), self.weight
        return torch.empty(shape, dtype=weight.dtype, device=weight.device, memory_format=self.layout)
