"""`csc_encode` among what surrounds it: changes in place, hooks on saved tensors, counters of operations."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import sdnet
from sdnet.kernels import csc_encode

IMPLEMENTATIONS = ("torch", "reference")


def leaves(n_dict: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight with atoms of unit norm, and lam, with gradients."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, n_dict * 3, 3, 3, dtype=torch.float64, generator=generator)
    weight /= weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    lam = torch.tensor(0.1, dtype=torch.float64)
    return tuple(tensor.to(dtype).requires_grad_() for tensor in (x, weight, lam))  # pyright: ignore[reportReturnType]


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "leaky relu": lambda codes: nn.functional.leaky_relu_(codes, 0.3),
    "multiplication": lambda codes: codes.mul_(3),
    "addition": lambda codes: codes.add_(1).square(),
    "zeros": lambda codes: codes.masked_fill_(codes > 0.2, 0.0),
    "two changes": lambda codes: torch.relu_(codes.sub_(0.05)),
}


@pytest.mark.parametrize("keep_residuals", [True, False])
@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_codes_may_be_changed_in_place(change: str, nonnegative: bool, keep_residuals: bool) -> None:
    found = []
    for impl in IMPLEMENTATIONS:
        x, weight, lam = leaves()
        codes = csc_encode(
            x, weight, 0.2, lam, padding=1, n_steps=3, nonnegative=nonnegative, impl=impl, keep_residuals=keep_residuals
        )
        codes = codes.clone() if impl == "reference" else codes
        CHANGES[change](codes).pow(2).sum().backward()
        found.append([leaf.grad for leaf in (x, weight, lam)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_codes_of_a_subclass_of_tensor_may_be_changed_in_place() -> None:
    class Image(Tensor):
        pass

    found = []
    for kind in (Tensor, Image):
        x, weight, lam = leaves()
        images = x.detach().as_subclass(kind).requires_grad_()
        codes = csc_encode(images, weight, 0.2, lam, padding=1, impl="torch")
        assert type(codes) is kind
        codes.relu_().square().sum().backward()
        found.append(weight.grad)
    torch.testing.assert_close(*found)


def test_a_layer_trains_with_an_activation_in_place_as_a_convolution_does() -> None:
    """Without gradients, in evaluation and under activation checkpointing too."""
    results = []
    for inplace, wrapped in product((False, True), (False, True)):
        torch.manual_seed(0)
        model = nn.Sequential(
            sdnet.CSCConv2d(3, 8, 3, input_size=6, lam=0.05),
            nn.ReLU(inplace=inplace),
            sdnet.CSCConv2d(8, 4, 3, input_size=6, lam=0.01, nonnegative=False),
            nn.LeakyReLU(0.2, inplace=inplace),
        )
        x = torch.randn(2, 3, 6, 6)
        out = checkpoint(model, x, use_reentrant=False) if wrapped else model(x)
        assert isinstance(out, Tensor)
        out.square().sum().backward()
        with torch.no_grad():
            results.append([model(x), *(parameter.grad for parameter in model.parameters())])
    for found in results[1:]:
        for actual, expected in zip(found, results[0], strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Hardtanh, nn.Identity])
def test_a_compiled_layer_trains_with_an_activation_in_place(activation: type[nn.Module]) -> None:
    torch.compiler.reset()
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        act = activation(inplace=in_place) if activation is not nn.Identity else activation()
        model = nn.Sequential(sdnet.CSCConv2d(3, 8, 3, lam=0.05, input_size=8, nonnegative=False), act)
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if in_place else model
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        forward(x).square().sum().backward()
        found.append((x.grad, model[0].weight.grad))
    assert found[0][1].abs().max() > 0.1
    torch.testing.assert_close(found[1], found[0])


def run(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return function(x)


def run_checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    found: object = checkpoint(function, x, use_reentrant=False)
    return found  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize(
    ("context", "call"),
    [
        (nullcontext, run),
        (nullcontext, run_checkpointed),
        (save_on_cpu, run),
        (lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor), run),
    ],
    ids=["no hooks", "checkpoint", "on the CPU", "other hooks"],
)
def test_a_shortcut_may_be_added_in_place_whatever_saves_the_tensors(
    context: Callable[[], Any], call: Callable[..., Tensor], nonnegative: bool
) -> None:
    found = []
    for in_place in (False, True):
        x, weight, lam = leaves()

        def block(x: Tensor, weight: Tensor = weight, lam: Tensor = lam, in_place: bool = in_place) -> Tensor:
            codes = csc_encode(x, weight, 0.2, lam, padding=1, n_steps=3, nonnegative=nonnegative, impl="torch")
            shortcut = x.sum(1, keepdim=True)
            return (codes.add_(shortcut) if in_place else codes + shortcut).square()

        with context():
            codes = call(block, x)
        codes.sum().backward()
        found.append([leaf.grad for leaf in (x, weight, lam)])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


class Calls(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(("change", "forwards"), [(torch.relu, 1), (torch.relu_, 2)], ids=["unchanged", "changed"])
def test_only_codes_that_were_changed_are_computed_again(change: Callable[[Tensor], Tensor], forwards: int) -> None:
    x, weight, lam = leaves()
    for context in (nullcontext(), save_on_cpu()):
        with Calls() as calls, context:
            change(csc_encode(x, weight, 0.2, lam, padding=1, impl="torch")).sum().backward()
        assert calls.names.count("csc_forward") == forwards


def test_the_codes_are_freed_with_their_graph() -> None:
    x, weight, lam = leaves()
    codes = csc_encode(x, weight, 0.2, lam, padding=1, impl="torch")
    alive = weakref.ref(codes)
    gc.disable()
    try:
        del codes
        assert alive() is None
    finally:
        gc.enable()


def other_layout(tensor: Tensor) -> Tensor:
    """The same values in another memory format."""
    if tensor.ndim != 4:
        return tensor
    last = tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.detach().contiguous(memory_format=torch.contiguous_format if last else torch.channels_last)


def strided(tensor: Tensor) -> Tensor:
    """The same values, every second element of its memory."""
    return torch.stack([tensor.detach(), tensor.detach()], dim=-1)[..., 0]


HOOKS = {
    "another layout": lambda: saved_tensors_hooks(other_layout, lambda tensor: tensor),
    "strided": lambda: saved_tensors_hooks(lambda tensor: tensor, strided),
    "codes alone": lambda: saved_tensors_hooks(
        lambda tensor: tensor, lambda tensor: other_layout(tensor) if tensor.shape[1:2] == (8,) else tensor
    ),
    "on the CPU": lambda: save_on_cpu(),
    "quantised": lambda: saved_tensors_hooks(lambda tensor: tensor.half(), lambda tensor: tensor.to(torch.float32)),
}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize(
    "options", [{}, {"n_steps": 4, "keep_residuals": False}, {"data_term": "norm", "mu": 0.5}], ids=str
)
def test_gradients_are_right_whatever_layout_saved_tensors_come_back_in(
    options: dict[str, Any], hooks: str, channels_last: bool
) -> None:
    found = []
    for context in (nullcontext(), HOOKS[hooks]()):
        x, weight, lam = leaves(dtype=torch.float32)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        with context:
            images = x.contiguous(memory_format=layout)
            codes = csc_encode(images, weight, 0.2, lam, padding=1, impl="torch", **options)
            codes.square().sum().backward()
        found.append([leaf.grad for leaf in (x, weight, lam)])
    tolerance = 5e-3 if hooks == "quantised" else 1e-5
    for actual, expected in zip(*found, strict=True):
        assert actual is not None
        assert expected is not None
        assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize(
    "needs", [("x", "weight", "lam"), ("x",), ("weight",), ("lam",), ("weight", "lam")], ids="-".join
)
@pytest.mark.parametrize("options", [{}, {"n_steps": 1}, {"n_steps": 4, "stride": (2, 1)}, {"n_dict": 2}], ids=str)
def test_operations_are_counted_as_for_the_reference(options: dict[str, Any], needs: tuple[str, ...]) -> None:
    counts = []
    for impl in IMPLEMENTATIONS:
        tensors = dict(zip(("x", "weight", "lam"), leaves(int(str(options.get("n_dict", 1)))), strict=True))
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in needs)
        with FlopCounterMode(display=False) as forward:
            codes = csc_encode(tensors["x"], tensors["weight"], 0.2, tensors["lam"], padding=1, impl=impl, **options)
        with FlopCounterMode(display=False) as backward:
            codes.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


def test_the_module_of_the_counter_is_not_imported_with_the_package() -> None:
    """It imports Triton. A counter that was made before the first call counts nevertheless."""
    program = """
import sys, torch, sdnet
from sdnet.kernels import csc_encode
assert "torch.utils.flop_counter" not in sys.modules and "triton" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    csc_encode(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 1), 0.1, 0.1)
print(counter.get_total_flops())
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout.split() == [str(3 * 2 * 16)]


def test_lambda_may_change_between_the_two_passes_unless_its_value_is_needed_again() -> None:
    x, weight, _ = leaves()
    lam = torch.tensor(0.1, dtype=torch.float64)
    codes = csc_encode(x, weight, 0.2, lam, padding=1, impl="torch")
    lam.fill_(0.5)
    (found,) = torch.autograd.grad(codes.sum(), x, retain_graph=True)
    expected = torch.autograd.grad(csc_encode(x, weight, 0.2, 0.1, padding=1, impl="reference").sum(), x)[0]
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="lam was changed in place between the forward pass and a backward pass"):
        torch.autograd.grad(codes.sum(), x, create_graph=True)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_layer_passes_the_checks_of_the_trace_and_has_gradients() -> None:
    layer = sdnet.CSCConv2d(3, 8, 3, input_size=6, lam=0.05)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    traced: Any = torch.jit.trace(layer, (x,))
    found = []
    for function in (layer, traced):
        leaf = x[:1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(leaf).square().sum(), leaf)
        found.append(gradient)
    assert found[0].abs().max() > 0.01
    torch.testing.assert_close(*found)
