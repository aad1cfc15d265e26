"""The blocks that the networks are made of, for plain convolutions and for CSC layers.

No ReLU follows a CSC layer, because its codes are sparse already.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import Pair, codes_size
from sdnet.layers import CSCConv2d

Stem = Literal["imagenet", "cifar"]
Convolution = Callable[..., nn.Module]
"""(in_channels, out_channels, kernel_size, stride, input_size) -> a layer with padding kernel_size // 2."""


def plain_convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, input_size: Pair
) -> nn.Module:
    """Return a convolution without bias."""
    del input_size
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def csc_convolution(coding: Coding, **options: Any) -> Convolution:
    """Return a function that builds CSC layers with a coding and other options of `CSCConv2d`."""

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int, input_size: Pair) -> nn.Module:
        return CSCConv2d(
            in_channels, out_channels, kernel_size, stride, input_size=input_size, **options, **vars(coding)
        )

    return make


def size_after(size: Pair, kernel_size: int, stride: int) -> Pair:
    """Return height and width after a layer with padding kernel_size // 2."""
    half = kernel_size // 2
    return codes_size(size, (kernel_size, kernel_size), (stride, stride), (half, half))


class StemBlock(nn.Module):
    """The first layers: a convolution and batch normalisation.

    After a plain convolution a ReLU follows; for ImageNet a max-pool, or a CSC layer, reduces the size by 2 once more.

    Args:
        in_channels: the number of channels of the images.
        width: the number of output channels.
        stem: "imagenet" or "cifar".
        convolution: builds the convolution.
        pool_with_csc: whether `convolution` builds the layer of the last reduction too, in place of a max-pool.
        image_size: the height and width of the images.

    Shape:
        - Input: [N, in_channels, H, W].
        - Output: [N, width, h, w], of `output_size` for images of `image_size`.
    """

    def __init__(
        self,
        in_channels: int,
        width: int,
        stem: Stem,
        convolution: Convolution,
        pool_with_csc: bool,
        image_size: Pair,
    ) -> None:
        super().__init__()
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv = convolution(in_channels, width, kernel_size, stride, image_size)
        self.norm = nn.BatchNorm2d(width)
        self.rectify = not isinstance(self.conv, CSCConv2d)
        self.output_size = size_after(image_size, kernel_size, stride)
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.pool = convolution(width, width, 3, 2, self.output_size) if pool_with_csc else nn.MaxPool2d(3, 2, 1)
            self.output_size = size_after(self.output_size, 3, 2)

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the features of images; `lam` replaces lambda of a CSC layer in this call."""
        return self.pool(self.before_pool(x, lam))

    def before_pool(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the features without the last reduction."""
        out = self.norm(self.conv(x) if lam is None else self.conv(x, lam))
        return F.relu(out) if self.rectify else out


def shortcut_of(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the shortcut of a block: a 1x1 convolution where the shape changes, and otherwise the identity."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation; with a shortcut, the input is added before a last ReLU.

    Args:
        in_channels: the number of input channels.
        channels: the number of output channels.
        stride: the stride of the first convolution.
        convolution: builds both convolutions.
        shortcut: whether the input is added.
        input_size: the height and width of the input.

    Shape:
        - Input: [N, in_channels, H, W].
        - Output: [N, channels, h, w], of `output_size` for inputs of `input_size`.
    """

    def __init__(
        self, in_channels: int, channels: int, stride: int, convolution: Convolution, shortcut: bool, input_size: Pair
    ) -> None:
        super().__init__()
        self.output_size, self.out_channels = size_after(input_size, 3, stride), channels
        self.conv1 = convolution(in_channels, channels, 3, stride, input_size)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, 1, self.output_size)
        self.norm2 = nn.BatchNorm2d(channels)
        self.rectify = not isinstance(self.conv1, CSCConv2d)
        self.shortcut = shortcut_of(in_channels, channels, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the block."""
        out = self.norm1(self.conv1(x))
        out = self.norm2(self.conv2(F.relu(out) if self.rectify else out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution with batch normalisation; the input is added before a last ReLU.

    `convolution` builds the 3x3 convolution, which has the stride. The 1x1 convolutions are plain, and a ReLU follows
    the first of them.

    Args:
        in_channels: the number of input channels.
        channels: the number of channels between the 1x1 convolutions; the output has 4 times as many.
        stride: the stride of the 3x3 convolution.
        convolution: builds the 3x3 convolution.
        shortcut: whether the input is added.
        input_size: the height and width of the input.

    Shape:
        - Input: [N, in_channels, H, W].
        - Output: [N, 4 channels, h, w], of `output_size` for inputs of `input_size`.
    """

    EXPANSION = 4

    def __init__(
        self, in_channels: int, channels: int, stride: int, convolution: Convolution, shortcut: bool, input_size: Pair
    ) -> None:
        super().__init__()
        self.output_size, self.out_channels = size_after(input_size, 3, stride), self.EXPANSION * channels
        self.conv1 = plain_convolution(in_channels, channels, 1, 1, input_size)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, stride, input_size)
        self.norm2 = nn.BatchNorm2d(channels)
        self.rectify = not isinstance(self.conv2, CSCConv2d)
        self.conv3 = plain_convolution(channels, self.out_channels, 1, 1, self.output_size)
        self.norm3 = nn.BatchNorm2d(self.out_channels)
        self.shortcut = shortcut_of(in_channels, self.out_channels, stride) if shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output of the block."""
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        out = self.norm3(self.conv3(F.relu(out) if self.rectify else out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))
