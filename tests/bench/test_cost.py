"""The counted costs: by hand, and against what PyTorch's dispatcher sees of other formulations."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sdnet.bench.cost import Operation, Total, backward, forward, padding_bytes, total
from sdnet.bench.layer_shapes import LayerShape, distinct_layers
from sdnet.kernels import csc_encode, torch_path
from sdnet.kernels.coding import Coding

LAYER = LayerShape("", channels=2, atoms=3, kernel_size=3, stride=1, size=(5, 4))
BATCH = 2
aten = torch.ops.aten


class PassCounter(TorchDispatchMode):
    """Counts readings and writings of images, codes and dictionaries, told apart by their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.images = self.codes = self.weights = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        free = func.is_view or func in (aten.detach.default, aten.empty_like.default, aten.alias.default)
        if not free:
            self.count(func, args, result)
        return result

    def count(self, func: Any, args: Any, result: Any) -> None:
        if func == aten.convolution_backward.default:
            grad, x, weight, *_, outputs = args
            for operand, output in ((weight, result[0]), (x, result[1])):
                self.add(*(tensor for tensor in (grad, operand, output) if output is not None))
            assert not outputs[2]
            return
        self.add(*(arg for arg in args if isinstance(arg, Tensor)))
        self.add(*([result] if isinstance(result, Tensor) else []))
        if func == aten.convolution.default and args[2] is not None:  # CUDA adds a bias in a kernel of its own
            self.add(result, result)

    def add(self, *tensors: Tensor) -> None:
        for tensor in tensors:
            self.images += tuple(tensor.shape) == (BATCH, LAYER.channels, *LAYER.size)
            self.codes += tuple(tensor.shape) == (BATCH, LAYER.atoms, *LAYER.codes_size)
            self.weights += tuple(tensor.shape) == (LAYER.atoms, LAYER.channels, 3, 3)


def leaves() -> tuple[Tensor, Tensor]:
    x = torch.randn(BATCH, LAYER.channels, *LAYER.size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(LAYER.atoms, LAYER.channels, 3, 3, dtype=torch.float64, requires_grad=True)
    return x, weight


def official(x: Tensor, weight: Tensor, n_steps: int) -> Tensor:
    """The operators of the official layer for n_steps <= 2, in their order, the normalisation of the atoms left out."""
    step_size, scaling_mu, threshold = torch.tensor(0.1, dtype=x.dtype), 1.0, 0.01
    codes = torch.empty(0)
    for k in range(n_steps):
        if k == 0:
            codes = step_size * F.conv2d(x.repeat(1, 1, 1, 1), weight, padding=1)
        else:
            residual = x.repeat(1, 1, 1, 1) - F.conv_transpose2d(codes, weight, padding=1)
            codes = codes + step_size * F.conv2d(residual, weight, padding=1)
        codes = F.relu(F.softshrink(codes * scaling_mu, threshold))
    residual = x.repeat(1, 1, 1, 1) - F.conv_transpose2d(codes, weight, padding=1)
    torch.sum(torch.pow(residual, 2))
    torch.sum(torch.abs(codes))
    torch.sum(torch.pow(codes, 2))
    return codes


def counted(operations: list[Operation]) -> Total:
    return total(operations, LAYER, BATCH)


def test_documented_passes_of_the_official_formulation() -> None:
    """48 passes forward and 40 backward, of two steps."""
    x, weight = leaves()
    with PassCounter() as seen:
        codes = official(x, weight, 2)
    assert (seen.images, seen.codes) == (19, 29)
    grad = torch.ones_like(codes)
    with PassCounter() as seen:
        codes.backward(grad)
    assert (seen.images, seen.codes) == (11, 29)


@pytest.mark.parametrize(("kept", "images", "codes"), [(True, 9, 17), (False, 13, 18)])
def test_documented_passes_of_the_torch_formulation(kept: bool, images: int, codes: int) -> None:
    """20 passes forward, and 26 or 31 backward, of two steps."""
    x, weight = (leaf.detach() for leaf in leaves())
    step_size, lam = torch.tensor([0.1, 0.15], dtype=x.dtype).unbind()
    problem = torch_path.Problem(step_size, lam, Coding(n_steps=2, solver="ista"), (1, 1), (1, 1))
    with PassCounter() as seen:
        found, residuals = torch_path.forward(x, weight, problem, keep_residuals=True)
    assert (seen.images, seen.codes) == (6, 14)
    needs, grad = torch_path.Needs(x=True, weight=True, lam=False), torch.ones_like(found[-1])
    with PassCounter() as seen:
        torch_path.backward(grad, x, weight, found, residuals if kept else [], problem, needs)
    assert (seen.images, seen.codes) == (images, codes)


def test_passes_and_convolutions_of_the_fused_formulation() -> None:
    """Forward: x to z, (z, x) to r, (z, r) to z'. Backward: see `cost.backward`."""
    found = counted(forward())
    assert (found.images, found.codes, found.convolutions) == (4, 4, 3)
    kept, recomputed = counted(backward(keep_residual=True)), counted(backward())
    assert (kept.passes, kept.convolutions) == (18, 6)
    assert (recomputed.passes, recomputed.convolutions) == (21, 7)


def test_bytes_of_padding_by_hand() -> None:
    """A pixel of 3 channels takes 6 bytes, one of 4 takes 8: padding reads 6 and writes 8 twice, a cut reads 8."""
    layer, pixels = LayerShape("", 3, 64, 7, 2, (224, 224)), 256 * 224 * 224
    assert padding_bytes(layer, 4, 256, needs_x=False, keep_residual=False) == 2 * 22 * pixels
    assert padding_bytes(layer, 4, 256, needs_x=False, keep_residual=True) == (3 * 22 + 14) * pixels
    assert padding_bytes(layer, 4, 256, needs_x=True, keep_residual=True) == (3 * 22 + 2 * 14) * pixels


@pytest.mark.parametrize("n_steps", [1, 2, 5])
def test_convolutions_by_steps(n_steps: int) -> None:
    assert counted(forward(n_steps)).convolutions == 2 * n_steps - 1
    assert counted(backward(n_steps, keep_residual=True)).convolutions == 2 * (2 * n_steps - 1)


def test_bytes_and_flops_by_hand() -> None:
    layer = LayerShape("", 64, 64, 3, 1, (56, 56))
    costs = total(forward(), layer, 256)
    pixels, dictionary = 256 * 56 * 56, 64 * 64 * 9
    assert costs.bytes == 2 * (8 * 64 * pixels + 3 * dictionary)
    assert (
        costs.flops == 3 * 2 * 256 * 64 * 64 * (3 * 56 - 2) ** 2
    )  # at the border two of three rows of taps lie inside
    # The weight gradient's partial sums are a small part of its traffic.
    [reduction] = [operation for operation in backward() if operation.sums]
    plain = reduction._replace(sums=False)
    assert 0 < reduction.bytes(layer, 256) - plain.bytes(layer, 256) < 0.1 * plain.bytes(layer, 256)


@pytest.mark.parametrize("layer", distinct_layers(), ids=str)
def test_products_are_those_of_a_convolution_of_ones(layer: LayerShape) -> None:
    atom = torch.ones(1, 1, layer.kernel_size, layer.kernel_size)
    met = torch.nn.functional.conv2d(torch.ones(1, 1, *layer.size), atom, stride=layer.stride, padding=layer.padding)
    assert layer.products == met.sum()


def test_command_needs_no_triton() -> None:
    blocked = "import sys; sys.modules['triton'] = None\n"
    arguments = ["cost", "--image-size", "32", "--no-keep-residual"]
    code = f"{blocked}sys.argv = {arguments}; from sdnet.bench.cost import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| 64->64 3x3/1 @ 32x32 | 4 |" in done.stdout
    assert "All 17 layers move 17.3 GB." in done.stdout


@pytest.mark.parametrize("needs_x", [True, False])
@pytest.mark.parametrize("n_steps", [1, 2, 3])
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_flops_are_those_of_the_flop_counter(kernel_size: int, n_steps: int, needs_x: bool) -> None:
    """PyTorch's counter includes the products with the padding, and no residual that is computed again."""
    layer = LayerShape("", 4, 6, kernel_size, 1, (5, 7))
    x = torch.randn(BATCH, 4, 5, 7, requires_grad=needs_x)
    weight = torch.randn(6, 4, kernel_size, kernel_size, requires_grad=True)
    with FlopCounterMode(display=False) as seen:
        codes = csc_encode(x, weight, 0.1, 0.1, n_steps=n_steps, padding=layer.padding, impl="torch")
    padded = 5 * 7 * kernel_size**2 / layer.products
    assert seen.get_total_flops() == round(total(forward(n_steps), layer, BATCH).flops * padded)
    with FlopCounterMode(display=False) as seen:
        codes.sum().backward()
    operations = backward(n_steps, needs_x, keep_residual=True)
    assert seen.get_total_flops() == round(total(operations, layer, BATCH).flops * padded)
