"""The power iteration against the singular values of the dense matrix of A."""

import pytest
import torch
from torch import Tensor

from sdnet.kernels import step_sizes
from sdnet.kernels.reference import Pair, analysis

CASES = [
    pytest.param((3, 2, 3, 3), (6, 5), (1, 1), (1, 1), id="stride1"),
    pytest.param((4, 3, 3, 3), (7, 8), (2, 2), (1, 1), id="stride2-odd"),
    pytest.param((5, 2, 5, 3), (9, 7), (1, 3), (2, 0), id="pairs"),
    pytest.param((6, 1, 7, 7), (8, 8), (2, 2), (3, 3), id="stem"),
]
every_case = pytest.mark.parametrize(("shape", "size", "stride", "padding"), CASES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(weight: Tensor, size: Pair, stride: Pair, padding: Pair) -> float:
    """The largest eigenvalue of A'A by a dense SVD in fp64: the columns are the codes of single pixels."""
    pixels = weight.shape[1] * size[0] * size[1]
    basis = torch.eye(pixels, dtype=torch.float64).view(pixels, weight.shape[1], *size)
    matrix = analysis(basis, weight.double(), stride, padding).flatten(1)
    return torch.linalg.matrix_norm(matrix, 2).item() ** 2


@every_case
def test_converges_to_the_largest_eigenvalue(
    shape: tuple[int, int, int, int], size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, power_vector = random(*shape), random(1, shape[1], *size, seed=1)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector, stride, padding)
    assert eigenvalue.item() == pytest.approx(exact(weight, size, stride, padding), rel=1e-4)
    assert torch.linalg.vector_norm(power_vector).item() == pytest.approx(1, abs=1e-6)
    assert power_vector.shape == (1, shape[1], *size)


@every_case
def test_the_estimate_rises_towards_the_eigenvalue_and_never_passes_it(
    shape: tuple[int, int, int, int], size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, power_vector = random(*shape), random(1, shape[1], *size, seed=1)
    power_vector = power_vector / torch.linalg.vector_norm(power_vector)
    estimates = []
    for _ in range(12):
        power_vector, eigenvalue = step_sizes.power_iteration(weight, power_vector, stride, padding)
        estimates.append(eigenvalue.item())
    bound = exact(weight, size, stride, padding) * (1 + 1e-5)
    assert estimates[0] < 0.9 * bound
    assert all(before <= after * (1 + 1e-6) for before, after in zip(estimates, [*estimates[1:], bound], strict=True))


def test_iterations_in_one_call_or_in_many_are_the_same() -> None:
    weight, power_vector = random(3, 2, 3, 3), random(1, 2, 6, 6, seed=1)
    together = step_sizes.power_iteration(weight, power_vector, (1, 1), (1, 1), iterations=2)
    once, _ = step_sizes.power_iteration(weight, power_vector, (1, 1), (1, 1))
    twice = step_sizes.power_iteration(weight, once, (1, 1), (1, 1))
    torch.testing.assert_close(together, twice, rtol=0, atol=0)


def test_a_converged_vector_stays_converged_in_one_iteration() -> None:
    weight = random(4, 2, 3, 3)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(weight, random(1, 2, 6, 6, seed=1), (1, 1), (1, 1))
    _, again = step_sizes.power_iteration(weight, power_vector, (1, 1), (1, 1))
    assert again.item() == pytest.approx(eigenvalue.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_works_in_single_precision_whatever_the_dictionary_has(dtype: torch.dtype) -> None:
    weight = random(4, 2, 3, 3).to(dtype).requires_grad_()
    power_vector, eigenvalue = step_sizes.power_iteration(weight, random(1, 2, 6, 6), (1, 1), (1, 1))
    for result in (power_vector, eigenvalue, step_sizes.step_size_of(eigenvalue)):
        assert result.dtype == torch.float32
        assert not result.requires_grad


def test_the_step_is_nine_tenths_of_the_inverse_eigenvalue() -> None:
    assert step_sizes.step_size_of(torch.tensor(4.5)).item() == pytest.approx(0.2)


def test_a_dictionary_of_zeros_has_a_finite_step() -> None:
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(
        torch.zeros(3, 2, 3, 3), random(1, 2, 5, 5), (1, 1), (1, 1)
    )
    assert eigenvalue == 0
    assert bool(power_vector.isfinite().all())
    assert bool(step_sizes.step_size_of(eigenvalue).isfinite())
