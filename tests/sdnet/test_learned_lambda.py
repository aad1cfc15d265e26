"""Lambda that is learned, per layer or per atom; lambda per atom that is not; and a proximal operator of a layer."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d
from sdnet.kernels import csc_encode
from sdnet.weights import save_model


def layer(**options: Any) -> CSCConv2d:
    torch.manual_seed(0)
    return CSCConv2d(3, 8, 3, input_size=(9, 8), **options)


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 9, 8, generator=torch.Generator().manual_seed(1))


PER_ATOM = torch.linspace(0.1, 0.8, 8).view(1, 8, 1, 1)


@pytest.mark.parametrize("learn_lam", ["layer", "atom"])
def test_a_learned_lambda_starts_at_lam_and_gives_the_same_codes(learn_lam: str) -> None:
    learned, fixed = layer(lam=0.3, learn_lam=learn_lam), layer(lam=0.3)
    torch.testing.assert_close(learned.lam, torch.full((() if learn_lam == "layer" else (1, 8, 1, 1)), 0.3))
    torch.testing.assert_close(learned(images()), fixed(images()))
    assert [name for name, _ in learned.named_parameters()] == ["weight", "raw_lam"]
    assert [name for name, _ in fixed.named_parameters()] == ["weight"]


@pytest.mark.parametrize("learn_lam", ["layer", "atom"])
def test_its_gradient_is_that_of_lambda_times_the_slope_of_softplus(learn_lam: str) -> None:
    csc = layer(learn_lam=learn_lam)
    lam = csc.lam.detach().requires_grad_()
    csc_encode(images(), csc.weight, csc.step_size, lam, padding=1).square().sum().backward()
    csc(images()).square().sum().backward()
    assert csc.raw_lam is not None
    assert csc.raw_lam.grad is not None
    assert lam.grad is not None
    torch.testing.assert_close(csc.raw_lam.grad, lam.grad.flatten() * csc.raw_lam.detach().sigmoid())
    assert csc.raw_lam.grad.abs().min() > 0


def test_training_moves_it_and_the_state_dict_keeps_it() -> None:
    csc = layer(learn_lam="atom", lam=0.5)
    optimizer = torch.optim.SGD(csc.parameters(), lr=0.1)
    sdnet.attach(csc, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        csc.objective(images(), csc(images())).mean().backward()
        optimizer.step()
    assert bool((csc.lam < 0.5).all()), "less lambda lowers the objective"
    other = layer(learn_lam="atom")
    other.load_state_dict(csc.state_dict())
    torch.testing.assert_close(other.lam, csc.lam)
    torch.testing.assert_close(other(images()), csc(images()))
    torch.testing.assert_close(copy.deepcopy(csc)(images()), csc(images()))


def test_it_can_be_assigned_and_reset() -> None:
    csc = layer(learn_lam="atom")
    csc.lam = 0.25
    torch.testing.assert_close(csc.lam, torch.full((1, 8, 1, 1), 0.25))
    csc.lam = PER_ATOM
    torch.testing.assert_close(csc.lam, PER_ATOM)
    csc.raw_lam.data.fill_(3.0)  # pyright: ignore[reportOptionalMemberAccess]
    csc.reset_parameters()
    torch.testing.assert_close(csc.lam, PER_ATOM)
    csc.lam = 1e-6
    torch.testing.assert_close(csc.lam, torch.full((1, 8, 1, 1), 1e-6))
    assert "lam=learned per atom from 1e-06" in repr(csc)


def test_it_survives_meta_half_and_double() -> None:
    with torch.device("meta"):
        csc = layer(learn_lam="layer", lam=0.3)
    csc.to_empty(device="cpu")
    torch.testing.assert_close(csc.lam, torch.tensor(0.3))
    csc.reset_parameters()
    expected = csc(images())
    torch.testing.assert_close(csc.double()(images().double()).float(), expected)
    torch.testing.assert_close(csc.half().lam, torch.tensor(0.3), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("learn_lam", "value", "sentence"),
    [
        ("layer", 0.0, r"lam is 0; a lambda that is learned must be above 0"),
        (
            "layer",
            torch.tensor([0.1, 0.2]),
            r"lam has shape \[2, 1, 1, 1\], but it is learned per layer: assign a number",
        ),
        ("layer", PER_ATOM, r"lam has shape \[1, 8, 1, 1\], but it is learned per layer"),
        ("layer", torch.zeros(()), "lam is 0; a lambda that is learned must be above 0"),
        ("atom", torch.arange(8.0).view(1, 8, 1, 1), "lam is 0; a lambda that is learned must be above 0"),
        ("atom", torch.tensor([0.1, 0.2]), r"lam has shape \[2, 1, 1, 1\], but it is learned per atom"),
        ("atom", PER_ATOM[:, :5], r"lam has shape \[1, 5, 1, 1\]; this layer has 8 atoms"),
        ("no", PER_ATOM[:, :5], r"lam has shape \[1, 5, 1, 1\]; this layer has 8 atoms"),
        (
            "no",
            torch.ones(1, 8, 1),
            r"lam has shape \[1, 8, 1\]; it must be .* or \[1, K, 1, 1\] with a value per atom",
        ),
        ("no", torch.ones(1, 8, 2, 1), r"lam has shape \[1, 8, 2, 1\]; it must be"),
    ],
)
def test_what_cannot_be_assigned_is_refused_and_changes_nothing(learn_lam: str, value: Any, sentence: str) -> None:
    csc = layer(learn_lam=learn_lam, lam=0.3)
    before = csc.lam.detach()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        csc.lam = value
    torch.testing.assert_close(csc.lam.detach(), before)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^learn_lam is True; it must be one of no, layer, atom\.$"):
        layer(learn_lam=True)
    with pytest.raises(ValueError, match=r"^lam is 0; a lambda that is learned must be above 0"):
        layer(learn_lam="atom", lam=0.0)
    with pytest.raises(ValueError, match=r"^prox is 'l0'; it must be a function, or None\.$"):
        layer(prox="l0")
    with pytest.raises(ValueError, match=r"^mu is 0\.5 and prox is given"):
        layer(prox=hard, mu=0.5)


def test_a_lambda_per_atom_is_used_by_the_forward_and_the_objective() -> None:
    csc = layer()
    csc.lam = PER_ATOM
    codes = csc(images())
    torch.testing.assert_close(codes, csc_encode(images(), csc.weight, csc.step_size, PER_ATOM, padding=1))
    shown = (PER_ATOM * codes).flatten(1).sum(1)
    residual = (images() - csc.reconstruct(codes)).square().flatten(1).sum(1)
    torch.testing.assert_close(csc.objective(images(), codes), shown + residual / 2)
    torch.testing.assert_close(sdnet.diagnose(csc, images())[""].objective, shown + residual / 2)


def test_set_lambda_per_atom_changes_no_layer_if_one_has_other_atoms() -> None:
    model = nn.Sequential(layer(), CSCConv2d(8, 5, 3))
    with pytest.raises(ValueError, match="this layer has 5 atoms"):
        sdnet.set_lambda(model, PER_ATOM)
    assert [module.lam.shape for module in model.children()] == [torch.Size(())] * 2  # pyright: ignore[reportAttributeAccessIssue]


def test_a_network_learns_lambda_in_every_csc_layer() -> None:
    model = sdnet.create_model("sdnet18_all", 10, stem="cifar", image_size=8, width=8, learn_lam="layer")
    raw = [name for name, _ in model.named_parameters() if name.endswith("raw_lam")]
    assert len(raw) == 17
    F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.arange(4)).backward()
    assert all(model.get_parameter(name).grad is not None for name in raw)


def test_weights_of_a_network_with_a_fixed_lambda_are_a_start_for_learning_it(tmp_path: Path) -> None:
    fixed = sdnet.create_model("sdnet18", 4, stem="cifar", width=4, image_size=8, lam=0.3)
    save_model(tmp_path / "model.safetensors", fixed)
    learned = sdnet.load_model(tmp_path, learn_lam="atom", lam=0.2)
    torch.testing.assert_close(learned.get_submodule("stem.conv").lam, torch.full((1, 4, 1, 1), 0.2))
    torch.testing.assert_close(learned.get_parameter("stem.conv.weight"), fixed.get_parameter("stem.conv.weight"))
    save_model(tmp_path / "model.safetensors", learned)
    model = sdnet.load_model(tmp_path, lam=0.4)  # an argument takes the place of what was learned
    torch.testing.assert_close(model.get_submodule("stem.conv").lam, torch.full((1, 4, 1, 1), 0.4))
    for given in ("no", "layer"):
        with pytest.raises(ValueError, match=rf"^learn_lam is '{given}'; .* holds a lambda that is learned per atom"):
            sdnet.load_model(tmp_path, learn_lam=given)


def hard(v: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
    """Hard thresholding, the proximal operator of lam |z|_0."""
    return torch.where(v.square() > 2 * step_size * lam, v, 0)


def test_a_layer_takes_another_proximal_operator() -> None:
    csc, x = layer(prox=hard, n_steps=3, lam=0.02), images()
    codes = csc(x)
    torch.testing.assert_close(codes, csc_encode(x, csc.weight, csc.step_size, 0.02, padding=1, n_steps=3, prox=hard))
    assert bool((codes < 0).any())
    codes.square().sum().backward()
    assert csc.weight.grad is not None
    torch.testing.assert_close(pickle.loads(pickle.dumps(csc))(x), codes)
    assert sdnet.diagnose(csc, x)[""].objective.isnan().all()
    assert sdnet.diagnose(csc, x)[""].relative_residual.max() < 1
    with pytest.raises(ValueError, match=r"^prox is given; the proximal operator does not determine the penalty"):
        csc.objective(x, codes)


class Hard(nn.Module):
    """Hard thresholding as a module."""

    def forward(self, v: Tensor, step_size: Tensor, lam: Tensor) -> Tensor:
        return hard(v, step_size, lam)


def test_a_proximal_operator_that_is_a_module_can_be_replaced_by_a_function_and_back() -> None:
    csc, x = layer(prox=Hard(), lam=0.02), images()
    expected = layer(prox=hard, lam=0.02)(x)
    torch.testing.assert_close(csc(x), expected)
    csc.prox = hard
    torch.testing.assert_close(csc(x), expected)
    csc.prox = Hard()
    torch.testing.assert_close(csc(x), expected)
    csc.prox = None
    torch.testing.assert_close(csc(x), layer(lam=0.02)(x))


def test_a_layer_solves_with_more_steps_than_its_own() -> None:
    csc, x = layer(), images()
    codes, n_steps = csc.solve(x, n_steps=500, tolerance=1e-4)
    assert 2 < n_steps < 500
    assert csc.n_steps == 2
    assert bool((csc.objective(x, codes) < csc.objective(x, csc(x))).all())
    torch.testing.assert_close(csc.solve(x).codes, csc(x))
    begun = csc.solve(x, 0.4, n_steps=1).codes
    torch.testing.assert_close(csc.solve(x, 0.4, n_steps=1, z0=begun).codes, csc(x, 0.4))
