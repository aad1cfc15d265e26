"""`Coding`: the options of a sparse coding, their checks, and the keyword arguments made of them."""

import inspect
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
import torch

import sdnet
from sdnet.kernels import csc_encode, explain
from sdnet.kernels.coding import CODING_FIELDS, Coding

X, WEIGHT = torch.ones(1, 2, 5, 5), torch.ones(3, 2, 3, 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_steps": 0}, "n_steps is 0; it must be an int of at least 1."),
        ({"n_steps": 2.5}, "n_steps is 2.5; it must be an int of at least 1."),
        ({"n_steps": True}, "n_steps is True; it must be an int of at least 1."),
        ({"n_steps": "2"}, "n_steps is '2'; it must be an int of at least 1."),
        ({"n_steps": None}, "n_steps is None; it must be an int of at least 1."),
        ({"n_dict": 0}, "n_dict is 0; it must be an int of at least 1."),
        ({"n_dict": 1.5}, "n_dict is 1.5; it must be an int of at least 1."),
        ({"mu": -0.5}, "mu is -0.5; it must be a finite number of at least 0."),
        ({"mu": float("nan")}, "mu is nan; it must be a finite number of at least 0."),
        ({"mu": float("inf")}, "mu is inf; it must be a finite number of at least 0."),
        ({"mu": "0.1"}, "mu is '0.1'; it must be a finite number of at least 0."),
        ({"mu": False}, "mu is False; it must be a finite number of at least 0."),
        ({"nonnegative": "no"}, "nonnegative is 'no'; it must be True or False."),
        ({"nonnegative": 1}, "nonnegative is 1; it must be True or False."),
        ({"solver": "lista"}, "solver is 'lista'; it must be one of ista, fista, sdnet."),
        ({"solver": None}, "solver is None; it must be one of ista, fista, sdnet."),
        ({"data_term": "huber"}, "data_term is 'huber'; it must be one of squared, norm."),
        ({"data_term": 2}, "data_term is 2; it must be one of squared, norm."),
    ],
    ids=str,
)
def test_a_bad_option_gets_one_sentence_wherever_it_is_given(options: dict[str, Any], sentence: str) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: Coding(**options),
        lambda: csc_encode(X, WEIGHT, 0.1, 0.1, **options),
        lambda: explain(X, WEIGHT, 0.1, 0.1, **options),
        lambda: sdnet.CSCConv2d(2, 3, 3, **options),
        lambda: sdnet.create_model("sdnet18", 10, **options),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:  # noqa: PT011  # the whole sentence is compared
            call()
        assert str(caught.value) == sentence


def test_numpy_scalars_become_plain_numbers() -> None:
    coding = Coding(n_steps=np.int64(3), mu=np.float32(0.5), nonnegative=np.bool_(False), n_dict=np.int32(2))  # pyright: ignore[reportArgumentType]
    assert coding == Coding(n_steps=3, mu=0.5, nonnegative=False, n_dict=2)
    assert [type(value) for value in coding.values()] == [int, float, bool, str, str, int]


def test_a_coding_is_frozen_and_can_be_a_key() -> None:
    with pytest.raises(FrozenInstanceError):
        Coding().n_steps = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert {Coding(mu=1): "one"}[Coding(mu=1.0)] == "one"


@pytest.mark.parametrize(
    "function", [csc_encode, explain, sdnet.CSCConv2d, sdnet.create_model], ids=lambda f: f.__name__
)
def test_every_function_shows_the_options_with_the_same_defaults(function: Callable[..., Any]) -> None:
    parameters = inspect.signature(function).parameters
    for field in fields(Coding):
        assert parameters[field.name].default == field.default
        assert parameters[field.name].kind is inspect.Parameter.KEYWORD_ONLY
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: csc_encode(X, WEIGHT, 0.1, 0.1, dilation=2),
            "csc_encode has no argument 'dilation'; its arguments are x, weight, step_size, lam, stride, padding, "
            "impl, keep_residuals, z0, tolerance, callback, prox, n_steps, mu, nonnegative, solver, data_term, n_dict.",
        ),
        (
            lambda: sdnet.create_model("sdnet18", 10, steps=2),
            "create_model has no argument 'steps'; its arguments are name, num_classes, in_channels, stem, width, "
            "image_size, shortcut, lam, learn_lam, impl, pretrained, "
            "n_steps, mu, nonnegative, solver, data_term, n_dict.",
        ),
    ],
    ids=["csc_encode", "create_model"],
)
def test_an_unknown_argument_gets_one_sentence_that_lists_what_is_allowed(
    call: Callable[[], Any], sentence: str
) -> None:
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value) == sentence


def test_the_options_of_a_layer_are_attributes() -> None:
    layer: Any = sdnet.CSCConv2d(2, 3, 3, n_steps=3)
    assert {name: getattr(layer, name) for name in CODING_FIELDS} == vars(Coding(n_steps=3))
    layer.n_steps = 50
    layer.nonnegative = False
    assert layer.coding == Coding(n_steps=50, nonnegative=False)
    with pytest.raises(ValueError, match="n_steps is 0"):
        layer.n_steps = 0
    assert layer.n_steps == 50


def test_an_option_changed_on_a_layer_is_in_force_at_the_next_forward() -> None:
    layer: Any = sdnet.CSCConv2d(2, 3, 3, lam=0.01, input_size=5)
    with torch.no_grad():
        before = layer(X)
        layer.n_steps = 1
        one = layer(X)
        expected = csc_encode(X, layer.weight, layer.step_size, 0.01, padding=1, n_steps=1)
    torch.testing.assert_close(one, expected)
    assert not torch.equal(before, one)
