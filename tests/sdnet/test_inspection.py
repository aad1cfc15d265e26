"""The numbers behind the pictures: grids of atoms, spectrum, coherence, and the objective along the iterations."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdnet.inspection
from sdnet import CSCConv2d
from sdnet.inspection import atom_grid, mutual_coherence, objective_curve, spectrum
from tests.kernels.test_reference import dense


def layer(**options: object) -> CSCConv2d:
    torch.manual_seed(0)
    options = {"kernel_size": 3, "input_size": (8, 7), **options}
    return CSCConv2d(3, 6, **options)  # pyright: ignore[reportArgumentType]


def image() -> Tensor:
    return torch.randn(2, 3, 8, 7, generator=torch.Generator().manual_seed(1))


def test_the_grid_shows_every_atom_at_its_place_between_white_lines() -> None:
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    grid = atom_grid(weight, columns=3)
    assert grid.shape == (3, 2 * 3 + 1, 3 * 3 + 1)
    for k in range(5):
        top, left = 1 + 3 * (k // 3), 1 + 3 * (k % 3)
        expected = 0.5 + 0.5 * weight[k] / weight[k].abs().max()
        torch.testing.assert_close(grid[:, top : top + 2, left : left + 2], expected)
    assert bool((grid[:, ::3] == 1).all())
    assert bool((grid[:, :, ::3] == 1).all())
    assert bool((grid[:, 4:6, 7:9] == 1).all()), "there is no sixth atom"


def test_atoms_of_many_channels_are_shown_by_the_strongest_one_in_grey() -> None:
    weight = torch.zeros(1, 4, 1, 2)
    weight[0, 2] = torch.tensor([[1.0, -0.5]])
    weight[0, 1] = 0.1
    assert atom_grid(weight)[:, 1, 1:3].tolist() == [[1.0, 0.25]] * 3
    assert atom_grid(torch.zeros(1, 4, 1, 1))[:, 1, 1].tolist() == [0.5] * 3


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 4)])
def test_coherence_and_spectrum_are_those_of_the_dense_dictionary(kernel_size: tuple[int, int], stride: int) -> None:
    """All places at which an atom is not cut by the border: their products are the shifted ones."""
    csc = layer(kernel_size=kernel_size, stride=stride).double()
    atoms = dense(csc.weight.detach(), (12, 12), (stride, stride), (0, 0))
    products = np.abs(atoms @ atoms.T)
    np.fill_diagonal(products, 0)
    assert mutual_coherence(csc) == pytest.approx(products.max(), abs=1e-6)
    flat = csc.weight.detach().flatten(1).numpy()
    products = np.abs(flat @ flat.T)
    np.fill_diagonal(products, 0)
    assert mutual_coherence(csc, shifts=False) == pytest.approx(products.max(), abs=1e-6)
    np.testing.assert_allclose(spectrum(csc), np.linalg.svd(flat, compute_uv=False))


def test_the_coherence_of_equal_atoms_is_one() -> None:
    csc = layer()
    with torch.no_grad():
        csc.weight[3] = -csc.weight[1]
    assert mutual_coherence(csc) == pytest.approx(1, abs=1e-6)


def test_the_objective_falls_to_its_minimum() -> None:
    csc, x = layer(lam=0.2), image()
    curve = objective_curve(csc, x, n_steps=50, optimum_steps=700)
    assert curve.values.shape == (50,)
    expected = [csc.objective(x, csc.solve(x, n_steps=n).codes).sum().item() for n in (1, 2, 50)]
    assert [curve.values[n - 1].item() for n in (1, 2, 50)] == pytest.approx(expected, rel=1e-5)
    best = csc.solve(x, n_steps=700).codes
    assert curve.optimum == pytest.approx(csc.objective(x, best).sum().item(), rel=1e-5)
    assert curve.gap[0] > curve.gap[9] > curve.gap[49] >= 0
    assert 50 < curve.optimum_steps <= 700
    assert csc.n_steps == 2
    assert csc.weight.dtype == torch.float32


def test_a_curve_that_ends_early_stays_at_the_minimum() -> None:
    curve = objective_curve(layer(lam=100.0), image(), n_steps=5)
    assert curve.optimum_steps == 2
    torch.testing.assert_close(curve.values, torch.full((5,), curve.optimum, dtype=torch.float64))


def test_a_recording_gives_the_inputs_of_the_layers() -> None:
    model = nn.Sequential(layer(), CSCConv2d(6, 4, 3))
    with sdnet.record(model) as recording:
        model(image())
        inputs = recording.inputs()
    torch.testing.assert_close(inputs["0"], image())
    torch.testing.assert_close(inputs["1"], model[0](image()))


WRONG: list[tuple[Callable[[Any], object], str]] = [
    (lambda inspect: inspect.atom_grid(None), r"weight is None; it must be a tensor \[K, C, kh, kw\]"),
    (lambda inspect: inspect.atom_grid(torch.ones(4, 3)), r"weight is of type Tensor and shape \[4, 3\]; it must be"),
    (lambda inspect: inspect.atom_grid(torch.ones(0, 3, 3, 3)), r"weight is .* with at least one atom"),
    (lambda inspect: inspect.spectrum(nn.Sequential(layer())), r"layer is Sequential.*; it must be a CSC layer"),
    (lambda inspect: inspect.mutual_coherence(layer().weight), "layer is of type Parameter .*; it must be a CSC layer"),
    (lambda inspect: inspect.mutual_coherence(layer(), "no"), "shifts is 'no'; it must be True or False"),
    (lambda inspect: inspect.objective_curve(None, image()), "layer is None; it must be a CSC layer"),
    (lambda inspect: inspect.objective_curve(layer(), None), "x is None; it must be a tensor"),
    (lambda inspect: inspect.objective_curve(layer(), image(), 0), "n_steps is 0; it must be an int of at least 1"),
    (lambda inspect: inspect.objective_curve(layer(), image(), 5, "9"), "optimum_steps is '9'; it must be an int"),
]


@pytest.mark.parametrize(("call", "sentence"), WRONG, ids=[sentence for _, sentence in WRONG])
def test_bad_arguments_get_one_sentence(call: Callable[[Any], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call(sdnet.inspection)


def test_inference_mode_does_not_change_a_curve() -> None:
    expected = objective_curve(layer(), image(), n_steps=3, optimum_steps=5)
    with torch.inference_mode():
        torch.testing.assert_close(
            objective_curve(layer(), image(), n_steps=3, optimum_steps=5).values, expected.values
        )
