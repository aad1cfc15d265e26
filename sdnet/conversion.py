"""`convert`: CSC layers in the place of the convolutions of any model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from sdnet.examples import Example, checked_example, run_example
from sdnet.kernels import checks
from sdnet.kernels.arguments import DTYPES
from sdnet.kernels.coding import coding_of, takes_coding
from sdnet.kernels.reference import Pair
from sdnet.layers import CSCConv2d
from sdnet.state import LearnLam, persistent_state

Filter = Callable[[nn.Module, str], bool]
"""(convolution, its name in the model) -> whether to convert it."""


class ConvertedConv2d(CSCConv2d):
    """A CSC layer that took the place of a convolution: its codes plus the bias of the convolution, if it had one.

    Attributes:
        bias: the bias, [K], a parameter; None without one. It is added to the codes, so the output is no longer sparse.
    """

    bias: nn.Parameter | None
    groups, dilation, padding_mode = 1, (1, 1), "zeros"  # as code that was written for convolutions may ask

    def forward(self, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        """Compute the codes of x plus the bias, see `CSCConv2d.forward`."""
        codes = super().forward(x, lam)
        return codes if self.bias is None or isinstance(x, Proxy) else codes + self.bias.to(codes.dtype).view(-1, 1, 1)

    def extra_repr(self) -> str:
        """Return the options, for `repr`."""
        return f"{super().extra_repr()}, bias={self.bias is not None}"


@dataclass(frozen=True)
class Conversion:
    """What `convert` did. `print` shows it as a table.

    Attributes:
        converted: the CSC layers by name, each with a description.
        left: the convolutions that were left alone by name, each with the reason.
    """

    converted: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        """Return a line for each convolution of the model."""
        lines = [f"{len(self.converted)} convolutions converted, {len(self.left)} left alone"]
        names = [*self.converted, *self.left]
        width = max((len(name) for name in names), default=0)
        lines += [f"  {name:{width}}  {text}" for name, text in self.converted.items()]
        lines += [f"  {name:{width}}  left alone: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


@takes_coding
def convert(
    model: nn.Module,
    example: Example,
    filter_fn: Filter | None = None,
    *,
    lam: float = 0.1,
    adaptive_lam: bool = False,
    learn_lam: LearnLam = "no",
    impl: str = "auto",
    **coding: Any,
) -> Conversion:
    """Replace convolutions of a model by CSC layers, in place.

    A filter of a convolution becomes an atom: it is scaled to unit norm, and the step size is estimated for the input
    size that the example leads to. A bias is kept as a parameter that is added to the codes. With `n_dict` above 1 the
    shapes differ and the atoms are initialised anew. Codes are not linear in the input, so a converted network has to
    be trained: make the optimizer afterwards, and call `sdnet.attach(model, optimizer)`.

    Args:
        model: the model. It is called once with the example, in evaluation mode.
        example: a batch that the model takes, a tuple of its positional or a dict of its keyword arguments.
        filter_fn: filter_fn(convolution, name) says whether to convert a convolution; None converts all that it can.
        lam: lambda of every new layer, see `CSCConv2d`.
        adaptive_lam: see `CSCConv2d`.
        learn_lam: see `CSCConv2d`.
        impl: see `CSCConv2d`.
        **coding: the fields of `sdnet.kernels.coding.Coding`: n_steps, mu, nonnegative, solver, data_term, n_dict.

    Returns:
        The report: what was converted, and what was left alone and why. Convolutions with groups, dilation or another
        padding than zeros, transposed ones, those of one or three dimensions, subclasses with a forward of their own,
        and those that the example does not reach are left alone.

    Raises:
        ValueError: an argument has a wrong type or value. The model is unchanged.
        TypeError: there is no such argument.

    Example:
        >>> model = torchvision.models.vgg11(weights=None)
        >>> print(sdnet.convert(model, torch.randn(1, 3, 224, 224), lam=0.05))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> sdnet.attach(model, optimizer)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is {checks.shown(model)}; it must be an nn.Module.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "model is a torch.jit.ScriptModule, whose layers are fixed; convert it before torch.jit.script."
        )
    checked_example("example", example)
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(f"filter_fn is {checks.shown(filter_fn)}; it must be a function of a module and its name.")
    options = {"lam": lam, "adaptive_lam": adaptive_lam, "learn_lam": learn_lam, "impl": impl}
    options |= vars(coding_of(convert, coding))
    CSCConv2d(1, 1, 1, device="meta", **options)  # refuses bad options before any work
    inputs = _inputs(model, example)
    converted: dict[str, str] = {}
    left: dict[str, str] = {}
    layers: dict[nn.Module, ConvertedConv2d] = {}
    for name, module in _convolutions(model):
        chosen = filter_fn is None or filter_fn(module, name)
        reason = _obstacle(model, module, inputs) if chosen else "filter_fn leaves it out"
        if reason is not None or not isinstance(module, nn.Conv2d):
            left[name] = str(reason)
            continue
        layers[module] = _csc_layer(module, _largest(inputs[module]), options)
        converted[name] = _description(layers[module], module)
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if child is not None and child in layers:
                setattr(parent, child_name, layers[child])
    return Conversion(converted, left)


def _convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the convolutions of a model with their names."""
    for name, module in model.named_modules():
        if isinstance(module, _ConvNd):
            yield name, module


def _inputs(model: nn.Module, example: Example) -> dict[nn.Module, list[torch.Size | None]]:
    """Return the shapes of the inputs of every convolution in a forward of the example, None for one by keyword."""
    inputs: dict[nn.Module, list[torch.Size | None]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs.setdefault(module, []).append(None if kwargs else args[0].shape)

    handles = [
        module.register_forward_pre_hook(note, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    try:
        run_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def _largest(shapes: list[torch.Size | None]) -> Pair:
    """Return the largest height and the largest width of several inputs [N, C, H, W], safe for all of them."""
    sizes = [shape for shape in shapes if shape is not None]
    return max(shape[2] for shape in sizes), max(shape[3] for shape in sizes)


def _obstacle(model: nn.Module, module: nn.Module, inputs: dict[nn.Module, list[torch.Size | None]]) -> str | None:
    """Return why a convolution cannot be converted, None if it can."""
    if not isinstance(module, nn.Conv2d):
        return f"it is a {type(module).__name__}, and CSC layers take the place of Conv2d"
    if module is model:
        return "it is the model itself; put it into an nn.Sequential to convert it"
    own = type(module)
    if own.forward is not nn.Conv2d.forward or own._conv_forward is not nn.Conv2d._conv_forward:
        return f"its class {own.__name__} has a forward of its own"
    if module.groups != 1:
        return f"it has {module.groups} groups, and every atom spans all input channels"
    if module.dilation != (1, 1):
        return f"its dilation is {module.dilation}, and atoms are dense"
    if module.padding_mode != "zeros":
        return f"its padding mode is {module.padding_mode}, and a CSC layer pads with zeros"
    if _padding(module) is None:
        return f"padding 'same' for a kernel of {module.kernel_size} is not symmetric"
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is computed from other parameters"
    if module.weight.dtype not in DTYPES:
        return f"its weight is {module.weight.dtype}"
    holders = [other for other, weight in model.named_parameters(remove_duplicate=False) if weight is module.weight]
    if len({id(model.get_submodule(holder.rpartition(".")[0])) for holder in holders}) > 1:
        return f"its weight is shared by {', '.join(holders)}"
    if _has_hooks(module):
        return "it has hooks, which a new layer would not have"
    if module not in inputs:
        return "the example does not reach it"
    if None in inputs[module]:
        return "the model passes its input by keyword, and a CSC layer takes it by position"
    if any(shape is not None and len(shape) != 4 for shape in inputs[module]):
        return "its input has no batch dimension"
    if not module.weight.is_meta and not bool(module.weight.isfinite().all()):
        return "its weight holds NaN or infinite values"
    return None


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks are registered on a module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _padding(module: nn.Conv2d) -> Pair | None:
    """Return the padding of a convolution in numbers, None if it differs between the two sides."""
    if module.padding == "valid":
        return 0, 0
    if module.padding == "same":
        (height, width), odd = module.kernel_size, all(k % 2 for k in module.kernel_size)
        return (height // 2, width // 2) if odd else None
    vertical, horizontal = module.padding
    assert isinstance(vertical, int)
    assert isinstance(horizontal, int)
    return vertical, horizontal


@persistent_state()
def _csc_layer(module: nn.Conv2d, size: Pair, options: dict[str, Any]) -> ConvertedConv2d:
    """Return the layer that takes the place of a convolution."""
    weight = module.weight
    layer = ConvertedConv2d(
        module.in_channels,
        module.out_channels,
        module.kernel_size,  # pyright: ignore[reportArgumentType]
        module.stride,  # pyright: ignore[reportArgumentType]
        _padding(module),
        input_size=size,
        device="meta" if options["n_dict"] == 1 else weight.device,
        dtype=weight.dtype,
        **options,
    )
    if options["n_dict"] == 1:
        layer.to_empty(device=weight.device)
        layer.weight.data = weight.detach().clone()
        if not weight.is_meta:
            layer.estimate_first_step_size()
    layer.weight.requires_grad_(weight.requires_grad)
    layer.register_parameter("bias", module._parameters["bias"])
    return layer.train(module.training)


def _description(layer: ConvertedConv2d, module: nn.Conv2d) -> str:
    """Return one line about a new layer."""
    (height, width), stride = layer.kernel_size, "x".join(map(str, sorted(set(layer.stride))))
    kept = "weights kept" if layer.coding.n_dict == 1 else f"new weights, for n_dict = {layer.coding.n_dict}"
    bias = "" if module.bias is None else ", bias added to the codes"
    dead = int((layer.weight.detach().flatten(1) == 0).all(1).sum()) if not layer.weight.is_meta else 0
    zeros = f", {dead} atoms of zeros" if dead else ""
    shape = f"{layer.in_channels} -> {layer.out_channels}, {height}x{width}, stride {stride}"
    return f"{shape}: {kept}{bias}{zeros}"
