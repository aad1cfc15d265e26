"""Objective, sparsity and residual of every CSC layer, for the last batch or for a given one."""

import pytest
import torch
from torch import nn

import sdnet
from sdnet import CSCConv2d


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(CSCConv2d(3, 6, 3, lam=0.3, mu=0.2, n_dict=2), nn.BatchNorm2d(6), CSCConv2d(6, 4, 3, stride=2))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1))


def test_the_diagnostics_are_their_formulas(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    found = sdnet.diagnose(model, x)
    assert list(found) == ["0", "2"]

    layer = model[0]
    assert isinstance(layer, CSCConv2d)
    codes = layer(x)
    target = torch.cat([x, x], dim=1)
    squares = (target - layer.reconstruct(codes, (7, 8))).square().flatten(1).sum(dim=1)
    torch.testing.assert_close(found["0"].objective, layer.objective(x, codes))
    torch.testing.assert_close(found["0"].sparsity, (codes == 0).float().flatten(1).mean(dim=1))
    torch.testing.assert_close(found["0"].residual, squares / 2)
    torch.testing.assert_close(found["0"].relative_residual, squares.sqrt() / target.flatten(1).norm(dim=1))
    assert bool(((found["0"].sparsity > 0.05) & (found["0"].sparsity < 0.95)).all())
    assert bool((found["0"].relative_residual < 1).all())
    for value in found["2"]:
        assert value.shape == (2,)


def test_the_objective_serves_as_a_reconstruction_loss(model: nn.Sequential, x: torch.Tensor) -> None:
    found = sdnet.diagnose(model, x)
    torch.stack([layer.objective.mean() for layer in found.values()]).sum().backward()
    for layer in (model[0], model[2]):
        assert isinstance(layer, CSCConv2d)
        assert layer.weight.grad is not None
        assert layer.weight.grad.abs().max() > 0


def test_a_recording_knows_the_last_batch(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    with sdnet.record(model) as recording:
        model(x)
        model(2 * x)
        last = recording.diagnose()
    torch.testing.assert_close(last["0"].residual, sdnet.diagnose(model, 2 * x)["0"].residual)
    assert not torch.equal(last["0"].residual, sdnet.diagnose(model, x)["0"].residual)


def test_before_a_batch_there_is_nothing_to_tell(model: nn.Sequential) -> None:
    with sdnet.record(model) as recording, pytest.raises(RuntimeError, match="no batch has gone through the model"):
        recording.diagnose()


def test_an_ended_recording_has_forgotten_the_batch_and_left_the_model(model: nn.Sequential, x: torch.Tensor) -> None:
    recording = sdnet.record(model)
    model(x)
    recording.remove()
    model(x)
    with pytest.raises(RuntimeError, match="no batch"):
        recording.diagnose()


def test_a_model_without_csc_layers_has_no_diagnostics(x: torch.Tensor) -> None:
    assert sdnet.diagnose(nn.Conv2d(3, 4, 3), x) == {}
