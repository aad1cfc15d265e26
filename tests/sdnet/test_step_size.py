"""Atoms on the unit sphere and true step sizes: `attach`, `refresh_step_size`, `converge_vectors`, `step_margins`."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d
from sdnet.step_size import input_sizes

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


def norms_off(model: nn.Module) -> float:
    """How far the farthest atom is from the unit sphere."""
    return max((layer.weight.flatten(1).norm(dim=1) - 1).abs().max().item() for layer in csc_layers(model))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2},
        {"stride": (3, 1), "kernel_size": (5, 2), "padding": (1, 0)},
        {"n_dict": 2, "out_channels": 20},
        {"kernel_size": 7, "stride": 2, "out_channels": 4},
    ],
    ids=str,
)
def test_a_refresh_sets_nine_tenths_of_the_inverse_eigenvalue_before_any_forward(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = CSCConv2d(**{"in_channels": 3, "out_channels": 8, "kernel_size": 3, "input_size": SIZE} | options)
    layer.step_size.fill_(7.0)
    sdnet.refresh_step_size(layer)
    assert margins(layer) == pytest.approx([0.9], rel=1e-3)


def test_a_refresh_touches_steps_and_vectors_alone() -> None:
    model = network()
    before = bits(model)
    sdnet.refresh_step_size(model)
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed == {"0.step_size", "0.power_vector", "1.step_size", "1.power_vector"}


def test_a_refresh_at_an_image_size_moves_every_grid_with_the_data() -> None:
    model = nn.Sequential(*csc_layers(network()), nn.BatchNorm2d(6))
    before = bits(model)
    sdnet.refresh_step_size(model, image_size=(14, 11))
    first, second = csc_layers(model)
    assert first.power_vector.shape == (1, 3, 14, 11)
    assert second.power_vector.shape == (1, 8, 14, 11)
    assert margins(model, (14, 11)) == pytest.approx([0.9, 0.9], rel=1e-3)
    changed = {name for name, value in bits(model).items() if value != before[name]}
    assert changed == {"0.step_size", "0.power_vector", "1.step_size", "1.power_vector"}
    assert model.training


def test_the_grids_of_a_network_follow_the_image_size() -> None:
    model = sdnet.create_model("sdnet18_all", num_classes=10, stem="imagenet", image_size=32)
    sizes = input_sizes(model, (40, 37))
    assert sizes["stem.conv"] == (40, 37)
    assert sizes["stem.pool"] == (20, 19)
    assert sizes["stages.0.0.conv1"] == sizes["stages.1.0.conv1"] == (10, 10)
    assert sizes["stages.1.0.conv2"] == (5, 5)
    assert sizes["stages.3.1.conv2"] == (2, 2)


def test_converging_the_vectors_leaves_the_steps() -> None:
    model = network()
    steps = [layer.step_size.clone() for layer in csc_layers(model)]
    sdnet.converge_power_vectors(model)
    for layer, step_size in zip(csc_layers(model), steps, strict=True):
        assert torch.equal(layer.step_size, step_size)
        layer.update_dictionary()
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-2)


def test_margins_are_step_times_eigenvalue_on_any_grid_and_change_nothing() -> None:
    model = network()
    before = bits(model)
    assert list(sdnet.step_margins(model)) == ["0", "1"]
    assert list(sdnet.step_margins(model).values()) == pytest.approx(margins(model), rel=1e-3)

    first = model[:1]
    on_larger = sdnet.step_margins(first, image_size=(20, 21))["0"]
    assert on_larger == pytest.approx(margins(first, (20, 21))[0], rel=1e-3)
    assert on_larger > sdnet.step_margins(first)["0"]
    assert bits(model) == before


def test_after_each_optimiser_step_the_atoms_are_on_the_sphere_and_the_step_follows() -> None:
    model = network()
    sdnet.refresh_step_size(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    sdnet.attach(model, optimizer)
    start = [layer.weight.detach().clone() for layer in csc_layers(model)]
    for layer in csc_layers(model):
        layer.step_size.mul_(0.5)
    for _ in range(10):
        train(model, optimizer, 1)
        assert norms_off(model) < 1e-6
        assert all(0.9 * (1 - 1e-2) < margin < 0.95 for margin in margins(model))
    moved = [(layer.weight - old).abs().max() for layer, old in zip(csc_layers(model), start, strict=True)]
    assert min(moved) > 1e-2


def test_without_attach_the_atoms_leave_the_sphere() -> None:
    model = network()
    train(model, torch.optim.SGD(model.parameters(), lr=0.05), 3)
    assert norms_off(model) > 1e-3


def test_a_removed_hook_is_gone() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sdnet.attach(model, optimizer).remove()
    train(model, optimizer, 3)
    assert norms_off(model) > 1e-3


def test_a_step_that_the_gradient_scaler_skips_changes_nothing() -> None:
    model = network()
    csc_layers(model)[0].weight.data *= 1.01  # a projection would show
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sdnet.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore[reportPrivateImportUsage]

    def step(factor: float) -> None:
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(model(images()), torch.arange(4))).backward()
        scaler.step(optimizer)
        scaler.update()

    before = bits(model)
    step(float("inf"))
    assert bits(model) == before
    step(1.0)
    assert norms_off(model) < 1e-6


def test_several_iterations_per_step_follow_faster() -> None:
    """From a power vector that has nothing to do with the dictionary."""
    left = []
    for iterations in (1, 8):
        model = network()
        for layer in csc_layers(model):
            layer.reset_power_vector()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
        sdnet.attach(model, optimizer, iterations=iterations)
        train(model, optimizer, 1)
        left.append(max(margins(model)))
    assert 0.88 < left[1] < left[0]


def test_attach_refuses_less_than_one_iteration() -> None:
    model = network()
    with pytest.raises(ValueError, match="iterations is 0; it must be at least 1"):
        sdnet.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), iterations=0)


def test_following_the_weights_asks_the_device_for_nothing() -> None:
    """On the meta device there are no values: whatever waits for one raises."""
    layer = CSCConv2d(3, 8, 3, input_size=SIZE).to("meta")
    layer.update_dictionary()
    assert layer.step_size.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        layer.step_size.item()


def test_accumulated_halves_take_the_step_of_the_whole_batch() -> None:
    whole, halves = network(), network()
    for model, parts in ((whole, 1), (halves, 2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sdnet.attach(model, optimizer)
        for x, labels in zip(images().chunk(parts), torch.arange(4).chunk(parts), strict=True):
            (F.cross_entropy(model(x), labels) / parts).backward()
        optimizer.step()
    for one, other in zip(whole.state_dict().values(), halves.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_model_without_csc_layers_needs_no_upkeep() -> None:
    model = nn.Linear(3, 4)
    before = bits(model)
    sdnet.refresh_step_size(model, image_size=8)
    sdnet.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert sdnet.step_margins(model) == {}
    assert bits(model) == before
