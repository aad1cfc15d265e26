"""`set_lambda`: lambda of a whole network or of its stem, per batch or per sample, in force at once."""

import pytest
import torch
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(CSCConv2d(3, 6, 3), CSCConv2d(6, 4, 3))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(1))


def lambdas(model: nn.Module) -> list[float]:
    return [module.lam.item() for module in model.modules() if isinstance(module, CSCConv2d)]


def test_all_layers_or_the_first(model: nn.Sequential) -> None:
    sdnet.set_lambda(model, 0.5)
    assert lambdas(model) == [0.5, 0.5]
    sdnet.set_lambda(model, 0.25, layers="first")
    assert lambdas(model) == [0.25, 0.5]


@pytest.mark.parametrize("lam", [0.6, torch.tensor([0.3, 0.9]), torch.tensor([0.3, 0.9]).view(2, 1, 1, 1)], ids=str)
def test_the_next_forward_shrinks_by_it(lam: float | Tensor, model: nn.Sequential, x: Tensor) -> None:
    before = model(x)
    expected = model[1](model[0](x, lam), lam)
    sdnet.set_lambda(model, lam)
    assert not torch.equal(before, expected)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_a_larger_lambda_gives_sparser_codes(model: nn.Sequential, x: Tensor) -> None:
    shares = []
    for lam in (0.0, 0.3, 1.0, 100.0):
        sdnet.set_lambda(model, lam, layers="first")
        shares.append((model[0](x) != 0).float().mean().item())
    assert shares == sorted(set(shares), reverse=True)
    assert shares[-1] == 0


def test_lambda_is_no_part_of_the_state_dict(model: nn.Sequential) -> None:
    before = list(model.state_dict())
    sdnet.set_lambda(model, torch.tensor([0.3, 0.9]))
    assert list(model.state_dict()) == before
    assert not any("lam" in name for name in before)


@pytest.mark.parametrize(
    ("lam", "layers", "sentence"),
    [
        (0.1, "last", "layers is 'last'; it must be one of all, first"),
        (-0.1, "all", "lam is -0.1; it must be a finite number of at least 0"),
        (torch.tensor([0.1, -0.1]), "all", "it must be a finite number of at least 0"),
    ],
    ids=["layers", "negative", "one negative"],
)
def test_what_makes_no_sense_is_refused(lam: float | Tensor, layers: str, sentence: str, model: nn.Sequential) -> None:
    with pytest.raises(ValueError, match=sentence):
        sdnet.set_lambda(model, lam, layers=layers)  # pyright: ignore[reportArgumentType]
    assert lambdas(model) == pytest.approx([0.1, 0.1])


def test_lambda_for_another_batch_size_is_refused_by_the_forward(model: nn.Sequential, x: Tensor) -> None:
    sdnet.set_lambda(model, torch.full((3,), 0.2))
    with pytest.raises(ValueError, match=r"lam has shape \[3, 1, 1, 1\].*must be 0-d, \[2\] or \[2, 1, 1, 1\]"):
        model(x)


def test_a_model_without_csc_layers_has_no_lambda() -> None:
    with pytest.raises(ValueError, match="model has no CSC layers"):
        sdnet.set_lambda(nn.Linear(2, 2), 0.1)
