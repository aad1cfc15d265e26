"""Change lambda and the implementation of all CSC layers of a model."""

from typing import Literal, get_args

from torch import Tensor, nn

from sdnet.examples import Example, checked_example, run_example
from sdnet.kernels import checks
from sdnet.kernels.dispatch import IMPLEMENTATIONS
from sdnet.layers import CSCConv2d
from sdnet.models import SDNet
from sdnet.state import checked_lambda
from sdnet.step_size import csc_layers

Layers = Literal["all", "first"]


def set_lambda(
    model: nn.Module, lam: float | Tensor, layers: Layers = "all", *, example: Example | None = None
) -> None:
    """Set lambda of all CSC layers, or of the first one, from the next forward pass on.

    Lambda is not part of the state dict: set it again after `load_state_dict`. Files of `sdnet.save_model` contain it.

    Args:
        model: a network with CSC layers.
        lam: a number of at least 0, or a tensor of such numbers: 0-d, one per sample of the next batches, [N] or
            [N, 1, 1, 1], or one per atom, [1, K, 1, 1].
        layers: "all", or "first" for the CSC layer that is called first, which is the stem of an SDNet.
        example: for "first", a batch that the model takes, a tuple of its positional or a dict of its keyword
            arguments. The first layer is then found by one forward in evaluation mode. It is needed where the order of
            the calls does not follow from the model's structure, that is, for several CSC layers that are in neither
            an `SDNet` nor an `nn.Sequential`.

    Raises:
        ValueError: an argument has a wrong type or value, `model` has no CSC layers, or `example` is needed. No lambda
            has been changed.

    Example:
        >>> sdnet.set_lambda(model, 0.3)  # all layers
        >>> sdnet.set_lambda(model, torch.tensor([0.1, 0.4]), layers="first")  # one value for each of two images
    """
    found = _layers_of(model, "lambda")
    checks.choice("layers", layers, get_args(Layers))
    value, chosen = checked_lambda(lam), found if layers == "all" else [_first_layer(model, example)]
    for layer in chosen:
        layer.check_assignable(value)
    for layer in chosen:
        layer.lam = value


def check_lambda(model: nn.Module) -> None:
    """Check that lambda of every CSC layer is finite and at least 0.

    Assignments check it themselves, except for tensors on a GPU, where a check makes the host wait for the device.

    Args:
        model: a network with CSC layers.

    Raises:
        ValueError: lambda of a layer is negative or not finite; the message names the layer.
    """
    for name, layer in csc_layers(model).items():
        lam = layer.lam
        if lam.is_meta:
            raise ValueError(
                f"lam of {name or 'the layer'} is on the meta device and has no value; give the model memory first."
            )
        if not bool(((lam >= 0) & lam.isfinite()).all()):
            raise ValueError(
                f"lam of {name or 'the layer'} is {lam.flatten().tolist()}; it must be finite and at least 0."
            )


def set_impl(model: nn.Module, impl: str) -> None:
    """Choose the implementation that all CSC layers of a built model use, from the next forward pass on.

    Args:
        model: a network with CSC layers.
        impl: "auto", "torch", "reference" or "triton", see `sdnet.kernels.csc_encode`. "reference" is made of plain
            PyTorch operators, for ONNX export, `torch.func` and higher derivatives.

    Raises:
        ValueError: `impl` is not one of these, or `model` has no CSC layers.
    """
    found = _layers_of(model, "implementation")
    checks.choice("impl", impl, IMPLEMENTATIONS)
    for layer in found:
        layer.impl = impl


def _layers_of(model: nn.Module, setting: str) -> list[CSCConv2d]:
    """Return the CSC layers of `model`, of which there must be one at least."""
    found = list(csc_layers(model).values())
    if not found:
        raise ValueError(f"model has no CSC layers, so there is no {setting} to set.")
    return found


def _first_layer(model: nn.Module, example: Example | None) -> CSCConv2d:
    """Return the CSC layer that the data reach first."""
    if example is not None:
        return _first_called(model, example)
    first = _first_by_structure(model)
    if first is None:
        raise ValueError(
            'layers is "first", and the structure of this model does not say which of its CSC layers the data reach '
            "first; it needs an input of the model as example=."
        )
    return first


def _first_by_structure(module: nn.Module) -> CSCConv2d | None:
    """Return the first CSC layer in the order of the data, None if the structure of the modules does not define it."""
    if isinstance(module, CSCConv2d):
        return module
    children = [child for child in module.children() if csc_layers(child)]
    if isinstance(module, SDNet):
        return next(iter(csc_layers(module).values()))
    if len(children) == 1 or type(module).forward is nn.Sequential.forward:
        return _first_by_structure(children[0])
    return None


def _first_called(model: nn.Module, example: Example) -> CSCConv2d:
    """Return the CSC layer that is called first in a forward of `example`, in evaluation mode."""
    called: list[CSCConv2d] = []

    def note(module: nn.Module, _: tuple[Tensor, ...]) -> None:
        assert isinstance(module, CSCConv2d)
        called.append(module)

    example = checked_example("example", example)
    handles = [layer.register_forward_pre_hook(note) for layer in csc_layers(model).values()]
    try:
        run_example(model, example)
    finally:
        for handle in handles:
            handle.remove()
    if not called:
        raise ValueError("example did not reach any CSC layer of model.")
    return called[0]
