"""The pointwise kernels around cuDNN's convolutions, against the reference in fp64."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from sdnet.kernels.coding import Coding
from sdnet.kernels.reference import proximal
from sdnet.kernels.torch_path import Problem
from sdnet.kernels.triton_path.pointwise import BLOCK, mask, shrink_step, subtract

from .cases import DEVICE, Named

pytestmark = pytest.mark.usefixtures("poisoned")

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
"""Relative RMS error."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (3, 31, 7, 5)
assert torch.Size(SHAPE).numel() > BLOCK, "several programs, the last one partly filled"


@dataclass(frozen=True)
class PointwiseCase(Named):
    """A step."""

    dtype: Literal["fp32", "fp16"] = "fp32"
    layout: str = "contiguous"
    nonnegative: bool = True
    per_sample: bool = False
    mu: float = 0.0
    codes: bool = True
    beta: float = 0.0


CASES = [
    PointwiseCase(),
    PointwiseCase(codes=False),
    PointwiseCase(beta=0.4),
    PointwiseCase(nonnegative=False),
    PointwiseCase(per_sample=True),
    PointwiseCase(layout="channels_last", codes=False, per_sample=True, mu=0.3),
    PointwiseCase(layout="channels_last", nonnegative=False, beta=0.4, per_sample=True),
    PointwiseCase(nonnegative=False, mu=0.3, beta=0.4),
    PointwiseCase(dtype="fp16", layout="channels_last", mu=0.3, beta=0.4),
    PointwiseCase(dtype="fp16", nonnegative=False, per_sample=True, codes=False),
]


def random(*shape: int, seed: int, layout: str = "contiguous", dtype: str = "fp32") -> Tensor:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensor = tensor.to(DEVICE, torch.float16 if dtype == "fp16" else torch.float32)
    return tensor.contiguous(memory_format=LAYOUTS[layout])


def problem_of(case: PointwiseCase) -> Problem:
    lam = torch.linspace(0.2, 0.8, SHAPE[0]).view(-1, 1, 1, 1) if case.per_sample else torch.tensor(0.5)
    step_size = torch.tensor(0.7, device=DEVICE)
    coding = Coding(mu=case.mu, nonnegative=case.nonnegative)
    return Problem(step_size, lam.to(DEVICE), coding, (1, 1), (1, 1))


def error(actual: Tensor, wanted: Tensor) -> float:
    return float((actual.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_shrink_step(case: PointwiseCase) -> None:
    problem = problem_of(case)
    v, z, previous = (random(*SHAPE, seed=n, layout=case.layout, dtype=case.dtype) for n in range(3))
    y = z.double() + case.beta * (z.double() - previous.double()) if case.codes else 0
    u = y + problem.step_size.double() * v.double()
    wanted = proximal(u, problem.step_size.double(), problem.lam.double(), case.mu, case.nonnegative)
    actual = shrink_step(v, problem, z if case.codes else None, previous, case.beta)
    assert error(actual, wanted) <= TOLERANCE[v.dtype]
    assert bool(((actual == 0) == (wanted == 0)).all())
    assert actual.stride() == v.stride()


def test_shrink_step_in_place() -> None:
    v, z = random(*SHAPE, seed=0), random(*SHAPE, seed=1)
    kept = v.clone()
    outside = shrink_step(v, problem_of(PointwiseCase()), z)
    assert torch.equal(v, kept)
    inside = shrink_step(v, problem_of(PointwiseCase()), z, in_place=True)
    assert inside.data_ptr() == v.data_ptr()
    assert torch.equal(inside, outside)


def test_operands_of_another_layout_are_copied() -> None:
    v, z = random(*SHAPE, seed=0, layout="channels_last"), random(*SHAPE, seed=1)
    actual = shrink_step(v, problem_of(PointwiseCase()), z)
    assert torch.equal(
        actual, shrink_step(v, problem_of(PointwiseCase()), z.contiguous(memory_format=torch.channels_last))
    )


def test_one_lambda_expanded_to_every_sample() -> None:
    v = random(*SHAPE, seed=0)
    expanded = problem_of(PointwiseCase())._replace(lam=torch.tensor(0.5, device=DEVICE).expand(SHAPE[0], 1, 1, 1))
    assert torch.equal(shrink_step(v, expanded), shrink_step(v, problem_of(PointwiseCase())))


@pytest.mark.parametrize("nonnegative", [True, False])
def test_nan_propagates(nonnegative: bool) -> None:
    v = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0], device=DEVICE).view(1, 4, 1, 1)
    codes = shrink_step(v, problem_of(PointwiseCase(nonnegative=nonnegative))).flatten()
    assert codes[0].isnan()
    assert codes[1] == torch.inf
    assert codes[2] == (0 if nonnegative else -torch.inf)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n_dict", [1, 3])
def test_subtract(layout: str, n_dict: int) -> None:
    x = random(2, 11, 13, 9, seed=0, layout=layout)
    reconstruction = random(2, 11 * n_dict, 13, 9, seed=1, layout=layout)
    wanted = x.repeat(1, n_dict, 1, 1) - reconstruction
    actual = subtract(x, reconstruction, n_dict)
    assert torch.equal(actual, wanted)
    assert actual.stride() == reconstruction.stride()
    assert torch.equal(subtract(x, reconstruction, n_dict, in_place=True), wanted)
    assert torch.equal(reconstruction, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_mask(layout: str, dtype: str) -> None:
    grad, codes, minus = (random(*SHAPE, seed=n, layout=layout, dtype=dtype) for n in range(3))
    codes = codes.relu() - 0.2 * (codes < -1)  # two-sided ones
    actual = mask(grad, codes)
    assert torch.equal(actual, torch.where(codes == 0, 0, grad))
    assert actual.stride() == codes.stride()
    wanted = torch.where(codes == 0, 0, grad.double() - minus.double())
    assert error(mask(grad, codes, minus), wanted) <= TOLERANCE[grad.dtype]


def test_empty_batch() -> None:
    empty = torch.empty(0, 4, 3, 3, device=DEVICE)
    assert shrink_step(empty, problem_of(PointwiseCase())).shape == empty.shape
    assert subtract(empty, empty).shape == mask(empty, empty).shape == empty.shape
