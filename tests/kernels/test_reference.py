"""The maths in fp64 against oracles that share no code with it: a dense matrix, scikit-learn, optimality conditions."""

from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.decomposition import SparseCoder
from torch import Tensor

from sdnet.bench.official import DictConv2d, OfficialConfig
from sdnet.kernels import reference
from sdnet.kernels.coding import Coding, DataTerm, Solver
from sdnet.kernels.reference import Pair

SIZE = (6, 5)
CHANNELS, ATOMS = 2, 4
LAM = 0.3


def dictionary(seed: int = 0, channels: int = CHANNELS, atoms: int = ATOMS, kernel_size: Pair = (3, 3)) -> Tensor:
    """Random atoms of unit norm, [K, C, kh, kw] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(atoms, channels, *kernel_size, dtype=torch.float64, generator=generator)
    return weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def image(batch: int = 2, channels: int = CHANNELS, size: Pair = SIZE, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(weight: Tensor, size: Pair, stride: Pair, padding: Pair) -> np.ndarray:
    """A' as a matrix [codes, pixels]: its rows are the atoms, each put where its code says and cut at the border."""
    _, channels, *kernel_size = weight.shape
    grid = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(size, padding, kernel_size, stride, strict=True)]
    rows = []
    for atom in weight.numpy():
        for i, j in np.ndindex(*grid):
            canvas = np.zeros((channels, size[0] + 2 * padding[0], size[1] + 2 * padding[1]))
            top, left = i * stride[0], j * stride[1]
            canvas[:, top : top + kernel_size[0], left : left + kernel_size[1]] = atom
            rows.append(canvas[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]].ravel())
    return np.stack(rows)


def safe_step(matrix: np.ndarray) -> Tensor:
    return torch.tensor(0.9 / np.linalg.norm(matrix, 2) ** 2)


def encode(
    x: Tensor,
    weight: Tensor,
    step_size: Tensor,
    n_steps: int,
    lam: Tensor | float = LAM,
    mu: float = 0.0,
    nonnegative: bool = True,
    solver: Solver = "ista",
    data_term: DataTerm = "squared",
    n_dict: int = 1,
    stride: Pair = (1, 1),
) -> Tensor:
    """The reference with this file's defaults; padding (1, 1)."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    coding = Coding(n_steps, mu, nonnegative, solver, data_term, n_dict)
    return reference.csc_encode(x, weight, step_size, lam, coding, stride, (1, 1))


def assert_active(codes: Tensor, least: float = 0.05, most: float = 0.95) -> None:
    """Codes that are all zero, or all nonzero, would let a wrong loop pass."""
    share = (codes != 0).double().mean().item()
    assert least < share < most, f"{share:.2f} of the codes are active"


GEOMETRIES = [
    pytest.param(size, kernel, stride, padding, id=f"{size}-k{kernel}-s{stride}-p{padding}".replace(" ", ""))
    for size, kernel, stride, padding in [
        ((6, 5), (3, 3), (1, 1), (1, 1)),
        ((7, 8), (3, 3), (2, 2), (1, 1)),
        ((8, 7), (3, 3), (3, 3), (1, 1)),
        ((6, 6), (2, 4), (1, 2), (0, 1)),
        ((9, 7), (5, 1), (2, 3), (2, 0)),
        ((5, 5), (7, 7), (1, 2), (3, 3)),
        ((4, 5), (1, 1), (3, 1), (0, 0)),
    ]
]


@pytest.mark.parametrize(("size", "kernel_size", "stride", "padding"), GEOMETRIES)
def test_analysis_and_synthesis_are_the_dense_matrix_and_its_transpose(
    size: Pair, kernel_size: Pair, stride: Pair, padding: Pair
) -> None:
    weight, x = dictionary(kernel_size=kernel_size), image(size=size)
    matrix = dense(weight, size, stride, padding)

    correlations = reference.analysis(x, weight, stride, padding)
    assert correlations.shape[2:] == reference.codes_size(size, kernel_size, stride, padding)
    np.testing.assert_allclose(correlations.flatten(1), x.flatten(1).numpy() @ matrix.T, atol=1e-12)

    codes = torch.randn_like(correlations)
    pixels = reference.synthesis(codes, weight, size, stride, padding)
    assert pixels.shape == x.shape
    np.testing.assert_allclose(pixels.flatten(1), codes.flatten(1).numpy() @ matrix, atol=1e-12)


@pytest.mark.parametrize(
    ("nonnegative", "expected"), [(True, [0.0, 0.0, 0.0, 0.0, 1.5]), (False, [-1.5, 0.0, 0.0, 0.0, 1.5])]
)
def test_shrink_moves_towards_zero_and_stops_there(nonnegative: bool, expected: list[float]) -> None:
    v = torch.tensor([-2.0, -0.5, 0.0, 0.25, 2.0])
    assert reference.shrink(v, torch.tensor(0.5), nonnegative).tolist() == expected


@pytest.mark.parametrize("nonnegative", [True, False])
def test_proximal_minimises_its_definition(nonnegative: bool) -> None:
    """P(v) = argmin_u 1/2 (u - v)^2 + step (lam |u| + mu/2 u^2), found here on a fine grid."""
    step_size, lam, mu = 0.4, 0.7, 0.5
    u = torch.linspace(0 if nonnegative else -3, 3, 60001, dtype=torch.float64)
    for v in (-2.0, -0.1, 0.2, 1.7):
        best = u[(0.5 * (u - v) ** 2 + step_size * (lam * u.abs() + mu / 2 * u**2)).argmin()]
        found = reference.proximal(
            torch.tensor(v, dtype=torch.float64), torch.tensor(step_size), torch.tensor(lam), mu, nonnegative
        )
        assert found.item() == pytest.approx(best.item(), abs=1e-4)


@pytest.mark.parametrize("solver", ["fista", "sdnet"])
def test_momentum_follows_the_published_schedule(solver: Solver) -> None:
    assert reference.momentum(7, solver) == pytest.approx([0, 0, 0.2818, 0.4340, 0.5311, 0.5988, 0.6489], abs=5e-5)


def test_ista_has_no_momentum() -> None:
    assert reference.momentum(5, "ista") == [0.0] * 5


@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("nonnegative", [True, False], ids=["positive", "signed"])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)], ids=["overcomplete", "undercomplete"])
@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_a_long_run_converges_to_the_codes_of_scikit_learn(
    solver: Solver, stride: Pair, nonnegative: bool, mu: float
) -> None:
    """The elastic net is a lasso over the dictionary [D, sqrt(mu) I] for the signal [x, 0]."""
    weight, x = dictionary(), image()
    matrix = dense(weight, SIZE, stride, (1, 1))
    ridge = np.sqrt(mu) * np.eye(len(matrix))
    coder = SparseCoder(
        np.hstack([matrix, ridge]),
        transform_algorithm="lasso_lars",
        transform_alpha=LAM,
        positive_code=nonnegative,
        transform_max_iter=10_000,
    )
    expected = coder.transform(np.hstack([x.flatten(1).numpy(), np.zeros((len(x), len(ridge)))]))

    codes = encode(x, weight, safe_step(matrix), 4000, mu=mu, nonnegative=nonnegative, solver=solver, stride=stride)
    assert_active(codes)
    assert bool((codes < 0).any()) is not nonnegative
    np.testing.assert_allclose(codes.flatten(1), expected, atol=1e-5)


@pytest.mark.parametrize("data_term", get_args(DataTerm))
@pytest.mark.parametrize("mu", [0.0, 0.5])
@pytest.mark.parametrize("nonnegative", [True, False], ids=["positive", "signed"])
def test_a_long_run_meets_the_optimality_conditions(nonnegative: bool, mu: float, data_term: DataTerm) -> None:
    """A'r c - mu z = lam sign(z) where z != 0 and within [-lam, lam] (below lam if nonnegative) where z = 0.

    c is 1, or 1/2 / |r| for the norm: the official steps descend it with half its gradient.
    """
    weight, x = dictionary(), image()
    matrix = dense(weight, SIZE, (1, 1), (1, 1))
    lam = LAM if data_term == "squared" else 0.05
    codes = encode(
        x, weight, safe_step(matrix), 4000, lam=lam, mu=mu, nonnegative=nonnegative, solver="fista", data_term=data_term
    )
    assert_active(codes)

    z = codes.flatten(1).numpy()
    residual = x.flatten(1).numpy() - z @ matrix
    scale = 1.0 if data_term == "squared" else 0.5 / np.linalg.norm(residual, axis=1, keepdims=True)
    slope = (scale * residual) @ matrix.T - mu * z
    np.testing.assert_allclose(slope[z != 0], lam * np.sign(z[z != 0]), atol=1e-5)
    at_rest = slope[z == 0] if nonnegative else np.abs(slope[z == 0])
    assert at_rest.max() <= lam + 1e-5


def objective_along(solver: Solver, n_steps: int, mu: float = 0.2) -> list[float]:
    weight, x = dictionary(), image(batch=1)
    step_size = safe_step(dense(weight, SIZE, (1, 1), (1, 1)))
    values = []
    for n in range(1, n_steps + 1):
        codes = encode(x, weight, step_size, n, mu=mu, solver=solver)
        pixels = reference.synthesis(codes, weight, SIZE, (1, 1), (1, 1))
        values.append(reference.objective(x, codes, pixels, torch.tensor(LAM), Coding(mu=mu)).item())
    return values


def test_ista_never_raises_the_objective() -> None:
    values = objective_along("ista", 25)
    assert all(after < before for before, after in pairwise(values))


def test_fista_gets_further_than_ista_in_as_many_steps() -> None:
    assert objective_along("fista", 12, mu=0.0)[-1] < objective_along("ista", 12, mu=0.0)[-1]


@pytest.mark.parametrize("data_term", get_args(DataTerm))
def test_the_solvers_agree_for_two_steps_and_part_at_the_third(data_term: DataTerm) -> None:
    weight, x = dictionary(), image()
    step_size = safe_step(dense(weight, SIZE, (1, 1), (1, 1)))

    def codes(solver: Solver, n_steps: int) -> Tensor:
        return encode(x, weight, step_size, n_steps, lam=0.1, solver=solver, data_term=data_term)

    for n_steps in (1, 2):
        torch.testing.assert_close(codes("fista", n_steps), codes("ista", n_steps), rtol=0, atol=1e-14)
        torch.testing.assert_close(codes("sdnet", n_steps), codes("ista", n_steps), rtol=0, atol=1e-14)
    ista, fista, sdnet = codes("ista", 3), codes("fista", 3), codes("sdnet", 3)
    for one, other in ((fista, ista), (sdnet, ista), (sdnet, fista)):
        assert (one - other).abs().max() > 1e-5


@pytest.mark.parametrize("n_dict", [1, 2])
@pytest.mark.parametrize("mu", [0.0, 0.4])
@pytest.mark.parametrize("square_noise", [True, False], ids=["squared", "norm"])
@pytest.mark.parametrize("nonnegative", [True, False], ids=["positive", "signed"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_sdnet_solver_is_the_official_loop(
    stride: int, nonnegative: bool, square_noise: bool, mu: float, n_dict: int
) -> None:
    x = image(size=(6, 8))
    for n_steps in range(1, 6):
        config = OfficialConfig(
            n_steps=n_steps,
            lmbd=0.1,
            mu=mu,
            nonnegative=nonnegative,
            square_noise=square_noise,
            expansion_factor=n_dict,
        )
        layer = DictConv2d(CHANNELS, ATOMS, 3, stride, config).double()
        layer.weight.data = dictionary(channels=n_dict * CHANNELS)
        layer.step_size.fill_(0.2)
        codes = encode(
            x,
            layer.weight.detach(),
            layer.step_size,
            n_steps,
            lam=0.1,
            mu=mu,
            nonnegative=nonnegative,
            solver="sdnet",
            data_term="squared" if square_noise else "norm",
            n_dict=n_dict,
            stride=(stride, stride),
        )
        assert_active(codes, most=0.99)
        torch.testing.assert_close(codes, layer(x), rtol=0, atol=1e-12)


def test_n_dict_dictionaries_code_as_many_copies_of_the_input() -> None:
    weight, x, step_size = dictionary(channels=3 * CHANNELS), image(), torch.tensor(0.1)
    codes = encode(x, weight, step_size, 4, n_dict=3, solver="fista")
    assert_active(codes)
    torch.testing.assert_close(codes, encode(torch.cat([x, x, x], dim=1), weight, step_size, 4, solver="fista"))


@pytest.mark.parametrize("data_term", get_args(DataTerm))
def test_samples_of_a_batch_do_not_meet(data_term: DataTerm) -> None:
    weight, x, step_size = dictionary(), image(batch=3), torch.tensor(0.2)
    lam = torch.tensor([0.05, 0.2, 0.4], dtype=torch.float64)
    together = encode(x, weight, step_size, 4, lam=lam.view(-1, 1, 1, 1), solver="fista", data_term=data_term)
    alone = [
        encode(x[n : n + 1], weight, step_size, 4, lam=lam[n], solver="fista", data_term=data_term) for n in range(3)
    ]
    assert_active(together)
    torch.testing.assert_close(together, torch.cat(alone))


def test_the_step_carries_no_gradient() -> None:
    step_size = torch.tensor(0.2, requires_grad=True)
    weight = dictionary().requires_grad_()
    encode(image(), weight, step_size, 2).sum().backward()
    assert weight.grad is not None
    assert step_size.grad is None


@pytest.mark.parametrize("data_term", get_args(DataTerm))
def test_the_objective_is_its_formula(data_term: DataTerm) -> None:
    x, codes = torch.full((2, 1, 1, 2), 3.0), torch.tensor([[[[1.0, -2.0]]], [[[0.0, 0.0]]]])
    pixels = torch.zeros(2, 2, 1, 2)  # two reconstructions of x: four differences of 3
    values = reference.objective(x, codes, pixels, torch.tensor(0.5), Coding(mu=0.2, data_term=data_term, n_dict=2))
    data = 18.0 if data_term == "squared" else 6.0
    torch.testing.assert_close(values, torch.tensor([0.5 * 3 + 0.1 * 5 + data, data]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("data_term", get_args(DataTerm))
def test_the_objective_accumulates_in_at_least_single_precision(data_term: DataTerm, dtype: torch.dtype) -> None:
    """Sums of 300 000 squares of 2 are past what fp16 holds."""
    x = torch.full((1, 3, 320, 320), 2.0, dtype=dtype)
    codes = torch.full((1, 4, 320, 320), 0.5, dtype=dtype)
    value = reference.objective(x, codes, torch.zeros_like(x), torch.tensor(0.5), Coding(mu=2, data_term=data_term))
    squares = 3 * 320 * 320 * 4.0
    data = squares / 2 if data_term == "squared" else squares**0.5
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert value.item() == pytest.approx(4 * 320 * 320 * (0.5 * 0.5 + 0.25) + data, rel=1e-6)


def test_the_norm_steps_converge_to_the_minimum_of_half_the_norm() -> None:
    """As the docstring of the objective says: not quite to that of the objective, whose data term is the norm."""
    weight, x = dictionary(), image()
    step_size = safe_step(dense(weight, SIZE, (1, 1), (1, 1)))
    codes = encode(x, weight, step_size, 4000, lam=0.05, solver="fista", data_term="norm")

    def half_norm(codes: Tensor) -> Tensor:
        residual = x - reference.synthesis(codes, weight, SIZE, (1, 1), (1, 1))
        return 0.05 * codes.abs().sum(dim=(1, 2, 3)) + residual.flatten(1).norm(dim=1) / 2

    least = half_norm(codes)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        change = 1e-3 * torch.randn(codes.shape, dtype=codes.dtype, generator=generator)
        assert bool((half_norm((codes + change).clamp_min(0)) >= least).all())
