"""`attach`: an optimizer hook that keeps atoms at unit norm and step sizes safe while a network learns."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sdnet.kernels import checks
from sdnet.layers import CSCConv2d
from sdnet.step_size import csc_layers
from sdnet.stored_weight import is_sharded, refusal, stored_parameters, update_layers


class DictionaryHook:
    """The hook of `attach`: after every step of an optimizer it updates the CSC layers that this optimizer trains."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, iterations: int) -> None:
        self.model, self.iterations = model, iterations
        self.before = optimizer.register_step_pre_hook(self.check)
        self.after = optimizer.register_step_post_hook(self)

    def check(self, optimizer: Optimizer, *_: Any) -> None:
        """Refuse a layer that was changed or added since `attach`, before the optimizer takes its step."""
        trained = trained_layers(self.model, optimizer)
        if not trained and not holds_dictionaries(self.model, optimizer):
            raise ValueError(
                "optimizer holds none of the dictionaries of model any more; make it, and call attach, after whatever "
                "replaces parameters, such as fully_shard."
            )
        for name, layer in trained.items():
            if reason := refusal(name, layer):
                raise ValueError(reason)

    @torch.no_grad()
    def __call__(self, optimizer: Optimizer, *_: Any) -> None:
        """Project the atoms and re-estimate the step sizes."""
        layers = list(trained_layers(self.model, optimizer).values())
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None:
            update_layers(layers, self.iterations)
            return
        # A fused optimizer under a gradient scaler: its step() runs even if it is to be skipped, and what says so is on
        # the device. The update is undone there.
        tensors = [tensor for layer in layers for tensor in state_of(layer)]
        before = [tensor.clone() for tensor in tensors]
        update_layers(layers, self.iterations)
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(found_inf.to(tensor.device) > 0, old, tensor))


class Attachment(RemovableHandle):
    """What `attach` returns; `remove()` ends the updates. It can also be used in a `with` statement."""

    def __init__(self, hook: DictionaryHook) -> None:
        self._hook: DictionaryHook | None = hook

    def remove(self) -> None:
        """End the updates."""
        if self._hook is not None:
            self._hook.before.remove()
            self._hook.after.remove()

    def __getstate__(self) -> Any:
        """Return nothing: a copy or a pickle of the handle has no updates to end, because copies have no hook."""
        return {}

    def __setstate__(self, state: Any) -> None:
        """Make the handle of a copy."""
        self._hook = None


def attach(model: nn.Module, optimizer: Optimizer, iterations: int = 1) -> RemovableHandle:
    """Keep the CSC layers of a model up to date while an optimizer trains them.

    After every step of `optimizer`, the atoms of the layers that it trains are projected to unit norm, and their step
    sizes are re-estimated on the device, without a host sync. A step that a gradient scaler skips changes nothing. The
    estimate follows weights that move fast: with a learning rate of 0.1 from scratch, step size times largest
    eigenvalue stays near 0.9, and FISTA diverges only from 4/3 on, ISTA from 2 on (`sdnet.step_margins`).

    Call it once for a model and its optimizer, before or after Accelerate, DistributedDataParallel, `torch.compile` or
    `fully_shard` have wrapped them. Under torch.distributed call it in every process: the power vectors of rank 0 are
    sent to all, once.

    Which layers it updates is decided at every step: those whose dictionary is in a parameter group of `optimizer` and
    requires or has a gradient. Layers and parameter groups that are added later are therefore included; frozen layers,
    and those of other optimizers, are left alone. The dictionary may be sharded by `fully_shard`, pruned, or
    parametrized with a right inverse. A copy of the optimizer, by `copy.deepcopy` or `pickle`, has no hook: attach the
    copy.

    Args:
        model: a network with CSC layers.
        optimizer: the optimizer that trains it, also one prepared by Accelerate.
        iterations: how often the estimate is repeated after each step.

    Returns:
        A handle; its `remove()` ends the updates.

    Raises:
        ValueError: an argument has a wrong type or value, the model has no CSC layers or the optimizer none of their
            dictionaries, they are attached already, or a dictionary is stored where it cannot be projected.

    Example:
        >>> model = sdnet.create_model("sdnet18", num_classes=10, stem="cifar")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = sdnet.attach(model, optimizer)
    """
    iterations = checks.integer("iterations", iterations, 1)
    layers = csc_layers(model)
    if not layers:
        raise ValueError("model has no CSC layers; attach needs at least one.")
    optimizer = innermost_optimizer(optimizer)
    if not hasattr(optimizer, "_zero_grad_profile_name"):  # made without Optimizer.__init__, as timm's Lookahead
        optimizer._patch_step_function()  # without it, step() calls no hooks
    trained = trained_layers(model, optimizer)
    if not trained:
        if holds_dictionaries(model, optimizer):
            raise ValueError("The dictionaries of model that optimizer holds are frozen (requires_grad is False).")
        raise ValueError("optimizer holds none of the dictionaries of model; give it the parameters of the CSC layers.")
    for name, layer in trained.items():
        if reason := refusal(name, layer):
            raise ValueError(reason)
    for other in optimizer._optimizer_step_post_hooks.values():
        if isinstance(other, DictionaryHook) and not set(trained.values()).isdisjoint(csc_layers(other.model).values()):
            raise ValueError(
                "model and optimizer are attached already; attach them once, or remove() the first handle."
            )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for layer in layers.values():
            torch.distributed.broadcast(layer.power_vector, src=0)
    return Attachment(DictionaryHook(model, optimizer, iterations))


def innermost_optimizer(optimizer: Any) -> Optimizer:
    """Return the optimizer that a wrapper such as Accelerate's calls.

    Raises:
        ValueError: `optimizer` is no optimizer.
    """
    inner = optimizer
    while isinstance(inner, Optimizer) and not hasattr(inner, "_optimizer_step_post_hooks"):
        inner = getattr(inner, "optimizer", None)  # a wrapper that is an Optimizer by name only
    if not isinstance(inner, Optimizer):
        given = type(optimizer).__name__ if not isinstance(optimizer, (int, float, str)) else checks.shown(optimizer)
        raise ValueError(f"optimizer is {given}; it must be a torch.optim.Optimizer.")
    return inner


def held_by(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters in the groups of an optimizer."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def holds_dictionaries(model: nn.Module, optimizer: Optimizer) -> bool:
    """Return whether a dictionary of the model, frozen or not, is in a parameter group of the optimizer."""
    held = held_by(optimizer)
    return any(id(p) in held for layer in csc_layers(model).values() for p in stored_parameters(layer))


def trained_layers(model: nn.Module, optimizer: Optimizer) -> dict[str, CSCConv2d]:
    """Return the CSC layers whose dictionary an optimizer moves.

    It is in a parameter group and requires or has a gradient: optimizers move a frozen parameter that still has one.
    """
    held = held_by(optimizer)
    return {
        name: layer
        for name, layer in csc_layers(model).items()
        if any(
            id(parameter) in held and (parameter.requires_grad or parameter.grad is not None)
            for parameter in stored_parameters(layer)
        )
    }


def state_of(layer: CSCConv2d) -> list[Tensor]:
    """Return the tensors that an update of a layer changes."""
    stored: list[Any] = [parameter.detach() for parameter in stored_parameters(layer)]
    stored = [tensor.to_local() if is_sharded(tensor) else tensor for tensor in stored]
    return [*stored, layer.power_vector, layer.step_size]
