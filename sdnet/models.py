"""The networks: SDNet-18 and SDNet-34, their `_all` variants, and ResNet-18 and ResNet-34 for comparison.

All are residual networks of basic blocks that differ in the layers that stand for their convolutions:

| name            | stem                     | 3x3 convolutions of the blocks |
|-----------------|--------------------------|--------------------------------|
| resnet18, 34    | Conv2d, BN, ReLU         | Conv2d                         |
| sdnet18, 34     | CSCConv2d, BN            | Conv2d                         |
| sdnet18_all ... | CSCConv2d, BN            | CSCConv2d                      |

BN is batch normalisation. The ImageNet stem is 7x7 with stride 2, followed by a 3x3 max-pool with stride 2; the `_all`
variants have a 3x3 CSC layer with stride 2 in place of the max-pool. The CIFAR stem is 3x3 with stride 1. No ReLU
follows a CSC layer, because its codes are sparse already.
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
from sdnet.state import LearnLam

Stem = Literal["imagenet", "cifar"]
Convolution = Callable[..., nn.Module]
"""(in_channels, out_channels, kernel_size, stride, input_size) -> a layer with padding kernel_size // 2."""

WIDTH = 64
"""Channels of the stem and the first stage; each later stage has twice as many as the one before."""


class Variant(NamedTuple):
    """The number of blocks of each stage, and which convolutions are CSC layers."""

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
    """Return the names of the models that `create_model` builds."""
    return list(VARIANTS)


@takes_coding
def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    stem: Stem = "imagenet",
    width: int = WIDTH,
    image_size: int | Pair | None = None,
    shortcut: bool = True,
    lam: float = 0.1,
    learn_lam: LearnLam = "no",
    impl: str = "auto",
    **coding: Any,
) -> "SDNet":
    """Build a network with random weights that classifies images.

    To train it in a loop of your own, call `sdnet.attach(model, optimizer)` once.

    Args:
        name: one of `list_models()`.
        num_classes: the number of classes.
        stem: "imagenet" (7x7 with stride 2, then a reduction by 2) or "cifar" (3x3 with stride 1).
        width: the channels of the stem and the first stage; the later stages have 2, 4 and 8 times as many. 64 is that
            of the published networks.
        image_size: the height and width of the images on which the step sizes are estimated, an int or a pair. None
            is 224 for the ImageNet stem and 32 for the CIFAR stem. The network takes images of other sizes too.
        shortcut: whether the blocks have residual connections. False is allowed for the `_all` models only: their
            layers can then be inverted one by one.
        lam: lambda of every CSC layer, see `CSCConv2d`.
        learn_lam: "no", or "layer" or "atom" to learn lambda of every CSC layer, see `CSCConv2d`.
        impl: the implementation of every CSC layer, see `sdnet.kernels.csc_encode`.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - Input of the network: [N, 3, H, W].
        - Output of the network: [N, num_classes], the logits.

    Returns:
        The network.

    Raises:
        ValueError: an argument has a wrong type or value.
        TypeError: there is no such argument.

    Example:
        >>> model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar")
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    variant = VARIANTS[checks.choice("name", name, tuple(VARIANTS))]
    num_classes = checks.integer("num_classes", num_classes, 1)
    width = checks.integer("width", width, 1)
    checks.choice("stem", stem, get_args(Stem))
    if not checks.flag("shortcut", shortcut) and not variant.csc_blocks:
        able = ", ".join(other for other, v in VARIANTS.items() if v.csc_blocks)
        raise ValueError(f"shortcut=False is for {able}; {name} needs its shortcuts.")
    if image_size is None:
        image_size = 224 if stem == "imagenet" else 32
    image_size = checks.pair("image_size", image_size, 1)

    options = coding_of(create_model, coding)
    lam, impl = checks.number("lam", lam), checks.choice("impl", impl, IMPLEMENTATIONS)
    checks.choice("learn_lam", learn_lam, get_args(LearnLam))
    csc = csc_convolution(options, lam=lam, learn_lam=learn_lam, impl=impl)
    network = SDNet(
        blocks=variant.blocks,
        num_classes=num_classes,
        stem=stem,
        width=width,
        image_size=image_size,
        stem_convolution=csc if variant.csc_stem else plain_convolution,
        block_convolution=csc if variant.csc_blocks else plain_convolution,
        shortcut=shortcut,
    )
    network.config = {
        "name": name,
        "num_classes": num_classes,
        "stem": stem,
        "width": width,
        "image_size": list(image_size),
        "shortcut": shortcut,
        "lam": lam,
        "learn_lam": learn_lam,
        **vars(options),
    }
    return network


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
        width: the number of output channels.
        stem: "imagenet" or "cifar".
        convolution: builds the convolution.
        pool_with_csc: whether `convolution` builds the layer of the last reduction too, in place of a max-pool.
        image_size: the height and width of the images.

    Shape:
        - Input: [N, 3, H, W].
        - Output: [N, width, h, w], of `output_size` for images of `image_size`.
    """

    def __init__(self, width: int, stem: Stem, convolution: Convolution, pool_with_csc: bool, image_size: Pair) -> None:
        super().__init__()
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv = convolution(3, width, kernel_size, stride, image_size)
        self.norm = nn.BatchNorm2d(width)
        self.rectify = not isinstance(self.conv, CSCConv2d)
        self.output_size = size_after(image_size, kernel_size, stride)
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.pool = convolution(width, width, 3, 2, self.output_size) if pool_with_csc else nn.MaxPool2d(3, 2, 1)
            self.output_size = size_after(self.output_size, 3, 2)

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the features of images; `lam` replaces lambda of a CSC layer in this call."""
        out = self.norm(self.conv(x) if lam is None else self.conv(x, lam))
        return self.pool(F.relu(out) if self.rectify else out)


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
        self.output_size = size_after(input_size, 3, stride)
        self.conv1 = convolution(in_channels, channels, 3, stride, input_size)
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
        """Compute the output of the block."""
        out = self.norm1(self.conv1(x))
        out = self.norm2(self.conv2(F.relu(out) if self.rectify else out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))


class SDNet(nn.Module):
    """Stem, four stages of basic blocks, global average pooling and a linear classifier. `create_model` builds it.

    Args:
        blocks: the number of blocks of each stage.
        num_classes: the number of classes.
        stem: "imagenet" or "cifar".
        width: the channels of the stem and the first stage; the later stages have 2, 4 and 8 times as many.
        image_size: the height and width of the images on which the step sizes are estimated.
        stem_convolution: builds the convolution of the stem.
        block_convolution: builds the 3x3 convolutions of the blocks.
        shortcut: whether the blocks have residual connections.

    Shape:
        - Input: [N, 3, H, W].
        - Output: [N, num_classes], the logits.

    Attributes:
        config: the arguments of `create_model` that build this network again, `impl` left out; JSON can store them.
        class_names: the names of the classes, empty if they are not known; `sdnet.load_model` sets them.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int,
        stem: Stem,
        width: int,
        image_size: Pair,
        stem_convolution: Convolution,
        block_convolution: Convolution,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.class_names: tuple[str, ...] = ()
        pool_with_csc = block_convolution is not plain_convolution
        self.stem = StemBlock(width, stem, stem_convolution, pool_with_csc, image_size)
        size, channels = self.stem.output_size, width
        stages: list[nn.Module] = []
        for stage, depth in enumerate(blocks):
            stage_width = width * 2**stage
            stage_blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                block = BasicBlock(channels, stage_width, stride, block_convolution, shortcut, size)
                size, channels = block.output_size, stage_width
                stage_blocks.append(block)
            stages.append(nn.Sequential(*stage_blocks))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the logits of images.

        Args:
            x: the images, [N, 3, H, W].
            lam: lambda of the CSC layer in the stem for this call, as `CSCConv2d.forward` takes it; None is its own.

        Returns:
            The logits, [N, num_classes].

        Raises:
            ValueError: `x` is not such a tensor, or `lam` is given and the stem has no CSC layer.
        """
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != 3:
            raise ValueError(f"x is {checks.shown(x)}; it must be a tensor [N, 3, H, W].")
        if lam is not None and not isinstance(self.stem.conv, CSCConv2d):
            raise ValueError("lam was given, but the stem of this network has no CSC layer; it must be None.")
        out = self.stages(self.stem(x, lam))
        return self.linear(out.mean(dim=(2, 3)))
