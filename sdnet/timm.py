"""SDNets in timm: after `import sdnet.timm`, `timm.create_model("sdnet18")` builds them as it builds its own models.

`python -m sdnet.timm train.py ...` runs timm's training script, or another program that takes its optimizer from
`timm.optim.create_optimizer_v2`, with `sdnet.attach` in place.

Example:
    >>> import sdnet.timm, timm
    >>> model = timm.create_model("sdnet18", num_classes=10, in_chans=1, lam=0.05)
    >>> maps = timm.create_model("sdnet18_all", features_only=True)(torch.randn(1, 3, 224, 224))
"""

import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import timm
import timm.optim
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

import sdnet
from sdnet.blocks import BasicBlock, Bottleneck
from sdnet.kernels import checks
from sdnet.models import VARIANTS, SDNet
from sdnet.step_size import csc_layers

NAMES = tuple(name for name, variant in VARIANTS.items() if variant.csc_stem)
"""The registered names. timm has a resnet18, resnet34 and resnet50 of its own."""

POOLS = ("avg", "")


class TimmSDNet(SDNet):
    """An SDNet with the methods that timm expects of a model.

    Args:
        network: a network of `sdnet.create_model`, whose modules become part of this one.
        global_pool: "avg", or "" for feature maps in place of pooled features, which needs `num_classes=0`.
        drop_rate: the probability of dropout before the classifier.

    Shape:
        - Input: [N, in_chans, H, W].
        - Output: [N, num_classes]; without a classifier [N, num_features], and without pooling [N, num_features, h, w].
    """

    def __init__(self, network: SDNet, global_pool: str = "avg", drop_rate: float = 0.0) -> None:
        nn.Module.__init__(self)
        self.config, self.class_names = network.config, network.class_names
        self.stem, self.stages, self.linear = network.stem, network.stages, network.linear
        self.num_classes, self.in_channels = network.num_classes, network.in_channels
        self.num_features = self.head_hidden_size = network.num_features
        self.in_chans, self.grad_checkpointing = network.in_channels, False
        self.drop_rate = checks.number("drop_rate", drop_rate)
        if self.drop_rate > 1:
            raise ValueError(f"drop_rate is {drop_rate}; it must be a number of 0 to 1.")
        self.global_pool = checked_pool(global_pool, self.num_classes)
        width, first, later = self.stem.norm.num_features, *((2, 4) if network.config["stem"] == "imagenet" else (1, 1))
        self.feature_info = [{"num_chs": width, "reduction": first, "module": "stem.norm"}]
        for index, stage in enumerate(self.stages.children()):
            channels = [block.out_channels for block in stage.children() if isinstance(block, (BasicBlock, Bottleneck))]
            info = {"num_chs": channels[-1], "reduction": later * 2**index, "module": f"stages.{index}"}
            self.feature_info.append(info)

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the logits of images, see `SDNet.forward`."""
        return self.forward_head(self.forward_features(x, lam))

    def forward_features(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the feature maps of the last stage.

        Args:
            x: the images.
            lam: lambda of the first CSC layer for this call, see `SDNet.forward`.

        Shape:
            - x: [N, in_chans, H, W].
            - Output: [N, num_features, h, w].
        """
        self.check_input(x, lam)
        out = self.stem(x, lam)
        for stage in self.stages:
            out = self._stage(stage, out)
        return out

    def _stage(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute the logits, or with `pre_logits` the pooled features, from feature maps.

        Args:
            x: the feature maps of `forward_features`.
            pre_logits: whether to leave out the classifier.

        Shape:
            - x: [N, num_features, h, w].
            - Output: [N, num_classes], or [N, num_features] with `pre_logits`.
        """
        if self.global_pool:
            x = x.mean(dim=(2, 3))
        x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.linear(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Compute feature maps of several depths: 0 is the stem before its last reduction, 1 to 4 the stages.

        Args:
            x: the images, [N, in_chans, H, W].
            indices: the last n depths for an int, the listed depths, or None for all.
            norm: has no effect: there is no last norm.
            stop_early: whether to stop after the last listed depth.
            output_fmt: "NCHW".
            intermediates_only: whether to return the maps of the depths alone.

        Returns:
            The list of maps; without `intermediates_only`, before it the maps of the last stage.
        """
        checks.choice("output_fmt", output_fmt, ("NCHW",))
        del norm
        self.check_input(x, None)
        taken, last = feature_take_indices(1 + len(self.stages), indices)
        out = self.stem.before_pool(x)
        maps = [out] if 0 in taken else []
        out = self.stem.pool(out)
        for depth, stage in enumerate(self.stages, start=1):
            if stop_early and depth > last:
                break
            out = self._stage(stage, out)
            if depth in taken:
                maps.append(out)
        return maps if intermediates_only else (out, maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the listed depths do not need, in place, and return their indices.

        Args:
            indices: the depths, see `forward_intermediates`.
            prune_norm: has no effect: there is no last norm.
            prune_head: whether to remove the classifier too.
        """
        del prune_norm
        taken, last = feature_take_indices(1 + len(self.stages), indices)
        for depth, name in enumerate(list(self.stages._modules), start=1):
            if depth > last:
                setattr(self.stages, name, nn.Sequential())
        if last == 0:
            self.stem.pool = nn.Identity()
        if last < len(self.stages):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < len(self.stages):
            self.reset_classifier(0, "")
        return taken

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by one of other classes, with random weights.

        Args:
            num_classes: the number of classes; 0 for no classifier.
            global_pool: see `TimmSDNet`. None keeps the pooling, or takes "avg" if there is none and a classifier
                needs it.
        """
        num_classes = checks.integer("num_classes", num_classes, 0)
        kept = "avg" if num_classes and not self.global_pool else self.global_pool
        self.global_pool = checked_pool(kept if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.config, self.class_names = {**self.config, "num_classes": num_classes}, ()
        like = self.stem.norm.weight
        self.linear = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes
            else nn.Identity()
        ).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switch gradient checkpointing on or off: the backward pass then computes the blocks again, to save memory."""
        self.grad_checkpointing = checks.flag("enable", enable)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return patterns of the names of parameters that belong together, for rates by depth."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that no weight decay should act on: atoms and learned lambdas.

        Atoms are scaled back to unit norm after every step, and lambda would decay towards softplus(0).
        """
        parameters = [f"{name}.{kind}" for name in csc_layers(self) for kind in ("weight", "raw_lam")]
        return set(parameters) & {name for name, _ in self.named_parameters()}


def checked_pool(global_pool: str, num_classes: int) -> str:
    """Return `global_pool` if it is a pooling that a network of so many classes can have.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(global_pool, str) or global_pool not in POOLS:
        raise ValueError(f"global_pool is {checks.shown(global_pool)}; it must be 'avg', or '' with num_classes=0.")
    if not global_pool and num_classes:
        raise ValueError(f"global_pool is '', which needs num_classes=0; num_classes is {num_classes}.")
    return global_pool


def make(
    name: str,
    num_classes: int = 1000,
    in_chans: int = 3,
    img_size: int | tuple[int, int] | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> TimmSDNet:
    """Build a network from timm's names of arguments.

    Args:
        name: one of `NAMES`.
        num_classes: the number of classes; 0 for no classifier.
        in_chans: the number of channels of the images.
        img_size: the height and width of the images on which the step sizes are estimated; None is 224, or 32
            with `stem="cifar"`.
        global_pool: see `TimmSDNet`.
        drop_rate: see `TimmSDNet`.
        device: the device of the network; None is the default device of torch.
        dtype: the floating-point type of the parameters; None is the default type of torch.
        **options: the other arguments of `sdnet.create_model`, such as `lam`.

    Returns:
        The network.

    Raises:
        ValueError: an argument has a wrong type or value.
        TypeError: there is no such argument.
    """
    with nullcontext() if device is None else torch.device(device):
        network = sdnet.create_model(name, num_classes, in_channels=in_chans, image_size=img_size, **options)
    return TimmSDNet(network, global_pool, drop_rate).to(dtype=dtype)


def _config(url: str = "") -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.conv",
        "classifier": "linear",
        "license": "mit",
    }


default_cfgs = generate_default_cfgs({f"{name}.untrained": _config() for name in NAMES})


def _register(name: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        feature_cfg = {"out_indices": (0, 1, 2, 3, 4), "feature_cls": "getter"}
        return build_model_with_cfg(make, name, pretrained, feature_cfg=feature_cfg, name=name, **options)

    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = __name__, f"Build {name}, see `sdnet.create_model`."
    globals()[name] = register_model(build)


__all__ = ["TimmSDNet", "make", "run"]  # register_model adds the names of the networks
if __name__ != "__main__":  # as a program the module imports itself, which registers the names
    for _name in NAMES:
        _register(_name)


def run(program: list[str]) -> None:
    """Run a program that takes its optimizer from `timm.optim.create_optimizer_v2`, with `sdnet.attach` in place.

    Args:
        program: the file of the program, and its arguments.

    Raises:
        SystemExit: there is no such program.
    """
    if not program:
        raise SystemExit("Usage: python -m sdnet.timm train.py [ARGUMENTS of timm's train.py]")
    if program[0] in ("-h", "--help"):
        print("Usage: python -m sdnet.timm train.py [ARGUMENTS of timm's train.py]")
        return
    optimizers: Any = timm.optim
    create = optimizers.create_optimizer_v2

    def create_attached(model: nn.Module, *args: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = create(model, *args, **options)
        if csc_layers(model):
            sdnet.attach(model, optimizer)
        return optimizer

    if not Path(program[0]).exists():
        raise SystemExit(f"There is no program '{program[0]}'.")
    argv, sys.argv = sys.argv, program
    optimizers.create_optimizer_v2 = create_attached
    try:
        runpy.run_path(program[0], run_name="__main__")
    finally:
        optimizers.create_optimizer_v2, sys.argv = create, argv


if __name__ == "__main__":
    import sdnet.timm as registered

    registered.run(sys.argv[1:])
