"""The margins that the trainer logs, and the convergence of the step sizes before it evaluates."""

import pytest
import torch

import sdnet
from sdnet.step_size import csc_layers
from sdnet.train.step_sizes import converge_step_sizes, converged_step_sizes, measured_margins


def two_layers() -> torch.nn.Module:
    """A network of two CSC layers with converged step sizes."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(sdnet.CSCConv2d(3, 16, 3, input_size=16), sdnet.CSCConv2d(16, 16, 3, input_size=16))
    sdnet.refresh_step_size(model)
    return model


def test_the_margin_is_step_size_times_eigenvalue_before_the_convergence() -> None:
    model = two_layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    csc_layers(model)["0"].step_size.mul_(2)
    assert measured_margins(model) == pytest.approx(sdnet.step_margins(model), rel=0.01)
    with converged_step_sizes(model):
        assert sdnet.step_margins(model)["0"] == pytest.approx(0.9, rel=1e-3)
    assert torch.equal(model.state_dict()["0.step_size"], 2 * before["0.step_size"])
    margins = converge_step_sizes(model)
    assert margins == pytest.approx(dict.fromkeys(margins, 0.9) | {"0": 1.8}, rel=1e-3)
    assert sdnet.step_margins(model) == pytest.approx(dict.fromkeys(margins, 0.9), rel=1e-3)


def test_measured_margins_follow_weights_that_move_at_once() -> None:
    """The power vectors are from before, as after a step of an optimizer without the hook of `sdnet.attach`."""
    model = two_layers()
    with torch.no_grad():
        for layer in csc_layers(model).values():
            layer.weight.add_(0.05)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert measured_margins(model) == pytest.approx(sdnet.step_margins(model), rel=0.01)
    assert max(measured_margins(model).values()) > 4 / 3
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
