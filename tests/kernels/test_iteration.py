"""What a single call of `csc_encode` may add to its coding: a start, a tolerance, a callback, other penalties; and
lambda per atom. The oracles are scikit-learn, the optimality conditions, and `torch.autograd.gradcheck`."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sklearn.decomposition import SparseCoder
from torch import Tensor

from sdnet.kernels import csc_encode, explain, reference
from sdnet.kernels.csc import Solution
from tests.kernels.test_reference import LAM, assert_active, dense, dictionary, image, safe_step

IMPLS = ["torch", "reference"]


class Problem(NamedTuple):
    """A small problem in fp64, with its dictionary as a matrix too."""

    x: Tensor
    weight: Tensor
    matrix: np.ndarray
    step_size: Tensor

    def encode(self, lam: float | Tensor = LAM, **options: Any) -> Any:
        return csc_encode(self.x, self.weight, self.step_size, lam, padding=1, **options)

    def residual(self, codes: Tensor) -> Tensor:
        return self.x - reference.synthesis(codes, self.weight, (6, 5), (1, 1), (1, 1))


@pytest.fixture(scope="module")
def problem() -> Problem:
    matrix = dense(dictionary(), (6, 5), (1, 1), (1, 1))
    return Problem(image(), dictionary(), matrix, safe_step(matrix))


def lasso(problem: Problem, atoms: np.ndarray) -> np.ndarray:
    """The codes of scikit-learn over the rows of a matrix."""
    coder = SparseCoder(
        atoms, transform_algorithm="lasso_lars", transform_alpha=LAM, positive_code=True, transform_max_iter=10_000
    )
    return coder.transform(problem.x.flatten(1).numpy())


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_a_tolerance_stops_early_at_the_codes_of_scikit_learn(problem: Problem, impl: str) -> None:
    found = problem.encode(n_steps=10_000, tolerance=1e-9, impl=impl)
    assert isinstance(found, Solution)
    codes, n_steps = found
    assert 10 < n_steps < 5_000
    assert_active(codes)
    np.testing.assert_allclose(codes.flatten(1), lasso(problem, problem.matrix), atol=1e-6)
    torch.testing.assert_close(codes, problem.encode(n_steps=n_steps), rtol=1e-12, atol=1e-12)


def test_the_rule_holds_for_every_sample_and_not_one_step_before(problem: Problem) -> None:
    codes, n_steps = problem.encode(n_steps=500, tolerance=1e-3)

    def change(n: int) -> Tensor:
        before, after = problem.encode(n_steps=n - 1), problem.encode(n_steps=n)
        return (after - before).flatten(1).norm(dim=1) / after.flatten(1).norm(dim=1)

    assert bool((change(n_steps) <= 1e-3).all())
    assert bool((change(n_steps - 1) > 1e-3).any())
    torch.testing.assert_close(codes, problem.encode(n_steps=n_steps))


def test_without_convergence_all_steps_are_made_and_counted(problem: Problem) -> None:
    codes, n_steps = problem.encode(n_steps=3, tolerance=0)
    assert n_steps == 3
    torch.testing.assert_close(codes, problem.encode(n_steps=3))


def test_codes_of_zero_have_converged_at_the_second_step(problem: Problem) -> None:
    codes, n_steps = problem.encode(lam=1e3, n_steps=100, tolerance=1e-6)
    assert n_steps == 2
    assert not codes.any()


def test_the_callback_sees_the_codes_of_every_step(problem: Problem) -> None:
    seen: list[tuple[int, Tensor]] = []
    codes = problem.encode(n_steps=4, callback=lambda step, z: seen.append((step, z)))
    assert [step for step, _ in seen] == [1, 2, 3, 4]
    for step, z in seen:
        torch.testing.assert_close(z, problem.encode(n_steps=step))
    assert torch.equal(seen[-1][1], codes)


@pytest.mark.parametrize("data_term", ["squared", "norm"])
def test_a_start_continues_where_the_last_call_ended(problem: Problem, data_term: str) -> None:
    options = {"solver": "ista", "data_term": data_term, "lam": 0.05}
    begun = problem.encode(n_steps=3, **options)
    torch.testing.assert_close(problem.encode(n_steps=4, z0=begun, **options), problem.encode(n_steps=7, **options))


def test_a_start_from_zero_changes_nothing_and_one_from_the_solution_stays(problem: Problem) -> None:
    expected = problem.encode(n_steps=5)
    torch.testing.assert_close(problem.encode(n_steps=5, z0=torch.zeros_like(expected)), expected)
    solution = problem.encode(n_steps=5_000)
    codes, n_steps = problem.encode(n_steps=100, tolerance=1e-6, z0=solution)
    assert n_steps == 1
    torch.testing.assert_close(codes, solution, rtol=1e-6, atol=1e-6)


def groups(v: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
    """The proximal operator of lam sum |(z_2i, z_2i+1)| over pairs of atoms."""
    pairs = v.unflatten(1, (-1, 2))
    norms = pairs.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return (pairs * (1 - step_size * lam / norms).clamp_min(0)).flatten(1, 2)


def test_a_prox_for_groups_of_atoms_meets_its_optimality_conditions(problem: Problem) -> None:
    """For active groups A'r = lam z / |z|, and |A'r| <= lam for others."""
    codes, n_steps = problem.encode(n_steps=5_000, tolerance=1e-10, prox=groups)
    assert n_steps < 5_000
    slope = reference.analysis(problem.residual(codes), problem.weight, (1, 1), (1, 1)).unflatten(1, (-1, 2))
    pairs = codes.unflatten(1, (-1, 2))
    norms = pairs.norm(dim=2, keepdim=True)
    active = (norms > 0).expand_as(pairs)
    assert 0.05 < active.double().mean() < 0.95
    assert bool((codes < 0).any()), "a prox decides about signs itself"
    torch.testing.assert_close(slope[active], (LAM * pairs / norms.clamp_min(1e-12))[active], rtol=0, atol=1e-6)
    assert slope.norm(dim=2, keepdim=True)[norms == 0].max() <= LAM + 1e-6


def test_the_prox_of_the_coding_gives_its_codes(problem: Problem) -> None:
    def shrink(v: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
        return torch.relu(v - step_size * lam)

    torch.testing.assert_close(problem.encode(n_steps=6, prox=shrink), problem.encode(n_steps=6))


def test_a_prox_that_returns_something_else_is_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"prox returned NoneType; it must return a tensor like v, torch.float64 \["):
        problem.encode(prox=lambda *_: None)
    with pytest.raises(ValueError, match=r"prox returned torch.float64 \[2, 2, 6, 5\]; it must return a tensor like v"):
        problem.encode(prox=lambda v, *_: v[:, :2])


PER_ATOM = torch.tensor([0.1, 0.2, 0.4, 0.8], dtype=torch.float64).view(1, 4, 1, 1)


@pytest.mark.parametrize("impl", IMPLS)
def test_lambda_per_atom_solves_the_weighted_lasso_of_scikit_learn(problem: Problem, impl: str) -> None:
    """sum_k lam_k |z_k| is LAM |u|_1 for u_k = z_k lam_k / LAM, over the atoms a_k LAM / lam_k."""
    ratios = (PER_ATOM / LAM).flatten().numpy().repeat(6 * 5)
    expected = lasso(problem, problem.matrix / ratios[:, None]) / ratios
    codes = problem.encode(lam=PER_ATOM, n_steps=4_000, impl=impl)
    assert_active(codes)
    np.testing.assert_allclose(codes.flatten(1), expected, atol=1e-5)


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 1, 1)], ids=str)
def test_the_torch_path_and_the_reference_agree_on_lambda_per_atom(
    problem: Problem, shape: tuple[int, ...], nonnegative: bool
) -> None:
    lam = (PER_ATOM * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1))[: shape[0]].requires_grad_()
    x, weight = (tensor.clone().requires_grad_() for tensor in (problem.x, problem.weight))
    found = {}
    for impl in IMPLS:
        options: dict[str, Any] = {"n_steps": 4, "mu": 0.3, "nonnegative": nonnegative, "impl": impl}
        codes = csc_encode(x, weight, problem.step_size, lam, padding=1, **options)
        assert_active(codes, most=0.99)
        weights = torch.randn(codes.shape, dtype=codes.dtype, generator=torch.Generator().manual_seed(0))
        found[impl] = [codes, *torch.autograd.grad((codes * weights).sum(), [x, weight, lam])]
    assert found["torch"][-1].shape == shape
    for actual, expected in zip(found["torch"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_the_objective_weighs_every_atom_with_its_lambda() -> None:
    x, codes, lam = torch.zeros(1, 1, 1, 1), torch.tensor([1.0, -2.0]).view(1, 2, 1, 1), torch.tensor([3.0, 0.5])
    coding = reference.Coding(nonnegative=False)
    assert reference.objective(x, codes, x, lam.view(1, 2, 1, 1), coding).item() == 3 * 1 + 0.5 * 2


GRADIENTS: dict[str, dict[str, Any]] = {
    "lambda per atom": {"lam": PER_ATOM},
    "lambda per sample and atom": {"lam": PER_ATOM * torch.tensor([1.0, 0.5]).view(2, 1, 1, 1)},
    "start": {"z0": "random"},
    "tolerance": {"tolerance": 1e-2, "n_steps": 50},
    "prox": {"prox": groups},
    "callback": {"callback": lambda step, codes: None},
}


@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS.keys())
def test_gradients_are_those_of_finite_differences(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weight = image(size=(3, 3)), dictionary()
    options = {"n_steps": 3, "nonnegative": False, **options}
    lam = options.pop("lam", torch.tensor(0.05, dtype=torch.float64))
    random_start = torch.randn(2, 4, 3, 3, dtype=torch.float64, generator=generator)
    start = random_start if options.pop("z0", None) == "random" else None

    def encode(x: Tensor, weight: Tensor, lam: Tensor, *z0: Tensor) -> Tensor:
        found = csc_encode(x, weight, 0.2, lam, padding=1, z0=z0[0] if z0 else None, **options)
        return found.codes if isinstance(found, Solution) else found

    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, lam, start) if tensor is not None]
    assert torch.autograd.gradcheck(encode, leaves, fast_mode=True)


def test_explain_says_what_computes_a_call_and_triton_refuses_with_the_reason(problem: Problem) -> None:
    x, weight = problem.x.float(), problem.weight.float()
    start = torch.zeros(2, 4, 6, 5)

    def said(impl: str, lam: float | Tensor = 0.1, **options: Any) -> str:
        return explain(x, weight, 0.1, lam, padding=1, impl=impl, **options)

    assert said("auto", z0=start) == "reference: only the reference has a rule for z0."
    assert said("torch", prox=groups) == "reference: only the reference has a rule for prox."
    assert said("torch", lam=PER_ATOM) == "torch: the argument impl asks for it."
    both = {"tolerance": 0.1, "callback": print}
    with pytest.raises(
        NotImplementedError, match="'triton', but its kernels have no rule for tolerance, callback; use"
    ):
        said("triton", **both)
    with pytest.raises(NotImplementedError, match="but lam has a value per atom, and its kernels take one for all"):
        said("triton", lam=PER_ATOM)
    with pytest.raises(NotImplementedError, match="but its kernels have no rule for z0"):
        csc_encode(x, weight, 0.1, 0.1, padding=1, impl="triton", z0=start)


def test_a_start_of_another_precision_takes_the_precision_of_x(problem: Problem) -> None:
    start = torch.zeros(2, 4, 6, 5, dtype=torch.float16)
    assert problem.encode(z0=start).dtype == torch.float64


def overwritten(v: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
    """The codes; step size and lambda are changed in place."""
    return torch.relu(v - step_size.mul_(lam.mul_(1)))


@pytest.mark.parametrize("solver", ["ista", "fista", "sdnet"])
def test_what_a_callback_or_a_prox_does_in_place_changes_nothing(problem: Problem, solver: str) -> None:
    plain = problem.encode(n_steps=6, solver=solver, impl="reference")
    assert torch.equal(problem.encode(n_steps=6, solver=solver, callback=lambda _, codes: codes.zero_()), plain)
    torch.testing.assert_close(problem.encode(n_steps=6, solver=solver, prox=overwritten), plain)
    buffer = torch.empty_like(plain)
    with pytest.raises(ValueError, match=r"^prox returned the tensor of the step before; it must return a new one"):
        problem.encode(n_steps=6, solver=solver, prox=lambda v, *_: torch.clamp(v, min=0, out=buffer))


def test_a_tolerance_is_refused_where_no_value_can_be_read(problem: Problem) -> None:
    sentence = r"^tolerance is 0\.001; under torch\.vmap and in a trace, where no value can be read, it must be None\.$"
    with pytest.raises(ValueError, match=sentence):
        torch.vmap(lambda x: problem._replace(x=x).encode(n_steps=9, tolerance=1e-3).codes)(problem.x[None])


def test_a_sparse_start_is_refused(problem: Problem) -> None:
    start = torch.zeros_like(problem.encode()).to_sparse()
    with pytest.raises(ValueError, match=r"^z0 is of layout torch\.sparse_coo; it must be a dense tensor, of layout"):
        problem.encode(z0=start)
