"""The largest eigenvalue and its estimate against the singular values of the dense matrix of A."""

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


def largest_eigenvalue(weight: Tensor, image_size: Pair) -> tuple[Tensor, float]:
    """The unit vector and the eigenvalue of a dictionary with stride 1 and padding 1."""
    start = random(1, weight.shape[1], *image_size, seed=1)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(weight, start, (1, 1), (1, 1))
    return power_vector, eigenvalue.item()


@every_case
def test_the_estimate_equals_the_eigenvalue_once_the_vector_has_converged(
    shape: tuple[int, int, int, int], size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, power_vector = random(*shape), random(1, shape[1], *size, seed=1)
    eigenvalue = exact(weight, size, stride, padding)
    power_vector, _ = step_sizes.largest_eigenvalue(weight, power_vector, stride, padding)
    for _ in range(5):
        power_vector, estimate = step_sizes.estimate_eigenvalue(weight, power_vector, stride, padding)
        assert estimate.item() == pytest.approx(eigenvalue, rel=1e-4)
        assert power_vector.norm().item() == pytest.approx(1, abs=1e-5)


@every_case
def test_repeated_estimates_converge_from_a_random_vector(
    shape: tuple[int, int, int, int], size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, power_vector = random(*shape), random(1, shape[1], *size, seed=1)
    _, estimate = step_sizes.estimate_eigenvalue(weight, power_vector, stride, padding, iterations=8)
    assert estimate.item() == pytest.approx(exact(weight, size, stride, padding), rel=2e-2)


def test_a_converged_vector_stays_converged_in_one_estimate() -> None:
    weight, start = random(4, 2, 3, 3), random(1, 2, 6, 6, seed=1)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(weight, start, (1, 1), (1, 1), tolerance=1e-7)
    _, again = step_sizes.estimate_eigenvalue(weight, power_vector, (1, 1), (1, 1))
    assert again.item() == pytest.approx(eigenvalue.item(), rel=1e-6)


@every_case
def test_one_krylov_space_estimates_the_eigenvalue_from_below(
    shape: tuple[int, int, int, int], size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, power_vector = random(*shape), random(1, shape[1], *size, seed=1)
    start = step_sizes.krylov_start(weight, power_vector)
    power_vector, estimate = step_sizes.krylov_estimate(weight, start, stride, padding, 11)
    expected = exact(weight, size, stride, padding)
    assert 0.97 * expected <= estimate.item() <= expected * (1 + 1e-6)
    assert power_vector.norm().item() == pytest.approx(1, abs=1e-6)
    quotient = (power_vector * step_sizes.gram(weight, power_vector, stride, padding)).sum()
    assert quotient.item() == pytest.approx(estimate.item(), rel=1e-5)


def test_one_estimate_finds_a_new_constant_mode_that_the_power_vector_hardly_contains() -> None:
    """The atoms turn to the mean of their pixels, as those of deep layers do in the first steps of training."""
    weight = random(32, 16, 3, 3)
    power_vector, before = largest_eigenvalue(weight, (8, 8))
    weight = weight + 2 * random(32, 16, 1, 1, seed=2)
    expected = exact(weight, (8, 8), (1, 1), (1, 1))
    assert expected > 1.5 * before
    one_product = step_sizes.gram(weight, power_vector, (1, 1), (1, 1)).norm()
    _, estimate = step_sizes.estimate_eigenvalue(weight, power_vector, (1, 1), (1, 1))
    assert one_product < 0.8 * expected
    assert 0.96 * expected <= estimate.item() <= 1.05 * expected


def test_a_vector_that_converged_on_other_weights_does_not_hide_the_largest_eigenvalue() -> None:
    weight = torch.zeros(2, 2, 1, 1)
    weight[0, 0], weight[1, 1] = 1, 1.001  # from pixels of channel 0 no product ever reaches channel 1
    power_vector = torch.zeros(1, 2, 4, 4)
    power_vector[0, 0, 1, 2] = 1
    _, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector, (1, 1), (0, 0), tolerance=1e-7)
    assert eigenvalue.item() == pytest.approx(1.001**2, rel=1e-5)


def test_iterations_in_one_call_or_in_many_are_the_same() -> None:
    weight, power_vector = random(3, 2, 3, 3), random(1, 2, 6, 6, seed=1)
    together = step_sizes.estimate_eigenvalue(weight, power_vector, (1, 1), (1, 1), iterations=2)
    once, _ = step_sizes.estimate_eigenvalue(weight, power_vector, (1, 1), (1, 1))
    twice = step_sizes.estimate_eigenvalue(weight, once, (1, 1), (1, 1))
    torch.testing.assert_close(together, twice, rtol=0, atol=0)


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-5, 0.0])
@pytest.mark.parametrize("size", [2, 4])
def test_the_top_eigenvector_of_a_small_matrix(size: int, gap: float) -> None:
    basis = torch.linalg.qr(random(size, size).double()).Q
    matrix = (
        basis @ torch.diag(torch.tensor([2.0, 2.0 - gap, 0.5, 0.0], dtype=torch.float64)[:size]) @ basis.T
    ).float()
    vector = step_sizes.top_eigenvector(matrix.triu())
    assert (vector @ (matrix @ vector)).item() == pytest.approx(2, abs=1e-5)
    assert vector.norm().item() == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_works_in_the_precision_of_the_power_vector_whatever_the_dictionary_has(dtype: torch.dtype) -> None:
    weight = random(4, 2, 3, 3).to(dtype).requires_grad_()
    power_vector, eigenvalue = step_sizes.estimate_eigenvalue(weight, random(1, 2, 6, 6), (1, 1), (1, 1))
    for result in (power_vector, eigenvalue, step_sizes.step_size_of(eigenvalue)):
        assert result.dtype == torch.float32
        assert not result.requires_grad


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16])
def test_the_initial_vector_is_in_single_precision_whatever_the_default_dtype(default: torch.dtype) -> None:
    expected = step_sizes.initial_power_vector((1, 2, 4, 4))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        actual = step_sizes.initial_power_vector((1, 2, 4, 4))
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_converging_refuses_a_dictionary_that_is_not_finite(value: float) -> None:
    weight = random(3, 2, 3, 3)
    weight[1, 0, 2, 1] = value
    with pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        step_sizes.largest_eigenvalue(weight, random(1, 2, 5, 5), (1, 1), (1, 1))


@pytest.mark.parametrize("value", [torch.nan, 0.0])
def test_converging_replaces_a_power_vector_without_use(value: float) -> None:
    weight, power_vector = random(3, 2, 3, 3), torch.full((1, 2, 5, 5), value)
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(weight, power_vector, (1, 1), (1, 1))
    assert eigenvalue.item() == pytest.approx(exact(weight, (5, 5), (1, 1), (1, 1)), rel=1e-4)
    assert power_vector.norm().item() == pytest.approx(1, abs=1e-6)


def test_the_step_is_nine_tenths_of_the_inverse_eigenvalue() -> None:
    assert step_sizes.step_size_of(torch.tensor(4.5)).item() == pytest.approx(0.2)


def test_a_dictionary_of_zeros_has_a_finite_step() -> None:
    power_vector, eigenvalue = step_sizes.largest_eigenvalue(
        torch.zeros(3, 2, 3, 3), random(1, 2, 5, 5), (1, 1), (1, 1)
    )
    assert eigenvalue == 0
    assert bool(power_vector.isfinite().all())
    assert bool(step_sizes.step_size_of(eigenvalue).isfinite())


def test_autocast_does_not_change_what_is_computed() -> None:
    shape, size, stride, padding = (5, 2, 3, 3), (7, 6), (1, 1), (1, 1)
    weight, start = random(*shape), random(1, 2, *size, seed=1)
    functions = (
        lambda: step_sizes.largest_eigenvalue(weight, start, stride, padding),
        lambda: step_sizes.estimate_eigenvalue(weight, start, stride, padding),
        lambda: step_sizes.krylov_estimate(weight, start, stride, padding, 3),
        lambda: (step_sizes.krylov_start(weight, start), weight),
    )
    for function in functions:
        plain = function()
        with torch.autocast("cpu", torch.bfloat16):
            found = function()
        assert all(torch.equal(*pair) for pair in zip(found, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_atoms_whose_norm_exceeds_half_precision_get_unit_norm(dtype: torch.dtype) -> None:
    weight = torch.full((2, 3, 3, 3), 30_000.0, dtype=dtype)
    step_sizes.project_atoms(weight)
    torch.testing.assert_close(weight, torch.full_like(weight, 27**-0.5))
