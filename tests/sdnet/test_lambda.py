"""Lambda of a layer: what an assignment takes and refuses, what reads it, and what leaves it alone."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdnet import CSCConv2d
from sdnet.kernels import csc_encode
from sdnet.state import CodingState


def images(batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def layer(**options: Any) -> CSCConv2d:
    torch.manual_seed(0)
    return CSCConv2d(3, 8, 3, input_size=(9, 8), **options)


def expected_codes(csc: CSCConv2d, x: Tensor, lam: float | Tensor) -> Tensor:
    return csc_encode(x, csc.weight, csc.step_size, lam, padding=1)


@pytest.mark.parametrize(
    "lam",
    [
        0.4,
        1,
        torch.tensor(0.4),
        torch.tensor([0.2, 0.5]),
        torch.tensor([0.2, 0.5], dtype=torch.float64).view(2, 1, 1, 1),
        torch.tensor([1, 2]),
        torch.tensor([0.2, 9.0, 0.5, 9.0])[::2],
        torch.tensor(0.4).expand(2),
    ],
    ids=["float", "int", "0-d", "[N]", "[N, 1, 1, 1] in double", "ints", "strided", "expanded"],
)
def test_the_next_forward_uses_the_assigned_lambda(lam: float | Tensor) -> None:
    csc, x = layer(), images()
    csc.lam = lam
    dense = lam.clone() if isinstance(lam, Tensor) else lam
    torch.testing.assert_close(csc(x), expected_codes(csc, x, dense), rtol=0, atol=0)
    assert csc.lam.dtype == torch.float32
    assert csc.lam.is_contiguous()


def test_the_forward_can_be_given_another_lambda_for_one_call() -> None:
    csc, x = layer(), images()
    before = csc(x)
    torch.testing.assert_close(csc(x, lam=0.4), expected_codes(csc, x, 0.4), rtol=0, atol=0)
    torch.testing.assert_close(csc(x), before, rtol=0, atol=0)


def test_a_lambda_that_was_read_can_be_restored() -> None:
    csc = layer(lam=0.25)
    before = csc.lam
    csc.lam = 0.5
    assert before.item() == 0.25
    csc.lam = before
    assert csc.lam.item() == 0.25


def test_an_augmented_assignment_changes_lambda() -> None:
    csc = layer(lam=0.25)
    csc.lam *= 2
    assert csc.lam.item() == 0.5


def test_a_later_change_of_the_assigned_tensor_does_not_reach_the_layer() -> None:
    csc, lam = layer(), torch.tensor([0.25, 0.5])
    csc.lam = lam
    lam.fill_(9)
    assert csc.double().lam.flatten().tolist() == [0.25, 0.5]


def test_an_assignment_of_the_same_shape_writes_to_the_memory_that_forwards_read() -> None:
    """A captured CUDA graph then uses the new value."""
    csc = layer()
    address = csc._lam.data_ptr()
    csc.lam = 0.5
    csc.lam = torch.tensor(0.75)
    assert (csc._lam.data_ptr(), csc._lam.item()) == (address, 0.75)
    csc.lam = torch.tensor([0.1, 0.2])
    address = csc._lam.data_ptr()
    csc.lam = torch.tensor([0.3, 0.4]).view(2, 1, 1, 1)
    assert csc._lam.data_ptr() == address


def test_two_forwards_with_two_lambdas_before_one_backward() -> None:
    csc, x = layer(), images()
    expected = torch.autograd.grad(csc(x, lam=0.2).sum() + csc(x, lam=0.6).sum(), csc.weight)
    csc.lam = 0.2
    first = csc(x).sum()
    csc.lam = 0.6
    torch.testing.assert_close(torch.autograd.grad(first + csc(x).sum(), csc.weight), expected)


@pytest.mark.parametrize(
    ("lam", "sentence"),
    [
        (-1.0, "lam is -1.0; it must be a finite number of at least 0"),
        (float("inf"), "lam is inf; it must be a finite number of at least 0"),
        (True, "lam is True; it must be a finite number"),
        ("0.1", "lam is '0.1'; it must be a finite number"),
        (None, "lam is None; it must be a finite number"),
        ([0.1, 0.2], r"lam is \[0.1, 0.2\]; it must be a finite number of at least 0, or a tensor"),
        (torch.tensor(-1.0), "lam is -1.0; it must be a finite number"),
        (torch.tensor([0.5, float("nan")]), r"lam is \[0.5, nan\]; it must be"),
        (torch.ones(2, 8), r"lam has shape \[2, 8\]; it must be"),
        (torch.ones(0), r"lam has shape \[0\]; it must be"),
        (torch.tensor(True), r"lam is a tensor of torch\.bool; it must be"),
        (torch.tensor(1j), r"lam is a tensor of torch\.complex64; it must be"),
        (torch.tensor(0.1, device="meta"), "lam is a tensor on the meta device; it must be"),
        (torch.tensor(0.1, requires_grad=True), r"requires a gradient.* give it to the forward, layer\(x, lam=lam\)"),
        (nn.Parameter(torch.tensor(0.1)), "requires a gradient"),
    ],
    ids=str,
)
def test_a_bad_lambda_is_refused_and_the_old_one_stays(lam: Any, sentence: str) -> None:
    csc = layer(lam=0.25)
    with pytest.raises(ValueError, match=sentence):
        csc.lam = lam
    assert csc.lam.item() == 0.25
    assert [name for name, _ in csc.named_parameters()] == ["weight"]


def test_a_gradient_reaches_the_lambda_of_the_forward() -> None:
    csc, lam = layer(), torch.tensor(0.1, requires_grad=True)
    csc(images(), lam=lam).sum().backward()
    assert lam.grad is not None
    assert lam.grad < 0


def to_double_and_back(csc: CSCConv2d) -> nn.Module:
    return csc.double().float()


@pytest.mark.parametrize(
    "change",
    [
        CSCConv2d.reset_parameters,
        CSCConv2d.half,
        CSCConv2d.bfloat16,
        to_double_and_back,
        copy.deepcopy,
        lambda csc: csc.to_empty(device="cpu"),
        lambda csc: csc.to(memory_format=torch.channels_last),
        lambda csc: csc.load_state_dict(layer(lam=0.7).state_dict()),
    ],
    ids=["reset_parameters", "half", "bfloat16", "double and float", "deepcopy", "to_empty", "channels_last", "load"],
)
@pytest.mark.parametrize("lam", [0.3, torch.tensor([0.3, 0.6])], ids=["number", "per sample"])
def test_what_changes_the_layer_leaves_lambda_alone(lam: float | Tensor, change: Any) -> None:
    csc = layer(lam=0.1)
    csc.lam = lam
    before = csc.lam
    changed = change(csc)
    changed = changed if isinstance(changed, CodingState) else csc
    assert changed.lam.dtype == torch.float32
    assert torch.equal(changed.lam, before)


def test_a_double_layer_has_lambda_in_double() -> None:
    def load_double(csc: CSCConv2d) -> None:
        csc.load_state_dict({name: t.double() for name, t in csc.state_dict().items()}, assign=True)

    for csc in (layer(lam=0.3).double(), layer(lam=0.3, dtype=torch.float64), layer(lam=0.1).double(), layer(lam=0.3)):
        csc.lam = 0.3
        if csc.weight.dtype == torch.float32:
            load_double(csc)
        assert csc.lam.dtype == torch.float64
        assert csc.lam.item() == 0.3
        assert csc.step_size.dtype == csc.power_vector.dtype == torch.float32
        assert csc(images(dtype=torch.float64)).dtype == torch.float64


def test_a_copy_has_a_lambda_and_a_state_of_its_own() -> None:
    csc = layer(lam=0.1)
    twin = copy.deepcopy(csc)
    twin.lam = 0.7
    twin.step_size.fill_(0.01)
    twin.power_vector.fill_(0)
    assert csc.lam.item() == pytest.approx(0.1)
    assert csc.step_size.item() > 0.02
    assert csc.power_vector.norm().item() == pytest.approx(1)


def test_lambda_is_no_part_of_the_state_dict() -> None:
    csc = layer()
    csc.lam = torch.tensor([0.3, 0.9])
    assert list(csc.state_dict()) == ["weight", "step_size", "power_vector"]


def test_lambda_of_a_shallow_copy_is_its_own() -> None:
    """`copy.copy` shares the parameters of a module; its attributes belong to the copy."""
    csc, x = layer(lam=0.1), images()
    copied = copy.copy(csc)
    copied.lam = 0.5
    assert copied.weight is csc.weight
    torch.testing.assert_close(csc(x), expected_codes(csc, x, 0.1))
    torch.testing.assert_close(copied(x), expected_codes(csc, x, 0.5))
