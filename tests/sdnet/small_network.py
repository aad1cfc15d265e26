"""A network of two CSC layers, and what the tests of its step sizes measure on it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from sdnet import CSCConv2d

SIZE = (9, 8)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    """Two CSC layers on a 9x8 input, the second with stride 2, and a classifier."""
    torch.manual_seed(0)
    return nn.Sequential(
        CSCConv2d(3, 8, 3, input_size=SIZE),
        CSCConv2d(8, 6, 3, stride=2, input_size=SIZE),
        nn.Flatten(),
        nn.Linear(6 * 5 * 4, 4),
    )


def csc_layers(model: nn.Module) -> list[CSCConv2d]:
    return [module for module in model.modules() if isinstance(module, CSCConv2d)]


def largest_eigenvalue(layer: CSCConv2d, size: tuple[int, int]) -> float:
    """Of A'A on inputs of `size`, by Lanczos iterations in fp64 on A A' as autograd transposes conv2d."""
    weight = layer.weight.detach().double()
    shape = (1, weight.shape[1], *size)

    def squares(pixels: Tensor) -> Tensor:
        return F.conv2d(pixels, weight, stride=layer.stride, padding=layer.padding).square().sum() / 2

    def apply(power_vector: np.ndarray) -> np.ndarray:
        pixels = torch.as_tensor(power_vector).reshape(shape).requires_grad_()
        return torch.autograd.grad(squares(pixels), pixels)[0].numpy().ravel()

    pixels = int(np.prod(shape))
    operator = LinearOperator((pixels, pixels), matvec=apply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    return float(eigsh(operator, k=1, return_eigenvectors=False)[0])


def margins(model: nn.Module, size: tuple[int, int] = SIZE) -> list[float]:
    """step times the largest eigenvalue, layer by layer."""
    return [layer.step_size.item() * largest_eigenvalue(layer, size) for layer in csc_layers(model)]


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, n_steps: int) -> None:
    for _ in range(n_steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        optimizer.step()


def run_two_ranks(program: str, folder: Path) -> None:
    """Run a program of this folder as two processes, `program RANK FOLDER`."""
    path = Path(__file__).with_name(program)
    ranks = [subprocess.Popen([sys.executable, path, str(rank), folder], stderr=subprocess.PIPE) for rank in (0, 1)]
    for rank in ranks:
        _, said = rank.communicate(timeout=240)
        assert rank.returncode == 0, said.decode()


def norms_off(model: nn.Module) -> float:
    """How far the farthest atom is from the unit sphere."""
    return max((layer.weight.flatten(1).norm(dim=1) - 1).abs().max().item() for layer in csc_layers(model))
