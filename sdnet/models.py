"""The networks: SDNet-18, 34 and 50, their `_all` variants, and ResNet-18, 34 and 50 for comparison.

All are residual networks that differ in the layers that stand for their convolutions. Those with 50 layers have
bottleneck blocks, whose 1x1 convolutions are always plain; the others have basic blocks:

| name            | stem                     | 3x3 convolutions of the blocks |
|-----------------|--------------------------|--------------------------------|
| resnet18 ...    | Conv2d, BN, ReLU         | Conv2d                         |
| sdnet18 ...     | CSCConv2d, BN            | Conv2d                         |
| sdnet18_all ... | CSCConv2d, BN            | CSCConv2d                      |

BN is batch normalisation. The ImageNet stem is 7x7 with stride 2, followed by a 3x3 max-pool with stride 2; the `_all`
variants have a 3x3 CSC layer with stride 2 in place of the max-pool. The CIFAR stem is 3x3 with stride 1.
`sdnet.blocks` has the blocks.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from os import PathLike
from typing import Any, NamedTuple, ParamSpec, get_args

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sdnet.blocks import BasicBlock, Bottleneck, Convolution, Stem, StemBlock, csc_convolution, plain_convolution
from sdnet.hub_methods import HubMethods
from sdnet.kernels import checks
from sdnet.kernels.coding import coding_of, takes_coding
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.kernels.reference import Pair
from sdnet.layers import CSCConv2d
from sdnet.state import LearnLam

P = ParamSpec("P")

WIDTH = 64
"""Channels of the stem and the first stage; each later stage has twice as many as the one before."""


class Variant(NamedTuple):
    """The number of blocks of each stage, which convolutions are CSC layers, and the kind of block."""

    blocks: tuple[int, int, int, int]
    csc_stem: bool
    csc_blocks: bool
    block: type[BasicBlock] | type[Bottleneck] = BasicBlock


VARIANTS = {
    "resnet18": Variant((2, 2, 2, 2), csc_stem=False, csc_blocks=False),
    "resnet34": Variant((3, 4, 6, 3), csc_stem=False, csc_blocks=False),
    "resnet50": Variant((3, 4, 6, 3), csc_stem=False, csc_blocks=False, block=Bottleneck),
    "sdnet18": Variant((2, 2, 2, 2), csc_stem=True, csc_blocks=False),
    "sdnet34": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=False),
    "sdnet50": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=False, block=Bottleneck),
    "sdnet18_all": Variant((2, 2, 2, 2), csc_stem=True, csc_blocks=True),
    "sdnet34_all": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=True),
    "sdnet50_all": Variant((3, 4, 6, 3), csc_stem=True, csc_blocks=True, block=Bottleneck),
}


def list_models() -> list[str]:
    """Return the names of the models that `create_model` builds, such as "sdnet18"."""
    return list(VARIANTS)


def takes_pretrained(build: Callable[P, "SDNet"]) -> Callable[P, "SDNet"]:
    """Let a function that builds networks take `pretrained`, with the arguments that were given beside it."""

    @wraps(build)
    def create(*args: P.args, **kwargs: P.kwargs) -> "SDNet":
        if kwargs.get("pretrained") is None:
            return build(*args, **kwargs)
        from sdnet.pretrained import load_pretrained

        with torch.device("meta"):
            build(*args, **kwargs)  # checks the arguments
        return load_pretrained(inspect.signature(build).bind(*args, **kwargs).arguments)

    return create


@takes_pretrained
@takes_coding
def create_model(
    name: str,
    num_classes: int = 1000,
    *,
    in_channels: int = 3,
    stem: Stem = "imagenet",
    width: int = WIDTH,
    image_size: int | Pair | None = None,
    shortcut: bool = True,
    lam: float = 0.1,
    learn_lam: LearnLam = "no",
    impl: str = "auto",
    pretrained: str | PathLike[str] | None = None,
    **coding: Any,
) -> "SDNet":
    """Build a network that classifies images, with random weights unless `pretrained` is given.

    To train it in a loop of your own, call `sdnet.attach(model, optimizer)` once.

    Args:
        name: one of `list_models()`.
        num_classes: the number of classes. With 0 the network has no classifier and returns the pooled features.
        in_channels: the number of channels of the images.
        stem: "imagenet" (7x7 with stride 2, then a reduction by 2) or "cifar" (3x3 with stride 1).
        width: the channels of the stem and the first stage; the later stages have 2, 4 and 8 times as many. 64 is that
            of the published networks.
        image_size: the height and width of the images on which the step sizes are estimated, an int or a pair. None
            is 224 for the ImageNet stem and 32 for the CIFAR stem. The network takes images of other sizes too.
        shortcut: whether the blocks have residual connections. False is allowed for the `_all` models of basic blocks
            only: their layers can then be inverted one by one, see `sdnet.invert`.
        lam: lambda of every CSC layer, see `CSCConv2d`.
        learn_lam: "no", or "layer" or "atom" to learn lambda of every CSC layer, see `CSCConv2d`.
        impl: the implementation of every CSC layer, see `sdnet.kernels.csc_encode`.
        pretrained: a weights file or its folder, or a name of `sdnet.list_pretrained()`. The network is then that of
            the file, in evaluation mode: `name` and `width` must be those of the file, as must other arguments that
            are given, even if they are the defaults; `lam`, `impl` and the options of the coding replace those of the
            file, and so does `learn_lam` where the file's lambda is not learned.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Shape:
        - Input of the network: [N, in_channels, H, W].
        - Output of the network: [N, num_classes], the logits; [N, num_features] for `num_classes=0`.

    Returns:
        The network.

    Raises:
        ValueError: an argument has a wrong type or value, or `pretrained` holds another network.
        FileNotFoundError: there is no such file or name as `pretrained`.
        TypeError: there is no such argument.

    Example:
        >>> model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar")
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    variant = VARIANTS[checks.choice("name", name, tuple(VARIANTS))]
    num_classes, in_channels = (
        checks.integer("num_classes", num_classes, 0),
        checks.integer("in_channels", in_channels, 1),
    )
    width = checks.integer("width", width, 1)
    checks.choice("stem", stem, get_args(Stem))
    able = [other for other, v in VARIANTS.items() if v.csc_blocks and v.block is BasicBlock]
    if not checks.flag("shortcut", shortcut) and name not in able:
        raise ValueError(f"shortcut=False is for {', '.join(able)}; {name} needs its shortcuts.")
    if image_size is None:
        image_size = 224 if stem == "imagenet" else 32
    image_size = checks.pair("image_size", image_size, 1)

    options = coding_of(create_model, coding)
    lam, impl = checks.number("lam", lam), checks.choice("impl", impl, IMPLEMENTATIONS)
    checks.choice("learn_lam", learn_lam, get_args(LearnLam))
    csc = csc_convolution(options, lam=lam, learn_lam=learn_lam, impl=impl)
    network = SDNet(
        blocks=variant.blocks,
        block=variant.block,
        num_classes=num_classes,
        in_channels=in_channels,
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
        "in_channels": in_channels,
        "stem": stem,
        "width": width,
        "image_size": list(image_size),
        "shortcut": shortcut,
        "lam": lam,
        "learn_lam": learn_lam,
        **vars(options),
    }
    return network


class SDNet(HubMethods, nn.Module):
    """Stem, four stages of blocks, global average pooling and a linear classifier. `create_model` builds it.

    Args:
        blocks: the number of blocks of each stage.
        block: the class of the blocks.
        num_classes: the number of classes; 0 for no classifier.
        in_channels: the number of channels of the images.
        stem: "imagenet" or "cifar".
        width: the channels of the stem and the first stage; the later stages have 2, 4 and 8 times as many.
        image_size: the height and width of the images on which the step sizes are estimated.
        stem_convolution: builds the convolution of the stem.
        block_convolution: builds the 3x3 convolutions of the blocks.
        shortcut: whether the blocks have residual connections.

    Shape:
        - Input: [N, in_channels, H, W].
        - Output: [N, num_classes], the logits; [N, num_features] without a classifier.

    Attributes:
        num_classes: the number of classes.
        in_channels: the number of channels of the images.
        num_features: the number of pooled features, which the classifier takes.
        config: the arguments of `create_model` that build this network again, `impl` left out; JSON can store them.
        class_names: the names of the classes, empty if they are not known; `sdnet.load_model` sets them.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        block: type[BasicBlock] | type[Bottleneck],
        num_classes: int,
        in_channels: int,
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
        self.num_classes, self.in_channels = num_classes, in_channels
        self.stem = StemBlock(in_channels, width, stem, stem_convolution, pool_with_csc, image_size)
        size, channels = self.stem.output_size, width
        stages: list[nn.Module] = []
        for stage, depth in enumerate(blocks):
            stage_width = width * 2**stage
            stage_blocks: list[nn.Module] = []
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                added = block(channels, stage_width, stride, block_convolution, shortcut, size)
                size, channels = added.output_size, added.out_channels
                stage_blocks.append(added)
            stages.append(nn.Sequential(*stage_blocks))
        self.stages = nn.Sequential(*stages)
        self.num_features = channels
        self.linear: nn.Module = nn.Linear(channels, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the logits of images.

        Args:
            x: the images, [N, in_channels, H, W].
            lam: lambda of the CSC layer in the stem for this call, as `CSCConv2d.forward` takes it; None is its own.

        Returns:
            The logits, [N, num_classes], or without a classifier the pooled features, [N, num_features].

        Raises:
            ValueError: `x` is not such a tensor, or `lam` is given and the stem has no CSC layer.
        """
        self.check_input(x, lam)
        out = self.stages(self.stem(x, lam))
        return self.linear(out.mean(dim=(2, 3)))

    def check_input(self, x: Any, lam: float | Tensor | None) -> None:
        """Raise a ValueError if x is no batch of images of this network, or lam is given and nothing takes it."""
        if not isinstance(x, Proxy) and (not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != self.in_channels):
            raise ValueError(f"x is {checks.shown(x)}; it must be a tensor [N, {self.in_channels}, H, W].")
        if lam is not None and not isinstance(self.stem.conv, CSCConv2d):
            raise ValueError("lam was given, but the stem of this network has no CSC layer; it must be None.")
