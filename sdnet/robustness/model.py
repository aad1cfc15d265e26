"""`RobustModel`: a network whose first lambda is chosen by a rule, for every image or batch."""

import copy
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdnet.kernels import checks
from sdnet.layers import CSCConv2d
from sdnet.models import SDNet
from sdnet.robustness.rules import Rule
from sdnet.step_size import csc_layers


class RobustModel(nn.Module):
    """Wrap a network so that a rule chooses lambda of its first CSC layer at every forward.

    The weights are shared with the network, which stays as it is, and a forward changes no state. It works under
    `torch.no_grad` and `torch.compile`, for batches of any size. Per-sample rules compile into one graph, and gradients
    flow through them to the images; `UnlabelledRule` runs outside the graph, and no gradient flows through it.

    Args:
        model: an `SDNet`, compiled or not.
        rule: how lambda is chosen: a `Rule`, a number of at least 0 for every image, or None for the training lambda.
        batch_statistics: normalise by mean and variance of the batch in place of the running statistics in all batch
            norms, see `with_batch_statistics`. The logits of an image then depend on the other images of the batch.

    Shape:
        - Input: [N, C, H, W], images as `model` takes them, so normalised.
        - Output: [N, num_classes], the logits.

    Raises:
        ValueError: `model` is no `SDNet`, its stem has no CSC layer for a rule, or it has no batch norm for
            `batch_statistics`.

    Example:
        >>> robust = sdnet.robustness.RobustModel(model, sdnet.robustness.NoiseRule(k=1.5))
        >>> logits = robust(images)
    """

    def __init__(self, model: nn.Module, rule: Rule | float | None, *, batch_statistics: bool = False) -> None:
        super().__init__()
        if not isinstance(getattr(model, "_orig_mod", model), SDNet):
            raise ValueError(f"model is of type {type(model).__name__}; it must be an sdnet.SDNet.")
        if rule is not None and not csc_layers(model):
            raise ValueError("model has no CSC layers, so a rule has no lambda to choose; rule must be None.")
        if rule is not None and not isinstance(rule, Rule):
            rule = checks.number("rule", rule, ", a Rule or None")
        if rule is not None:
            first_layer(model)
        self.model = with_batch_statistics(model) if checks.flag("batch_statistics", batch_statistics) else model
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of images with the lambda that the rule chooses.

        Args:
            x: the images, [N, C, H, W].

        Returns:
            The logits, [N, num_classes].

        Raises:
            ValueError: `x` is not such a tensor.
        """
        return self.model(x) if self.rule is None else self.model(x, lam=self.lam_of(x))

    def lam_of(self, x: Tensor) -> float | Tensor:
        """Return the lambda that the rule chooses for images, see `Rule.forward`.

        Args:
            x: the images, [N, C, H, W].

        Raises:
            ValueError: `x` is not such a tensor.
        """
        layer = first_layer(self.model)
        if not isinstance(x, Tensor) or x.ndim != 4 or x.shape[1] != layer.in_channels:
            raise ValueError(f"x is {checks.shown(x)}; it must be a tensor [N, {layer.in_channels}, H, W].")
        if isinstance(self.rule, Rule):
            return self.rule(layer, x)
        return layer.lam if self.rule is None else self.rule


def first_layer(model: nn.Module) -> CSCConv2d:
    """Return the CSC layer in the stem of an `SDNet`, compiled or not.

    Raises:
        ValueError: the stem of the model has no CSC layer.
    """
    network = getattr(model, "_orig_mod", model)
    layer = network.stem.conv if isinstance(network, SDNet) else None
    if not isinstance(layer, CSCConv2d):
        raise ValueError("model has no CSC layer in its stem; it must be an SDNet with CSC layers.")
    return layer


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """Return a copy of a network whose batch norms use mean and variance of every batch, in evaluation mode too.

    Parameters and the other buffers are shared with `model`, which stays as it is; lambda, which is neither, is copied.
    A batch of one image is normalised by the statistics over its pixels, of which there must be two at least in every
    batch norm.

    Args:
        model: a network with batch norms.

    Raises:
        ValueError: `model` has no batch norm.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    with torch.no_grad():
        copied = copy.deepcopy(model, shared)
    norms = [module for module in copied.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ValueError("model has no batch norm, so there are no statistics to take from the batch.")
    for norm in norms:
        norm.track_running_stats = False
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    return copied
