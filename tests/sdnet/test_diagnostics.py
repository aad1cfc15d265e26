"""Objective, sparsity and residual of every CSC layer, for the last batch or for a given one."""

import copy
import pickle

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


def test_a_recording_keeps_the_last_batch(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    with sdnet.record(model) as recording:
        model(x)
        model(2 * x)
        last = recording.diagnose()
    torch.testing.assert_close(last["0"].residual, sdnet.diagnose(model, 2 * x)["0"].residual)
    assert not torch.equal(last["0"].residual, sdnet.diagnose(model, x)["0"].residual)


def test_before_a_batch_there_is_nothing_to_diagnose(model: nn.Sequential) -> None:
    with sdnet.record(model) as recording, pytest.raises(RuntimeError, match="no batch has gone through the model"):
        recording.diagnose()


def test_an_ended_recording_has_dropped_the_batch_and_records_no_other(model: nn.Sequential, x: torch.Tensor) -> None:
    recording = sdnet.record(model)
    model(x)
    recording.remove()
    model(x)
    with pytest.raises(RuntimeError, match="no batch"):
        recording.diagnose()


def test_a_model_without_csc_layers_has_no_diagnostics(x: torch.Tensor) -> None:
    assert sdnet.diagnose(nn.Conv2d(3, 4, 3), x) == {}


@pytest.mark.parametrize("lam", [0.7, torch.tensor([0.4, 0.9])], ids=["number", "per sample"])
def test_the_objective_is_that_of_the_lambda_of_the_forward(lam: float | torch.Tensor, x: torch.Tensor) -> None:
    layer = CSCConv2d(3, 6, 3, lam=0.1)
    with sdnet.record(layer) as recording:
        codes = layer(x, lam=lam)
        layer.lam = 0.2
        found = recording.diagnose()[""]
    torch.testing.assert_close(found.objective, layer.objective(x, codes, lam))
    assert not torch.isclose(found.objective, layer.objective(x, codes)).any()
    layer.lam = lam
    torch.testing.assert_close(found.objective, layer.objective(x, codes))


def test_a_lambda_that_changes_after_the_forward_does_not_change_its_diagnostics(x: torch.Tensor) -> None:
    layer = CSCConv2d(3, 6, 3, lam=0.3)
    expected = layer.objective(x, layer(x))
    with sdnet.record(layer) as recording:
        layer(x)
        layer.lam = 0.9
        torch.testing.assert_close(recording.diagnose()[""].objective, expected)


class ByKeyword(nn.Module):
    """Calls its layer by keyword and changes input and codes in place afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CSCConv2d(3, 6, 3, lam=0.3, nonnegative=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = self.layer(x=x)
        x.zero_()
        return codes.relu_()


def test_a_call_by_keyword_and_later_changes_in_place_are_recorded_right(x: torch.Tensor) -> None:
    model = ByKeyword()
    with torch.no_grad():
        codes = model.layer(x)
        expected = model.layer.objective(x, codes)
        found = sdnet.diagnose(model, x.clone())["layer"]
    torch.testing.assert_close(found.objective, expected)
    torch.testing.assert_close(found.sparsity, (codes == 0).float().flatten(1).mean(dim=1))


def test_a_model_that_is_compiled_already_is_recorded(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    torch._dynamo.reset()
    compilations = 0

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> object:
        nonlocal compilations
        compilations += 1
        return graph.forward

    forward = torch.compile(model, backend=backend, fullgraph=True)
    assert isinstance(forward, nn.Module)
    forward(x)
    for scale, recorded in ((1, model), (2, forward), (3, model)):
        with sdnet.record(recorded) as recording:
            forward(scale * x)
            actual = recording.diagnose()
        assert list(actual) == ["0", "2"]
        for name, expected in sdnet.diagnose(model, scale * x).items():
            for ours, theirs in zip(actual[name], expected, strict=True):
                torch.testing.assert_close(ours, theirs)
    forward(x)
    assert compilations == 2  # once as it is, once for all recordings


def test_two_recordings_keep_batches_of_their_own(model: nn.Sequential, x: torch.Tensor) -> None:
    model.eval()
    first, second = sdnet.record(model), sdnet.record(model)
    model(x)
    second.remove()
    model(2 * x)
    torch.testing.assert_close(first.diagnose()["0"].residual, sdnet.diagnose(model, 2 * x)["0"].residual)
    first.remove()


def test_copies_of_a_recorded_model_are_not_recorded(model: nn.Sequential, x: torch.Tensor) -> None:
    with sdnet.record(model) as recording:
        model(x)
        before = recording.diagnose()["0"].residual
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            other(2 * x)
        torch.testing.assert_close(recording.diagnose()["0"].residual, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_do_not_overflow_in_half_precision(dtype: torch.dtype) -> None:
    """|x|^2 of this input is 4e6, and fp16 ends at 65504."""
    torch.manual_seed(0)
    layer = CSCConv2d(3, 8, 7, stride=2, input_size=112).to(dtype)
    x = (10 * torch.randn(2, 3, 112, 112)).to(dtype)
    with torch.no_grad():
        found = sdnet.diagnose(layer, x)[""]
        layer.double()
        codes = layer(x.double())
        expected = layer.objective(x.double(), codes)
        error = x.double() - layer.reconstruct(codes, 112)
    assert found.objective.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.objective.double(), expected, rtol=tolerance, atol=0)
    squares = error.square().flatten(1).sum(dim=1)
    torch.testing.assert_close(found.residual.double(), squares, rtol=tolerance, atol=0)
    relative = (squares / x.double().square().flatten(1).sum(dim=1)).sqrt()
    torch.testing.assert_close(found.relative_residual.double(), relative, rtol=tolerance, atol=0)


def test_autocast_does_not_lower_the_precision_of_the_diagnostics(x: torch.Tensor) -> None:
    layer = CSCConv2d(3, 6, 3)
    codes = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = layer.objective(x, codes)
    torch.testing.assert_close(actual, layer.objective(x, codes), rtol=0, atol=0)


def test_a_batch_of_inference_mode_is_diagnosed_after_it(model: nn.Sequential, x: torch.Tensor) -> None:
    expected = sdnet.diagnose(model, x)
    with sdnet.record(model) as recording:
        with torch.inference_mode():
            model(x)
        found = recording.diagnose()
    assert found.keys() == expected.keys()
    for name, diagnostics in found.items():
        torch.testing.assert_close(tuple(diagnostics), tuple(expected[name]))
