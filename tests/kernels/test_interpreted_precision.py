"""bf16 and tf32 in the Triton kernels without a GPU, by an interpreter that knows both.

For the whole operator the rule is that of a GPU's tests: an error against fp64 of at most twice torch's own in the same
type. A kernel by itself rounds once: its error in bf16 is that of its result's rounding.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdnet.kernels import reference
from sdnet.kernels.coding import Coding
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path.correlation.weight_gradient import weight_correlation
from sdnet.kernels.triton_path.fused.path import FusedPath
from sdnet.kernels.triton_path.layer import Layer
from sdnet.kernels.triton_path.pointwise import mask, shrink_step, subtract
from sdnet.kernels.triton_path.tiles import by_rule

from ..triton_interpreter.numerics import convolutions_in_tf32, faithful, needs_interpreter, to_tf32
from . import test_correlation
from .cases import DEVICE, Case
from .exactness import assert_as_exact_as_torch, errors
from .test_correlation import FEW, POINTERS, error, expected

pytestmark = needs_interpreter


@pytest.fixture(autouse=True)
def _faithful() -> Iterator[None]:
    with faithful():
        yield


STEM = Case(3, 18, (7, 7), (2, 2), (11, 10), batch=2)
SMALL_STEM = Case(3, 18, size=(8, 7), batch=2)
STRIDED = Case(17, 21, (3, 2), (2, 1), (8, 7), batch=2)
FISTA = Case(9, 12, (3, 2), size=(7, 6), batch=2, n_steps=4, mu=0.5, nonnegative=False)
OFFICIAL = Case(9, 12, (3, 2), size=(7, 6), batch=2, n_steps=4, solver="sdnet", data_term="norm", n_dict=2)
CASES = {
    "a stem": STEM,
    "a contiguous stem": replace(STEM, channels_last=False),
    "a small stem": SMALL_STEM,
    "odd channels, strided": STRIDED,
    "odd channels, strided, contiguous": replace(STRIDED, channels_last=False),
    "FISTA, two-sided, elastic net": FISTA,
    "the official loop, norm, two dictionaries, contiguous": replace(OFFICIAL, channels_last=False),
}
both_paths = pytest.mark.parametrize("steps", ["fused", "cudnn"])


@both_paths
@pytest.mark.parametrize("name", CASES)
def test_bf16_as_exact_as_torch_s(name: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    assert_as_exact_as_torch(CASES[name], torch.bfloat16)


@both_paths
@pytest.mark.parametrize("precision", ["tf32"], indirect=True)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("a stem", "odd channels, strided")])
def test_tf32_as_exact_as_torch_s(name: str, precision: str, steps: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    with convolutions_in_tf32():
        # In dL/dlam, a sum of both signs, the rounding of thousands of products all but cancels: by chance.
        assert_as_exact_as_torch(CASES[name], torch.float32, lam_floor=2e-5)


@both_paths
@pytest.mark.parametrize("precision", ["tf32", "ieee"], indirect=True)
def test_products_are_in_tf32_where_cudnn_may_and_not_otherwise(
    precision: str, steps: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", steps)
    found = errors(SMALL_STEM, torch.float32, "triton")
    # Of pointwise steps the dictionary's gradient alone is Triton's product: the others are the CPU's, in fp32.
    names = ("codes", "x", "weight") if steps == "fused" else ("weight",)
    if precision == "tf32":
        assert all(1e-4 < found[name] < 1e-3 for name in names), found
    else:
        assert all(error < 1e-6 for error in found.values()), found


@pytest.mark.parametrize("stride", [1, 2])
def test_bf16_by_descriptors_as_exact_as_torch_s(
    stride: int, descriptor_reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDNET_TRITON_PATH", "fused")
    case = Case(32, 16, stride=(stride, 1), size=(3, 2), batch=64, n_steps=3)
    assert_as_exact_as_torch(case, torch.bfloat16)
    assert descriptor_reads


STEPS = {
    "pointers": Case(17, 21, (3, 2), (2, 1), (6, 5), batch=2, channels_last=False),
    "few channels": Case(3, 18, (5, 5), (2, 2), (8, 7), batch=2),
    "descriptors": Case(16, 24, (3, 3), (2, 1), (3, 2), batch=64),
}


@pytest.mark.parametrize("form", STEPS)
def test_a_fused_step_rounds_its_result_alone(form: str, descriptor_reads: list[Any]) -> None:
    case = STEPS[form]
    (x, weight, _), strides, padding = (leaf.detach() for leaf in case.leaves(torch.bfloat16)), case.stride, (1, 1)
    layer = Layer(weight, case.batch, case.size, strides, padding, case.layout)

    def codes(seed: int) -> Tensor:
        values = torch.randn(case.batch, case.atoms, *layer.codes_size, generator=torch.Generator().manual_seed(seed))
        return values.relu().to(x).contiguous(memory_format=case.layout)

    z, previous, m, later = map(codes, range(4))
    ends = (0.7, 1.9), (0.1, 0.4)
    scale, lam = (torch.linspace(*each, case.batch, device=DEVICE).view(-1, 1, 1, 1) for each in ends)
    p = Problem(torch.tensor(0.3, device=DEVICE), lam, Coding(n_steps=3, mu=0.5), strides, padding)
    exact = p._replace(step_size=p.step_size.double(), lam=lam.double())
    wide = weight.double()
    through = reference.analysis(x.double(), wide, strides, padding)
    made = reference.synthesis(m.double(), wide, case.size, strides, padding)

    path = FusedPath(layer, p, by_rule(layer.shape))
    found, after = path.proximal_step(x, z, previous, 0.28, scale, 0.43)
    v = exact.damping * (1.28 * z.double() - 0.28 * previous.double()) + exact.gamma * scale * through
    assert_rounded_once(found, reference.shrink(v, exact.gamma * exact.lam, True))
    assert_rounded_once(after, 1.43 * found.double() - 0.43 * z.double())

    found, d_y = path.codes_gradient(x, m, z, 0.28, later, 0.43)
    direct = exact.damping * m.double() - through
    assert_rounded_once(found, (z != 0) * (1.28 * direct - 0.43 * later.double()))
    assert_rounded_once(d_y, direct)

    assert_rounded_once(path.residual(x, m), x.double() - made)
    assert_rounded_once(path.residual_gradient(m, scale, x), exact.gamma * scale * made + x.double())
    assert bool(descriptor_reads) == (form == "descriptors")


def assert_rounded_once(actual: Tensor | None, right: Tensor) -> None:
    assert actual is not None
    assert actual.dtype == torch.bfloat16
    assert error(actual, right) <= 1.01 * error(right.bfloat16(), right)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_a_pointwise_kernel_rounds_its_result_alone(nonnegative: bool) -> None:
    v, z, previous = torch.randn(3, 2, 31, 7, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    step_size, lam = (torch.tensor(value, device=DEVICE) for value in (0.7, 0.5))
    p = Problem(step_size, lam, Coding(3, 0.3, nonnegative), (1, 1), (0, 0))
    u = 1.4 * z.double() - 0.4 * previous.double() + p.step_size.double() * v.double()
    right = reference.proximal(u, p.step_size.double(), p.lam.double(), p.coding.mu, nonnegative)
    assert_rounded_once(shrink_step(v, p, z, previous, 0.4), right)
    assert_rounded_once(subtract(v, z), v.double() - z.double())
    codes = z.relu()
    assert_rounded_once(mask(v, codes, minus=previous), (codes != 0) * (v.double() - previous.double()))
    assert torch.equal(mask(v, codes), torch.where(codes == 0, 0, v))


CORRELATIONS = test_correlation.CASES


@pytest.mark.parametrize("case", [*CORRELATIONS[:2], *(case for case in CORRELATIONS if case.tile)], ids=str)
def test_a_weight_correlation_rounds_its_result_alone(case: test_correlation.CorrelationCase) -> None:
    pairs, weight = case.tensors(torch.bfloat16)
    actual = weight_correlation(pairs, weight, case.stride, case.padding, "tf32", case.tile, case.splits)
    assert_rounded_once(actual, expected(pairs, weight, case.stride, case.padding))


@pytest.mark.parametrize("case", [case for case in CORRELATIONS if case.tile in (FEW, POINTERS)], ids=str)
def test_a_weight_correlation_in_tf32_rounds_its_operands_alone(case: test_correlation.CorrelationCase) -> None:
    pairs, weight = case.tensors(torch.float32)
    actual = weight_correlation(pairs, weight, case.stride, case.padding, "tf32", case.tile, case.splits)
    rounded = [(to_tf32(r), to_tf32(m), scale) for r, m, scale in pairs]
    assert error(actual, expected(pairs, weight, case.stride, case.padding)) > 1e-4
    assert error(actual, expected(rounded, weight, case.stride, case.padding)) <= 2e-6
