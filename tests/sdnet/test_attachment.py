"""`attach`: which layers it updates, how they may be wrapped and stored, and what it refuses."""

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.nn.utils.parametrize import register_parametrization

import sdnet
from sdnet import CSCConv2d

from .small_network import bits, csc_layers, images, margins, network, norms_off, run_two_ranks, train


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def test_after_each_optimizer_step_the_atoms_are_on_the_sphere_and_the_step_follows() -> None:
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
        assert all(0.9 * (1 - 1e-2) < margin < 0.92 for margin in margins(model))
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
    assert 0.9 < left[1] < left[0]


def test_attach_refuses_less_than_one_iteration() -> None:
    model = network()
    with pytest.raises(ValueError, match="iterations is 0; it must be an int of at least 1"):
        sdnet.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), iterations=0)


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


def test_a_fused_optimizer_under_a_gradient_scaler_changes_nothing_at_a_skipped_step() -> None:
    """Its step() runs at skipped steps too, and the hook with it."""
    model = network()
    csc_layers(model)[0].weight.data *= 1.01  # a projection would show
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)
    sdnet.attach(model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore[reportPrivateImportUsage]
    before = bits(model)
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(factor * F.cross_entropy(model(images()), torch.arange(4))).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor != 1:
            assert bits(model) == before
    assert norms_off(model) < 1e-6


def test_a_step_with_nan_is_forgotten_once_the_weights_are_restored() -> None:
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 2)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    optimizer.step()
    assert all(layer.weight.isnan().all() for layer in csc_layers(model))
    assert all(layer.step_size.isfinite() for layer in csc_layers(model))
    model.load_state_dict(weights, strict=False)
    optimizer.state.clear()
    train(model, optimizer, 1)
    assert all(0.9 * (1 - 1e-3) < margin < 0.95 for margin in margins(model))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("prepared_first", [True, False])
def test_a_model_and_an_optimizer_prepared_by_accelerate(accelerator: Accelerator, prepared_first: bool) -> None:
    model = network()
    optimizer: Any = sgd(model)
    if not prepared_first:
        sdnet.attach(model, optimizer)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if prepared_first:
        sdnet.attach(wrapped, optimizer)
    with pytest.raises(ValueError, match="attached already"):
        sdnet.attach(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(wrapped(images()), torch.arange(4)))
        optimizer.step()
    assert norms_off(model) < 1e-6


def test_a_compiled_model_is_the_model() -> None:
    model = network()
    optimizer = sgd(model)
    sdnet.attach(torch.compile(model), optimizer)  # pyright: ignore[reportArgumentType]
    train(model, optimizer, 1)
    assert norms_off(model) < 1e-6


def test_frozen_layers_and_those_of_other_optimizers_are_left_alone() -> None:
    model = network()
    first, second = csc_layers(model)
    first.weight.requires_grad_(False)
    first.weight.data *= 1.5
    before = bits(first)
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 2)
    assert bits(first) == before
    assert (second.weight.flatten(1).norm(dim=1) - 1).abs().max() < 1e-6

    model = network()
    first, second = csc_layers(model)
    optimizers = [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD(model[1:].parameters(), lr=0.1)]
    for optimizer in optimizers:
        sdnet.attach(model, optimizer)
    model(images()).square().sum().backward()
    before = bits(second)
    optimizers[0].step()
    assert bits(second) == before
    assert (first.weight.flatten(1).norm(dim=1) - 1).abs().max() < 1e-6
    optimizers[1].step()
    assert norms_off(model) < 1e-6


def test_a_layer_that_was_frozen_but_still_has_a_gradient_is_updated_as_the_optimizer_moves_it() -> None:
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 1)
    model(images()).square().mean().backward()
    model.requires_grad_(False)
    before = bits(model)
    optimizer.step()
    assert bits(model) != before
    assert norms_off(model) < 1e-6


class Lookahead(torch.optim.Optimizer):
    """As timm's: it does not call `Optimizer.__init__`, and moves the weights after the step of what it wraps."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.base, self.param_groups, self.defaults, self.state = base, base.param_groups, base.defaults, base.state
        self.slow = [[weight.detach().clone() for weight in group["params"]] for group in base.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.base.step()
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for weight, old in zip(group["params"], slow, strict=True):
                weight.copy_(old.lerp_(weight, 0.5))


def test_an_optimizer_that_wraps_another_is_followed_after_its_own_step() -> None:
    model = network()
    optimizer = Lookahead(sgd(model))
    sdnet.attach(model, optimizer)
    for _ in range(3):
        model.zero_grad()  # not optimizer.zero_grad(), with which torch would prepare step() for hooks
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        optimizer.step()
        assert norms_off(model) < 1e-6


def test_layers_and_parameter_groups_added_later_are_updated() -> None:
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    model.append(nn.Unflatten(1, (1, 2, 2)))
    model.append(CSCConv2d(1, 4, 1, input_size=2))
    model.append(nn.Flatten())
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.5})
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().sum().backward()
        optimizer.step()
    assert norms_off(model) < 1e-6
    frozen = csc_layers(model)[0]
    frozen.weight.requires_grad_(False)
    before = bits(frozen)
    train(model, optimizer, 1)
    assert bits(frozen) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (lambda m, o: (o, m), "model is SGD .*; it must be an nn.Module"),
        (lambda m, o: (m, m), "optimizer is Sequential; it must be a torch.optim.Optimizer"),
        (lambda m, o: (m, None), "optimizer is NoneType; it must be a torch.optim.Optimizer"),
        (lambda m, o: (m, 0.1), "optimizer is 0.1; it must be a torch.optim.Optimizer"),
        (lambda m, o: (m, torch.optim.lr_scheduler.StepLR(o, 1)), "optimizer is StepLR; it must be"),
        (lambda m, o: (nn.Linear(2, 2), o), "model has no CSC layers"),
        (lambda m, o: (m, sgd(network())), "optimizer holds none of the dictionaries of model"),
        (lambda m, o: (m, sgd(m[3])), "optimizer holds none of the dictionaries of model"),
        (lambda m, o: (m.requires_grad_(False), o), "are frozen"),
        (lambda m, o: (m, o, 0), "iterations is 0; it must be an int of at least 1"),
        (lambda m, o: (m, o, 1.5), "iterations is 1.5; it must be an int of at least 1"),
        (lambda m, o: (m, o, True), "iterations is True; it must be an int of at least 1"),
    ],
)
def test_wrong_arguments_are_refused_in_one_sentence(arguments: Any, sentence: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=sentence):
        sdnet.attach(*arguments(model, sgd(model)))


def test_a_second_call_is_refused_until_the_first_is_removed() -> None:
    model = network()
    optimizer = sgd(model)
    handle = sdnet.attach(model, optimizer)
    with pytest.raises(ValueError, match="attached already"):
        sdnet.attach(model, optimizer)
    handle.remove()
    with sdnet.attach(model, optimizer):
        train(model, optimizer, 1)
    assert norms_off(model) < 1e-6
    train(model, optimizer, 1)
    assert norms_off(model) > 1e-4


def test_an_optimizer_that_lost_its_dictionaries_is_refused_before_the_step() -> None:
    """As one that was made before fully_shard or a tied layer replaced the parameters."""
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    for layer in csc_layers(model):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(ValueError, match="optimizer holds none of the dictionaries of model any more"):
        optimizer.step()


@pytest.mark.parametrize("attached_first", [True, False])
def test_pruned_dictionaries_keep_their_zeros_and_have_unit_norm(attached_first: bool) -> None:
    model = network()
    optimizer = None
    if attached_first:  # pruning makes another parameter object of the same tensor: the optimizer must hold it
        optimizer = sgd(model)
        sdnet.attach(model, optimizer)
    for layer in csc_layers(model):
        prune.l1_unstructured(layer, "weight", 0.5)
    if optimizer is None:
        optimizer = sgd(model)
        sdnet.attach(model, optimizer)
    masks = [layer._buffers["weight_mask"] for layer in csc_layers(model)]
    train(model, optimizer, 3)
    model.eval()(images())
    assert norms_off(model) < 1e-6
    for layer, mask in zip(csc_layers(model), masks, strict=True):
        assert torch.equal(layer.weight != 0, mask != 0)
    assert all(0.9 * (1 - 1e-2) < margin < 0.92 for margin in margins(model))
    assert all(0.9 * (1 - 1e-2) < margin < 0.92 for margin in sdnet.step_margins(model).values())
    sdnet.refresh_step_size(model)
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-3)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Halves(Doubled):
    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / 2


@pytest.mark.parametrize("kind", ["weight_norm", "doubled"])
def test_parametrized_dictionaries_are_projected_where_they_are_stored(kind: str) -> None:
    model = network()
    for layer in csc_layers(model):
        if kind == "weight_norm":
            parametrizations.weight_norm(layer, "weight")
        else:
            register_parametrization(layer, "weight", Halves())
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 3)
    assert all(parametrize.is_parametrized(layer, "weight") for layer in csc_layers(model))
    assert norms_off(model) < 1e-6
    assert all(0.9 * (1 - 1e-2) < margin < 0.92 for margin in margins(model))
    sdnet.project(model)
    assert margins(model) == pytest.approx([0.9, 0.9], rel=1e-3)


def test_dictionaries_that_cannot_be_projected_are_refused_by_name() -> None:
    model = network()
    register_parametrization(csc_layers(model)[1], "weight", Doubled())
    with pytest.raises(ValueError, match=r"1\.weight has a parametrization without right_inverse"):
        sdnet.attach(model, sgd(model))
    with pytest.raises(ValueError, match=r"1\.weight has a parametrization without right_inverse"):
        sdnet.project(model)
    model = network()
    weight_norm(csc_layers(model)[0])  # pyright: ignore[reportDeprecated]
    with pytest.raises(ValueError, match=r"0\.weight is computed from weight_g, weight_v"):
        sdnet.attach(model, sgd(model))


def test_a_parametrization_that_came_later_is_refused_before_the_step() -> None:
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    register_parametrization(csc_layers(model)[1], "weight", Doubled())
    before = bits(model)
    model(images()).square().sum().backward()
    with pytest.raises(ValueError, match="without right_inverse"):
        optimizer.step()
    assert bits(model) == before


def test_fully_sharded_dictionaries_on_two_ranks_train_as_on_one(tmp_path: Path) -> None:
    run_two_ranks("fsdp_ranks.py", tmp_path)
    found = torch.load(tmp_path / "rank0.pt", weights_only=True)
    model = network()
    optimizer = sgd(model)
    sdnet.attach(model, optimizer)
    train(model, optimizer, 2)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
