"""What the check of a candidate sees: planted faults in results, in memory, and in their repetition."""

from collections.abc import Callable
from functools import cache
from itertools import count

import pytest
import torch
from torch import Tensor

from sdnet.kernels.qualify import compare
from sdnet.kernels.qualify.candidates import Candidate
from sdnet.kernels.qualify.compare import Comparison, Inputs, Results
from sdnet.kernels.qualify.guards import GuardedMemory
from sdnet.kernels.qualify.key import Call
from sdnet.kernels.qualify.verdicts import TORCH

from .conftest import CPU

CALL = Call(6, 16, (3, 3), (1, 1), (1, 1), (8, 8), 8, "float32", channels_last=True)
PLANTED = Candidate("planted", '["fused"')

results_of = compare.results_of


def scaled(name: str, factor: float) -> Callable[[Results], None]:
    def spoil(results: Results) -> None:
        results[name] = results[name] * factor

    return spoil


def holed(name: str, where: tuple[int | slice, ...], value: float = 0.0) -> Callable[[Results], None]:
    def spoil(results: Results) -> None:
        results[name] = results[name].clone()
        results[name][where] = value

    return spoil


calls = count()


def unstable(results: Results) -> None:
    results["d_weight"] = results["d_weight"] * (1 + 1e-6 * next(calls))


@cache
def comparison_of(call: Call) -> Comparison:
    return Comparison(call, CPU)


def checked(spoil: Callable[[Results], object], monkeypatch: pytest.MonkeyPatch, call: Call = CALL) -> str:
    comparison = comparison_of(call)

    def planted(path: str, inputs: Inputs, keep_residuals: bool = False) -> Results:
        found = results_of(TORCH, inputs, keep_residuals)
        if path != TORCH:
            spoil(found)
        return found

    monkeypatch.setattr(compare, "results_of", planted)
    return comparison.check(PLANTED)[0]


IMAGE, PIXEL, CHANNEL = (3,), (slice(None), slice(None), 2, 5), (slice(None), 4)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda results: None, ""),
        (scaled("codes", 1.01), "codes is off by 0.01, allowed is 0.002"),
        (scaled("d_x", 1.1), "d_x is off by 0.1, allowed is"),
        (scaled("d_weight", -1.0), "d_weight is off by 2, allowed is"),
        (scaled("d_lam", 0.0), "d_lam is off by 1, allowed is"),
        (holed("d_weight", (0, 0, 0, 0), float("nan")), "d_weight has NaN or infinity where PyTorch has none"),
        (holed("codes", (0, 0, 0, 0), float("inf")), "codes has NaN or infinity where PyTorch has none"),
        (unstable, "two calls gave different bits in d_weight"),
        (lambda results: results.pop("d_lam"), "d_lam is off by inf"),
    ],
    ids=range(9),
)
def test_a_wrong_result_is_a_fault(
    spoil: Callable[[Results], object], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = checked(spoil, monkeypatch)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


@pytest.mark.parametrize("name", ["codes", "d_x"])
@pytest.mark.parametrize(("where", "what"), [(IMAGE, "an image"), (PIXEL, "a pixel"), (CHANNEL, "a channel")])
def test_a_missing_image_pixel_or_channel_is_a_fault_however_large_the_rest(
    name: str, where: tuple[int | slice, ...], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "allowed", lambda *_: 1.0)  # as if the rest were large
    found = checked(holed(name, where), monkeypatch, CALL._replace(batch=64))
    assert found.startswith(f"{what} of {name} is off by ")
    assert found.endswith(" of the mean")


def test_the_bounds() -> None:
    half, many = CALL._replace(dtype="float16"), 10**8
    assert compare.allowed("codes", CALL, tf32=False, of_torch=0.0, codes=many) == 1e-5
    assert compare.allowed("codes", CALL, tf32=True, of_torch=0.0, codes=many) == 2e-3
    assert compare.allowed("codes", half, tf32=False, of_torch=3e-3, codes=many) == 6e-3
    assert compare.allowed("codes", half._replace(dtype="bfloat16"), tf32=False, of_torch=0.0, codes=many) == 2e-2
    assert compare.allowed("d_x", CALL, tf32=False, of_torch=0.0, codes=10_000) == pytest.approx(0.02, rel=1e-2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [2, 40])
def test_pytorch_itself_is_right_and_half_of_the_codes_are_active(dtype: str, batch: int) -> None:
    call = CALL._replace(dtype=dtype, batch=batch, n_steps=3, nonnegative=False, has_mu=True, lam_per_sample=True)
    comparison = Comparison(call, CPU)
    assert comparison.check(Candidate("torch", TORCH))[0] == ""
    assert 0.2 < float((comparison.truth["codes"] != 0).float().mean()) < 0.9
    assert comparison.truth["d_lam"].shape == (batch, 1, 1, 1)
    half = dtype != "float32"
    assert half == (max(comparison.of_torch.values()) > 1e-5)


def test_where_pytorch_is_off_nothing_can_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "WORST_TORCH", -1.0)
    assert "PyTorch itself is off" in checked(lambda _: None, monkeypatch)


def beyond(tensor: Tensor, offset: int) -> Tensor:
    """An element of the memory before or behind a dense tensor."""
    return tensor.as_strided((1,), (1,), tensor.storage_offset() + offset)


@pytest.mark.parametrize(("offset", "harmed"), [(0, 0), (59, 0), (60, 1), (-1, 1)])
def test_a_write_before_or_behind_a_tensor_is_seen(offset: int, harmed: int) -> None:
    memory = GuardedMemory()
    with memory:
        other, tensor = torch.empty(7, dtype=torch.float16), torch.empty(3, 4, 5)
        made = torch.empty_like(tensor.to(memory_format=torch.contiguous_format)), tensor.new_empty(2, 2)
    assert tensor.isnan().all()
    assert other.isnan().all()
    assert all(each.isnan().all() for each in made)
    beyond(tensor, offset).fill_(1)
    assert memory.harmed() == harmed


def test_guarded_tensors_have_the_strides_that_were_asked_for() -> None:
    with GuardedMemory():
        last = torch.empty(2, 3, 4, 5, memory_format=torch.channels_last)
        strided = torch.empty_strided((2, 3), (1, 2), dtype=torch.int32)
        nothing = torch.empty(0, 3)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert last.data_ptr() % 16 == 0
    assert strided.stride() == (1, 2)
    assert nothing.shape == (0, 3)


def test_a_candidate_that_writes_behind_its_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(results: Results) -> None:
        output = torch.empty(5)
        output.fill_(0)
        results["scratch"] = output
        if output.untyped_storage().nbytes() > 20:  # only under the guards is there memory of ours behind it
            beyond(output, 8).fill_(0)

    assert checked(spoil, monkeypatch) == "it wrote before or behind 1 of its tensors"
