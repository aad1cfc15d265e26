"""Step sizes computed to convergence: `refresh_step_size`, `project`, `step_margins` and what belongs to them."""

import copy
import itertools
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import sdnet
from sdnet import CSCConv2d
from sdnet.layers import warn_once
from sdnet.step_size import input_sizes

from .small_network import SIZE, bits, csc_layers, images, margins, network, norms_off, train


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
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-3)


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


def test_following_the_weights_asks_the_device_for_nothing() -> None:
    """On the meta device there are no values: whatever waits for one raises."""
    layer = CSCConv2d(3, 8, 3, input_size=SIZE).to("meta")
    layer.update_dictionary()
    assert layer.step_size.is_meta
    with pytest.raises(RuntimeError, match="meta"):
        layer.step_size.item()


def test_a_model_without_csc_layers_has_nothing_to_refresh() -> None:
    model = nn.Linear(3, 4)
    before = bits(model)
    sdnet.refresh_step_size(model, image_size=8)
    sdnet.project(model)
    assert sdnet.step_margins(model) == {}
    assert bits(model) == before


class TwoInputs(nn.Module):
    """A plain convolution first, then a CSC layer on the sum of two inputs, then one that is defined before them."""

    def __init__(self) -> None:
        super().__init__()
        self.last = CSCConv2d(8, 4, 3, stride=2)
        self.first = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.middle = CSCConv2d(5, 8, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.last(self.middle(x=self.first(x) + self.first(y)))


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_an_example_batch_shows_the_input_sizes_of_any_network(kind: str) -> None:
    model, x = TwoInputs(), torch.randn(2, 3, 22, 18)
    example: Any = (x, x) if kind == "tuple" else {"x": x, "y": x}
    before = bits(model)
    expected = sdnet.step_margins(model, example)
    assert bits(model) == before
    sdnet.refresh_step_size(model, example)
    assert model.middle.power_vector.shape == (1, 5, 11, 9)
    assert model.last.power_vector.shape == (1, 8, 11, 9)
    assert margins(model, (11, 9)) == pytest.approx([0.9, 0.9], rel=1e-3)
    assert list(expected) == ["last", "middle"]
    assert sdnet.step_margins(model, example) == pytest.approx(sdnet.step_margins(model), rel=1e-4)
    assert model.training


class Pyramid(nn.Module):
    """Calls one layer at two sizes, the larger first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = CSCConv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mean() + self.layer(x[..., ::2, ::2]).mean()


def test_the_step_size_of_a_layer_that_is_called_at_two_sizes_is_that_of_the_larger() -> None:
    model, x = Pyramid(), torch.randn(2, 3, 14, 10)
    sdnet.refresh_step_size(model, x)
    assert model.layer.power_vector.shape == (1, 3, 14, 10)
    assert sdnet.step_margins(model, x)["layer"] == pytest.approx(0.9, rel=1e-3)


def test_an_image_size_serves_a_network_that_begins_with_a_plain_convolution() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1), CSCConv2d(3, 8, 3))
    sdnet.refresh_step_size(model, 12)
    assert csc_layers(model)[0].power_vector.shape == (1, 3, 12, 12)
    sdnet.refresh_step_size(model, image_size=(10, 9))
    assert csc_layers(model)[0].power_vector.shape == (1, 3, 10, 9)


@pytest.mark.parametrize(
    ("arguments", "keywords", "sentence"),
    [
        (("32",), {}, "example is '32'; it must be a tensor, a tuple or a dict of arguments"),
        ((torch.zeros(1, 3, 9, 8),), {"image_size": 8}, "example and image_size are both given"),
        ((16,), {"image_size": 8}, "example and image_size are both given"),
        ((), {"image_size": 64.0}, "image_size is 64.0; it must be an int or a pair of ints of at least 1"),
        (((3, 16, 16),), {}, r"image_size is \(3, 16, 16\); it must be an int or a pair"),
        ((0,), {}, "image_size is 0; it must be an int or a pair of ints of at least 1"),
        ((40,), {}, "does not take one tensor .* give an example batch instead"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [sdnet.refresh_step_size, sdnet.step_margins])
def test_wrong_sizes_are_refused_in_one_sentence(
    function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], sentence: str
) -> None:
    model = network()
    before = bits(model)
    with pytest.raises(ValueError, match=sentence):
        function(model, *arguments, **keywords)
    assert bits(model) == before


@pytest.mark.parametrize(
    "function", [sdnet.refresh_step_size, sdnet.project, sdnet.step_margins, sdnet.converge_power_vectors]
)
def test_a_dictionary_of_very_large_values_is_refused_and_the_model_untouched(function: Any) -> None:
    model = network()
    csc_layers(model)[1].weight.data[0, 0, 0, 0] = 1e25
    before = bits(model)
    with pytest.raises(ValueError, match=r"1\.weight holds values of up to 1e\+25; they must be at most 1e\+15\."):
        function(model)
    assert bits(model) == before


@pytest.mark.parametrize(
    "function", [sdnet.refresh_step_size, sdnet.project, sdnet.step_margins, sdnet.converge_power_vectors]
)
def test_a_dictionary_with_nan_is_refused_and_the_model_untouched(function: Any) -> None:
    model = network()
    csc_layers(model)[1].weight.data[0, 0, 0, 0] = torch.nan
    before = bits(model)
    with pytest.raises(ValueError, match=r"1\.weight holds NaN or infinite values"):
        function(model)
    assert bits(model) == before


def test_a_power_vector_with_nan_is_replaced() -> None:
    model = network()
    csc_layers(model)[0].power_vector.fill_(torch.nan)
    sdnet.refresh_step_size(model)
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-3)


def test_projected_weights_have_unit_atoms_and_converged_steps() -> None:
    model = network()
    with torch.no_grad():
        for layer in csc_layers(model):
            layer.weight.mul_(torch.linspace(0.5, 2, len(layer.weight)).view(-1, 1, 1, 1))
    sdnet.project(model)
    assert norms_off(model) < 1e-6
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-3)


def trained_states(model: nn.Module, n_steps: int = 4) -> list[dict[str, Tensor]]:
    """The weights after each of some attached optimizer steps."""
    optimizer, states = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), []
    sdnet.attach(model, optimizer)
    for _ in range(n_steps):
        train(model, optimizer, 1)
        states.append(copy.deepcopy(model.state_dict()))
    return states


def with_weights(weights: dict[str, Tensor]) -> nn.Sequential:
    """A fresh network with the given weights, its atoms scaled to unit norm by hand, its step sizes converged."""
    model = network()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.ndim == 4:
                weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            parameters[name].copy_(weight)
    sdnet.refresh_step_size(model)
    return model.eval()


@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_and_projected_model_equals_one_with_the_projected_averages(buffers: bool) -> None:
    """Stochastic weight averaging: `AveragedModel`, `project`, then `update_bn`."""
    model = nn.Sequential(*list(network().children())[:2], nn.BatchNorm2d(6), *list(network().children())[2:])
    averaged = AveragedModel(model, use_buffers=buffers)
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9), []
    sdnet.attach(model, optimizer)
    for _ in range(4):
        train(model, optimizer, 1)
        averaged.update_parameters(model)
        seen.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})
    sdnet.project(averaged)
    update_bn([images()], averaged)
    averaged.eval()

    means = {name: torch.stack([weights[name] for weights in seen]).mean(0) for name in seen[0]}
    assert min(means["0.weight"].flatten(1).norm(dim=1)) < 0.999
    expected = nn.Sequential(*list(network().children())[:2], nn.BatchNorm2d(6), *list(network().children())[2:])
    parameters = dict(expected.named_parameters())
    with torch.no_grad():
        for name, mean in means.items():
            norms = mean.flatten(1).norm(dim=1).view(-1, 1, 1, 1) if mean.ndim == 4 else 1
            parameters[name].copy_(mean / norms)
    sdnet.refresh_step_size(expected)
    update_bn([images()], expected)
    torch.testing.assert_close(averaged(images()), expected.eval()(images()), rtol=1e-4, atol=1e-5)
    assert max(sdnet.step_margins(averaged).values()) == pytest.approx(0.9, rel=1e-3)


def test_an_exponential_average_of_the_whole_state_is_projected_too() -> None:
    """As timm's ModelEmaV2, which averages every entry of the state dict, power vectors and step sizes among them."""
    model, decay = network(), 0.7
    average = copy.deepcopy(model)
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for state in trained_states(model):
        for name, value in average.state_dict().items():
            value.copy_(decay * value + (1 - decay) * state[name])
        expected = {name: decay * value + (1 - decay) * state[name] for name, value in expected.items()}
    sdnet.project(average)
    torch.testing.assert_close(average.eval()(images()), with_weights(expected)(images()), rtol=1e-4, atol=1e-5)


def test_training_without_an_attached_optimizer_warns_once() -> None:
    for attached, n_steps in itertools.product((True, False), (1, 3)):
        warn_once.cache_clear()
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if attached:
            sdnet.attach(model, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train(model, optimizer, n_steps)
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == (not attached and n_steps > 1), texts
        assert all("call sdnet.attach(model, optimizer)" in text for text in texts)


def test_a_copied_pair_has_no_hook_and_warns() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 2)
    copies = copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))
    for model, optimizer in copies:
        warn_once.cache_clear()
        with pytest.warns(UserWarning, match="its step size did not"):
            train(model, optimizer, 2)


def test_loading_weights_between_forwards_does_not_warn() -> None:
    model, state = network(), network().state_dict()
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images())
        model.load_state_dict(state)
        model(images())
        with torch.no_grad():
            csc_layers(model)[0].weight.mul_(0.5)
        sdnet.project(model)
        model(images())
        model.eval()
        with torch.no_grad():
            csc_layers(model)[0].weight.mul_(0.5)
        model(images())
