"""Every official configuration: the same checkpoint in the official network and in ours gives the same logits.

The official network is `sdnet.bench.official`, which shares no code with ours. Its batch-norm statistics are calibrated
first and its layers asked for live codes: in a fresh deep network they would be all zero, and the comparison blind.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdnet
from sdnet.bench.official import DictConv2d, OfficialConfig, OfficialSDNet
from sdnet.official import load_official_checkpoint

BASE = OfficialConfig()
ALL = OfficialConfig(all_layers=True)
ELSE = {"mu": 0.5, "nonnegative": False, "n_steps": 4, "lmbd": 0.05}

CONFIGURATIONS = {
    "sdnet18-cifar": (BASE, 16),
    "sdnet18-imagenet": (replace(BASE, stem="imagenet", num_classes=20), 32),
    "sdnet34-cifar": (replace(BASE, depth=34), 16),
    "sdnet34-imagenet": (replace(BASE, depth=34, stem="imagenet"), 32),
    "sdnet18-mu": (replace(BASE, mu=0.5), 8),
    "sdnet18-signed": (replace(BASE, nonnegative=False), 8),
    "sdnet18-norm": (replace(BASE, square_noise=False), 8),
    "sdnet18-n_dict2": (replace(BASE, expansion_factor=2), 8),
    "sdnet18-4steps": (replace(BASE, n_steps=4), 8),
    "sdnet18-everything-else": (replace(BASE, stem="imagenet", square_noise=False, expansion_factor=2, **ELSE), 16),
    "sdnet18_all-cifar": (ALL, 8),
    "sdnet18_all-cifar-no-shortcut": (replace(ALL, shortcut=False), 8),
    "sdnet18_all-imagenet": (replace(ALL, stem="imagenet", num_classes=20), 32),
    "sdnet18_all-imagenet-no-shortcut": (replace(ALL, stem="imagenet", shortcut=False), 32),
    "sdnet34_all-cifar": (replace(ALL, depth=34), 8),
    "sdnet18_all-everything-else": (replace(ALL, square_noise=False, expansion_factor=2, **ELSE), 16),
}
SLOW = ("sdnet18_all-everything-else",)


def pictures(batch: int, image_size: int) -> Tensor:
    """Noise in fp64: many layers of thresholds blow fp32's rounding up, and every kind of CPU rounds in its own way."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, image_size, image_size, dtype=torch.float64, generator=generator)


def calibrated(config: OfficialConfig, images: Tensor) -> OfficialSDNet:
    """The official network with steps from its own power iteration and batch-norm statistics from `images`."""
    torch.manual_seed(0)
    network = OfficialSDNet(config).double()
    network(images)  # fixes the grids of the power iterations
    for layer in network.dict_layers():
        layer.update_stepsize(max_iterations=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    network(images)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            # A channel that is all but silent on these few images would be blown up, and rounding with it.
            module.running_var.clamp_min_(0.1 * module.running_var.mean().item())
    return network.eval()


def counterpart(config: OfficialConfig) -> nn.Module:
    """Our network for an official configuration; its small image size makes the power iterations on loading quick."""
    return (
        sdnet.create_model(
            f"sdnet{config.depth}{'_all' if config.all_layers else ''}",
            num_classes=config.num_classes,
            stem=config.stem,
            image_size=8 if config.stem == "cifar" else 32,
            shortcut=config.shortcut,
            n_steps=config.n_steps,
            lam=config.lmbd,
            mu=config.mu,
            nonnegative=config.nonnegative,
            solver="sdnet",
            data_term="squared" if config.square_noise else "norm",
            n_dict=config.expansion_factor,
        )
        .double()
        .eval()
    )


def loaded(config: OfficialConfig, network: OfficialSDNet, folder: Path) -> nn.Module:
    """Our network with the official one's checkpoint, by way of a file that is gone afterwards."""
    path = folder / "model_best.pth.tar"
    torch.save(network.state_dict(), path)
    model = counterpart(config)
    load_official_checkpoint(model, path)
    path.unlink()
    return model


def active_shares(network: OfficialSDNet, images: Tensor) -> list[float]:
    """The share of nonzero codes of each CSC layer, and the run's end in a fresh forward."""
    shares: list[float] = []

    def note(_: nn.Module, __: Any, codes: Tensor) -> None:
        shares.append((codes != 0).double().mean().item())

    handles = [layer.register_forward_hook(note) for layer in network.dict_layers()]
    network(images)
    for handle in handles:
        handle.remove()
    return shares


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        pytest.param(*values, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name, values in CONFIGURATIONS.items()
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_official_network(config: OfficialConfig, image_size: int, tmp_path: Path) -> None:
    images = pictures(8, image_size)
    network = calibrated(config, images)
    shares = active_shares(network, images)
    assert len(shares) == len(network.dict_layers()) > 0
    assert all(0.02 < share < 0.98 for share in shares), [f"{share:.3f}" for share in shares]

    logits = loaded(config, network, tmp_path)(images)
    expected = network(images)
    assert expected.shape == (8, config.num_classes)
    assert expected.std(dim=0).min() > 0.01 * expected.std(), "the logits do not depend on the image"
    assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()  # step sizes are fp32 in ours


@torch.no_grad()
def test_logits_in_fp32_are_those_of_the_official_network(tmp_path: Path) -> None:
    """With one CSC layer, behind which rounding stays what it is."""
    images = pictures(8, 32)
    network = calibrated(BASE, images)
    model = loaded(BASE, network, tmp_path)
    logits, expected = (net.float()(images.float()) for net in (model, network))
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("config", [replace(BASE, n_steps=4), replace(ALL, n_steps=3)], ids=["sdnet18", "sdnet18_all"])
def test_gradients_are_those_of_the_official_network(config: OfficialConfig, tmp_path: Path) -> None:
    images = pictures(4, 8)
    network = calibrated(config, images)
    model = loaded(config, network, tmp_path)
    gradients = []
    for net, first in ((network, network.dict_layers()[0].weight), (model, next(model.parameters()))):
        x = images.clone().requires_grad_()
        F.cross_entropy(net(x), torch.arange(4)).backward()
        assert x.grad is not None
        assert first.grad is not None
        gradients.append((x.grad, first.grad))
    for expected, actual in zip(*gradients, strict=True):
        assert expected.norm() > 0
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


def test_the_official_power_iteration_estimates_the_step_from_above_and_closes_in() -> None:
    """Fifty iterations from a random start leave an eigenvalue that is too low by about a percent, a step too long."""
    torch.manual_seed(0)
    layer = DictConv2d(3, 16, 3, 1, BASE)
    layer(torch.zeros(1, 3, 8, 8))
    basis = torch.eye(3 * 64).view(-1, 3, 8, 8)
    best = 0.9 / torch.linalg.matrix_norm(layer.conv(basis).flatten(1).detach().double(), 2).item() ** 2
    steps = []
    for _ in range(4):
        layer.update_stepsize()
        steps.append(layer.step_size.item())
    assert steps == sorted(steps, reverse=True)
    assert best * (1 - 1e-5) <= steps[-1] <= steps[0] <= 1.05 * best
