"""SDNet-18/34, their `_all` variants, and ResNet-18/34 as the yardstick: one trunk with the convolution as a parameter.

| name            | stem                     | 3x3 convolutions of the blocks |
|-----------------|--------------------------|--------------------------------|
| resnet18, 34    | Conv2d, BN, ReLU         | Conv2d                         |
| sdnet18, 34     | CSCConv2d, BN            | Conv2d                         |
| sdnet18_all ... | CSCConv2d, BN            | CSCConv2d                      |

The ImageNet stem is 7x7 with stride 2, followed by a 3x3 max-pool with stride 2, for which the `_all` variants have a
3x3 CSC layer; the CIFAR stem is 3x3 with stride 1. CSC codes are sparse by themselves: no ReLU follows them in a block.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from sdnet.kernels import checks
from sdnet.kernels.coding import Coding, coding_of, takes_coding
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.kernels.reference import Pair, codes_size
from sdnet.layers import CSCConv2d

Stem = Literal["imagenet", "cifar"]
Convolution = Callable[..., nn.Module]
"""(in_channels, out_channels, kernel_size, stride, input_size) -> a module with padding kernel_size // 2."""

WIDTHS = (64, 128, 256, 512)


class Variant(NamedTuple):
    """Blocks per stage, and where CSC layers stand."""

    blocks: tuple[int, int, int, int]
    csc_stem: bool
    csc_blocks: bool


VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2), csc_stem=False, csc_blocks=False),
    "resnet34": Variant((3, 4, 6, 3), csc_stem=False, csc_blocks=False),
    "sdnet18": Variant((2, 2, 2, 2), csc_stem=True, csc_blocks=False),
    "sdnet34": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=False),
    "sdnet18_all": Variant((2, 2, 2, 2), csc_stem=True, csc_blocks=True),
    "sdnet34_all": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=True),
}


def list_models() -> list[str]:
    """The names that `create_model` takes."""
    return list(VARIANTS)


@takes_coding
def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    stem: Stem = "imagenet",
    image_size: int | Pair | None = None,
    shortcut: bool = True,
    lam: float = 0.1,
    impl: str = "auto",
    **coding: Any,
) -> "SDNet":
    """A freshly initialised network that maps images [N, 3, H, W] to logits [N, num_classes].

    `image_size` is where the step sizes are estimated, 224 for the ImageNet stem and 32 for CIFAR unless told; the
    network takes other sizes too. `shortcut=False` (only `_all`) leaves out the residual connections, which makes the
    network invertible layer by layer. The other arguments go to every `CSCConv2d`.

    Training it in a loop of your own takes one more line: `sdnet.attach(model, optimizer)`.
    """
    if name not in VARIANTS:
        raise ValueError(f"name is {name!r}; it must be one of {', '.join(VARIANTS)}.")
    if stem not in get_args(Stem):
        raise ValueError(f"stem is {stem!r}; it must be one of {', '.join(get_args(Stem))}.")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; it must be at least 1.")
    variant = VARIANTS[name]
    if not shortcut and not variant.csc_blocks:
        able = ", ".join(other for other, v in VARIANTS.items() if v.csc_blocks)
        raise ValueError(f"shortcut=False is for {able}; {name} needs its shortcuts.")
    if image_size is None:
        image_size = 224 if stem == "imagenet" else 32
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(size) < 1:
        raise ValueError(f"image_size is {image_size}; it must be at least 1.")

    options = coding_of(create_model, coding)
    lam, impl = checks.number("lam", lam), checks.choice("impl", impl, IMPLEMENTATIONS)
    csc = csc_convolution(options, lam, impl)
    return SDNet(
        blocks=variant.blocks,
        num_classes=num_classes,
        stem=stem,
        image_size=size,
        stem_convolution=csc if variant.csc_stem else plain_convolution,
        block_convolution=csc if variant.csc_blocks else plain_convolution,
        shortcut=shortcut,
    )


def plain_convolution(
    in_channels: int, out_channels: int, kernel_size: int, stride: int, input_size: Pair
) -> nn.Module:
    """A convolution without bias."""
    del input_size
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)


def csc_convolution(coding: Coding, lam: float, impl: str) -> Convolution:
    """A maker of CSC layers with the given options."""

    def make(in_channels: int, out_channels: int, kernel_size: int, stride: int, input_size: Pair) -> nn.Module:
        return CSCConv2d(
            in_channels, out_channels, kernel_size, stride, lam=lam, input_size=input_size, impl=impl, **vars(coding)
        )

    return make


def size_after(size: Pair, kernel_size: int, stride: int) -> Pair:
    """The grid after a layer with padding kernel_size // 2."""
    half = kernel_size // 2
    return codes_size(size, (kernel_size, kernel_size), (stride, stride), (half, half))


class StemBlock(nn.Module):
    """Convolution and batch norm; ReLU after a plain convolution; for ImageNet a reduction by two more."""

    def __init__(self, width: int, stem: Stem, convolution: Convolution, pool_with_csc: bool, size: Pair) -> None:
        super().__init__()
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv = convolution(3, width, kernel_size, stride, size)
        self.norm = nn.BatchNorm2d(width)
        self.rectify = not isinstance(self.conv, CSCConv2d)
        self.output_size = size_after(size, kernel_size, stride)
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.pool = convolution(width, width, 3, 2, self.output_size) if pool_with_csc else nn.MaxPool2d(3, 2, 1)
            self.output_size = size_after(self.output_size, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        return self.pool(F.relu(out) if self.rectify else out)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and, with a shortcut, the input added before a last ReLU."""

    def __init__(
        self, in_channels: int, channels: int, stride: int, convolution: Convolution, shortcut: bool, size: Pair
    ) -> None:
        super().__init__()
        self.output_size = size_after(size, 3, stride)
        self.conv1 = convolution(in_channels, channels, 3, stride, size)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = convolution(channels, channels, 3, 1, self.output_size)
        self.norm2 = nn.BatchNorm2d(channels)
        self.rectify = not isinstance(self.conv1, CSCConv2d)
        self.shortcut: nn.Module | None = None
        if shortcut and (stride != 1 or in_channels != channels):
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        elif shortcut:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm1(self.conv1(x))
        out = self.norm2(self.conv2(F.relu(out) if self.rectify else out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))


class SDNet(nn.Module):
    """Stem, four stages of basic blocks, global average, linear classifier: [N, 3, H, W] -> logits [N, num_classes]."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        stem: Stem,
        image_size: Pair,
        stem_convolution: Convolution,
        block_convolution: Convolution,
        shortcut: bool,
    ) -> None:
        super().__init__()
        pool_with_csc = block_convolution is not plain_convolution
        self.stem = StemBlock(WIDTHS[0], stem, stem_convolution, pool_with_csc, image_size)
        size, channels = self.stem.output_size, WIDTHS[0]
        stages: list[nn.Module] = []
        for stage, (width, depth) in enumerate(zip(WIDTHS, blocks, strict=True)):
            stage_blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(channels, width, stride, block_convolution, shortcut, size)
                size, channels = block.output_size, width
                stage_blocks.append(block)
            stages.append(nn.Sequential(*stage_blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, num_classes)
        # DDP broadcasts buffers at every forward. The power vectors start equal and stay so on equal weights.
        self._ddp_params_and_buffers_to_ignore = [
            f"{name}.power_vector" for name, module in self.named_modules() if isinstance(module, CSCConv2d)
        ]

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"x has shape {list(x.shape)}; it must be [N, 3, H, W].")
        out = self.stages(self.stem(x))
        return self.linear(out.mean(dim=(2, 3)))
