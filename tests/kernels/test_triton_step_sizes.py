"""The step sizes of all layers at once, against PyTorch's operators layer by layer in fp64."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.kernels import dictionaries as all_devices
from sdnet.kernels import step_sizes
from sdnet.kernels.reference import Pair
from sdnet.kernels.step_sizes import DictionaryState, initial_power_vector
from sdnet.kernels.triton_path import lanczos
from sdnet.kernels.triton_path import step_sizes as triton_step_sizes

from ..triton_interpreter.numerics import convolutions_in_tf32, faithful, needs_interpreter
from .cases import DEVICE

# (weight's shape, the image's size, stride, padding, whether channels lie last)
SHAPES: dict[str, tuple[tuple[int, int, int, int], Pair, Pair, Pair, bool]] = {
    "picture": ((20, 3, 7, 7), (11, 12), (2, 2), (3, 3), False),
    "square": ((18, 17, 3, 3), (9, 8), (1, 1), (1, 1), True),
    "strided": ((33, 18, 3, 3), (7, 10), (2, 1), (1, 1), False),
    "sparse": ((5, 70, 1, 2), (5, 4), (3, 2), (0, 1), True),
    "one": ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), False),
}


def dictionary_of(name: str) -> DictionaryState:
    """A random dictionary; its power vector has the dictionary's memory format."""
    shape, size, stride, padding, last = SHAPES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    power_vector = initial_power_vector((1, shape[1], *size)).to(DEVICE)
    if last:
        weight, power_vector = (
            tensor.contiguous(memory_format=torch.channels_last) for tensor in (weight, power_vector)
        )
    return DictionaryState(weight, power_vector, torch.full((), torch.nan, device=DEVICE), stride, padding)


def expected_of(dictionary: DictionaryState, iterations: int = 1) -> DictionaryState:
    """A copy after the same work in fp64 by PyTorch's operators."""
    weight, power_vector, step_size, *rest = dictionary
    copy = DictionaryState(weight.double(), power_vector.double(), step_size.double(), *rest)
    step_sizes.update_dictionary(copy, iterations)
    return copy


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("implementation", "iterations"), [("triton", 2), ("torch", 1), ("torch", 2)])
def test_agrees_with_double_precision(implementation: str, iterations: int) -> None:
    dictionaries = [dictionary_of(name) for name in SHAPES]
    expected = [expected_of(dictionary, iterations) for dictionary in dictionaries]
    if implementation == "triton":
        triton_step_sizes.update_dictionaries(dictionaries, iterations, "ieee")
    else:
        for dictionary in dictionaries:
            step_sizes.update_dictionary(dictionary, iterations)
    for actual, right in zip(dictionaries, expected, strict=True):
        assert error(actual.weight, right.weight) <= 2e-6
        assert error(actual.power_vector, right.power_vector) <= 2e-6
        assert error(actual.step_size, right.step_size) <= 2e-6


def test_the_memory_format_of_the_power_vector_does_not_change_the_result() -> None:
    for update in (triton_step_sizes.update_dictionaries, all_devices.update_dictionaries):
        dense, last = dictionary_of("square"), dictionary_of("square")
        dense = dense._replace(power_vector=dense.power_vector.contiguous())
        assert not last.power_vector.is_contiguous()
        update([dense, last])
        assert torch.equal(dense.power_vector, last.power_vector)
        assert torch.equal(dense.step_size, last.step_size)


@needs_interpreter
@pytest.mark.parametrize("precision", ["tf32", "ieee"], indirect=True)
def test_multiplies_in_tf32_where_cudnn_may(precision: str) -> None:
    names = tuple(SHAPES)
    ours, theirs = ([dictionary_of(name) for name in names] for _ in range(2))
    with faithful():
        triton_step_sizes.update_dictionaries(ours)
    for dictionary in theirs:
        with convolutions_in_tf32() if precision == "tf32" else nullcontext():
            step_sizes.update_dictionary(dictionary)
    expected = [expected_of(dictionary_of(name)) for name in names]
    for name, mine, other, right in zip(names, ours, theirs, expected, strict=True):
        for part in ("power_vector", "step_size"):
            actual, torch_s, exact = (getattr(each, part) for each in (mine, other, right))
            floor = 2e-4 if precision == "tf32" else 2e-6
            assert error(actual, exact) <= max(2 * error(torch_s, exact), floor), f"{part} of {name}"
        if name != "one":  # a vector of one element is 1 in any precision
            assert (error(mine.power_vector, right.power_vector) > 5e-5) == (precision == "tf32")


def test_dictionaries_on_a_gpu_take_triton_in_either_memory_format() -> None:
    dictionaries = [dictionary_of(name) for name in SHAPES]
    expected = [expected_of(dictionary) for dictionary in dictionaries]
    assert [all_devices.fits(dictionary) for dictionary in dictionaries] == [DEVICE == "cuda"] * len(SHAPES)
    all_devices.update_dictionaries(dictionaries)
    tolerance = 2e-3 if DEVICE == "cuda" else 2e-6
    assert all(error(a.step_size, e.step_size) <= tolerance for a, e in zip(dictionaries, expected, strict=True))


@pytest.mark.parametrize(
    ("weight", "size", "padding", "reached"),
    [((64, 3, 3, 3), 4096, 1, True), ((65, 3, 3, 3), 4096, 1, False), ((64, 3, 3, 3), 64, 4096, False)],
)
def test_offsets_of_32_bits_must_reach_the_codes(
    weight: tuple[int, ...], size: int, padding: int, reached: bool
) -> None:
    tensors = (torch.empty(shape, device="meta") for shape in (weight, (1, weight[1], size, size), ()))
    dictionary = DictionaryState(*tensors, stride=(1, 1), padding=(padding, padding))
    assert all_devices.within_reach(dictionary) is reached


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_state_stays_finite_when_weights_are_not_and_serves_again_once_they_are(implementation: str) -> None:
    module: Any = triton_step_sizes if implementation == "triton" else all_devices
    zeros, broken = dictionary_of("square"), dictionary_of("strided")
    kept = [zeros.power_vector.clone(), broken.power_vector.clone(), broken.weight.clone()]
    zeros.weight.zero_()
    broken.weight[0, 0, 0, 0] = torch.nan
    broken.step_size.fill_(0.25)
    module.update_dictionaries([zeros, broken])
    assert not zeros.weight.any()
    assert zeros.step_size.isfinite()
    assert broken.step_size == 0.25
    assert torch.equal(zeros.power_vector, kept[0])
    assert torch.equal(broken.power_vector, kept[1])
    broken.weight.copy_(kept[2])
    module.update_dictionaries([broken])
    assert error(broken.step_size, expected_of(dictionary_of("strided")).step_size) <= 2e-4


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_a_power_vector_without_use_is_replaced(implementation: str, value: float) -> None:
    module: Any = triton_step_sizes if implementation == "triton" else all_devices
    dictionary = dictionary_of("square")
    expected = dictionary_of("square")
    expected.power_vector.zero_()
    expected = expected_of(expected)
    dictionary.power_vector.fill_(value)
    module.update_dictionaries([dictionary])
    assert error(dictionary.power_vector, expected.power_vector) <= 2e-6
    assert error(dictionary.step_size, expected.step_size) <= 2e-6


def test_a_plan_is_made_once_for_the_same_tensors() -> None:
    dictionaries = [dictionary_of("one"), dictionary_of("sparse")]
    triton_step_sizes.plan_of.cache_clear()
    for _ in range(3):
        triton_step_sizes.update_dictionaries(dictionaries)
    assert triton_step_sizes.plan_of.cache_info().misses == 1
    moved = dictionaries[0]._replace(power_vector=dictionaries[0].power_vector.clone())
    triton_step_sizes.update_dictionaries([moved, dictionaries[1]])
    assert triton_step_sizes.plan_of.cache_info().misses == 2


def test_launches_do_not_grow_with_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> "Noted":
            assert grid[0] > 0
            return self

        def __call__(self, *_: object, **__: object) -> None:
            launched.append(self.name)

    multiply = ["analysis", "synthesis", "synthesis"]
    beginning = ["project", "mean", *["pattern"] * 6, "start", "extend", *multiply]
    expected = [*beginning, "combine", "extend", *multiply, "remove", "extend", *multiply, "finish", "step"]
    for name in set(expected):
        monkeypatch.setattr(lanczos, f"{name}_kernel", Noted(name))
    triton_step_sizes.update_dictionaries([dictionary_of(name) for name in SHAPES])
    assert launched == expected
    assert len(launched) == 25
