"""All layers' power iterations at once, against those of one layer at a time in fp64."""

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from sdnet.kernels import step_sizes
from sdnet.kernels.reference import Pair
from sdnet.kernels.step_sizes import DictionaryState, initial_power_vector
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
    shape, size, stride, padding, last = SHAPES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weight = weight.contiguous(memory_format=torch.channels_last) if last else weight
    power_vector = initial_power_vector((1, shape[1], *size)).to(DEVICE)
    return DictionaryState(weight, power_vector, torch.full((), torch.nan, device=DEVICE), stride, padding)


def wanted(dictionary: DictionaryState, iterations: int) -> DictionaryState:
    """A copy after the same work in fp64."""
    weight, power_vector, step_size, *rest = dictionary
    copy = DictionaryState(weight.double(), power_vector.double(), step_size.double(), *rest)
    # One layer at a time, with PyTorch's own operators, whose arithmetic follows the tensors' type but for the
    # power iteration's deliberate fp32: that is repeated here.
    copy.weight.div_(torch.linalg.vector_norm(copy.weight, dim=(1, 2, 3), keepdim=True))
    for _ in range(iterations):
        codes = torch.nn.functional.conv2d(copy.power_vector, copy.weight, None, copy.stride, copy.padding)
        image = torch.autograd.functional.vjp(
            lambda x: torch.nn.functional.conv2d(x, copy.weight, None, copy.stride, copy.padding),
            copy.power_vector,
            codes,
        )[1]
        assert isinstance(image, Tensor)
        copy.power_vector.copy_(image / image.norm())
        copy.step_size.copy_(0.9 / image.norm())
    return copy


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("implementation", "iterations"), [("fused", 2), ("torch", 1), ("torch", 3)])
def test_every_layer_follows(implementation: str, iterations: int) -> None:
    dictionaries = [dictionary_of(name) for name in SHAPES]
    expected = [wanted(dictionary, iterations) for dictionary in dictionaries]
    if implementation == "fused":
        triton_step_sizes.update_dictionaries(dictionaries, iterations, "ieee")
    else:
        for dictionary in dictionaries:
            step_sizes.update_dictionary(dictionary, iterations)
    for actual, right in zip(dictionaries, expected, strict=True):
        assert error(actual.weight, right.weight) <= 2e-6
        assert error(actual.power_vector, right.power_vector) <= 2e-6
        assert error(actual.step_size, right.step_size) <= 2e-6


@needs_interpreter
@pytest.mark.parametrize("precision", ["tf32", "ieee"], indirect=True)
def test_multiplies_in_tf32_where_cudnn_may(precision: str) -> None:
    ours, theirs = ([dictionary_of(name) for name in SHAPES] for _ in range(2))
    with faithful():
        triton_step_sizes.update_dictionaries(ours)
    for dictionary in theirs:
        with convolutions_in_tf32() if precision == "tf32" else nullcontext():
            step_sizes.update_dictionary(dictionary)
    expected = [wanted(dictionary_of(name), 1) for name in SHAPES]
    for name, mine, other, right in zip(SHAPES, ours, theirs, expected, strict=True):
        for part in ("power_vector", "step_size"):
            actual, torch_s, exact = (getattr(each, part) for each in (mine, other, right))
            floor = 2e-4 if precision == "tf32" else 2e-6
            assert error(actual, exact) <= max(2 * error(torch_s, exact), floor), f"{part} of {name}"
        if name != "one":  # a vector of one element is 1 in any precision
            assert (error(mine.power_vector, right.power_vector) > 5e-5) == (precision == "tf32")


def test_the_door_takes_what_the_device_allows() -> None:
    dictionaries = [dictionary_of(name) for name in SHAPES]
    expected = [wanted(dictionary, 1) for dictionary in dictionaries]
    assert [step_sizes.fits(dictionary) for dictionary in dictionaries] == [DEVICE == "cuda"] * len(SHAPES)
    step_sizes.update_dictionaries(dictionaries)
    tolerance = 2e-3 if DEVICE == "cuda" else 2e-6
    assert all(error(a.step_size, e.step_size) <= tolerance for a, e in zip(dictionaries, expected, strict=True))


def test_nothing_is_hidden_and_nothing_divided_by_zero() -> None:
    zeros, broken = dictionary_of("square"), dictionary_of("strided")
    zeros.weight.zero_()
    broken.weight[0, 0, 0, 0] = torch.nan
    triton_step_sizes.update_dictionaries([zeros, broken])
    assert not zeros.weight.any()
    assert not zeros.power_vector.any()
    assert zeros.step_size.isfinite()
    assert broken.step_size.isnan()


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

    for name in ("project", "analysis", "synthesis", "finish"):
        monkeypatch.setattr(triton_step_sizes, f"{name}_kernel", Noted(name))
    triton_step_sizes.update_dictionaries([dictionary_of(name) for name in SHAPES])
    assert launched == ["project", "analysis", "synthesis", "synthesis", "finish"]
