"""`set_lambda`, `check_lambda` and `set_impl`: settings of all CSC layers of a built model."""

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


@pytest.mark.parametrize(
    ("lam", "layers", "sentence"),
    [
        (0.1, "last", "layers is 'last'; it must be one of all, first"),
        (-0.1, "all", "lam is -0.1; it must be a finite number of at least 0"),
        (torch.tensor([0.1, -0.1]), "all", "it must be a finite number of at least 0"),
    ],
    ids=["layers", "negative", "one negative"],
)
def test_a_bad_argument_is_refused_and_no_lambda_changes(
    lam: float | Tensor, layers: str, sentence: str, model: nn.Sequential
) -> None:
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


class OtherOrder(nn.Module):
    """Defines its layers in another order than the data take."""

    def __init__(self) -> None:
        super().__init__()
        self.second = CSCConv2d(6, 4, 3)
        self.first = CSCConv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        out = self.norm(self.second(self.first(x)))
        return out if scale is None else out * scale


def test_the_first_layer_is_the_first_that_the_data_reach(x: Tensor) -> None:
    model = OtherOrder().train()
    statistics = model.norm.running_mean
    sdnet.set_lambda(model, 0.5, layers="first", example=x)
    assert (model.first.lam.item(), model.second.lam.item()) == (0.5, pytest.approx(0.1))
    sdnet.set_lambda(model, 0.75, layers="first", example=(x, torch.ones(())))
    assert (model.first.lam.item(), model.second.lam.item()) == (0.75, pytest.approx(0.1))
    assert model.training
    assert model.norm.training
    assert statistics is not None
    assert not statistics.any()


def test_without_an_example_the_first_layer_of_an_unordered_network_is_refused() -> None:
    model = OtherOrder()
    with pytest.raises(
        ValueError, match="does not say which of its CSC layers the data reach first; it needs an input"
    ):
        sdnet.set_lambda(model, 0.5, layers="first")
    assert lambdas(model) == pytest.approx([0.1, 0.1])
    with pytest.raises(ValueError, match="example did not reach any CSC layer"):
        sdnet.set_lambda(
            nn.ModuleDict({"a": CSCConv2d(3, 4, 3)}).apply(skip), 0.5, layers="first", example=torch.ones(1)
        )


def skip(module: nn.Module) -> None:
    """Make the forward of a module the identity."""
    module.forward = lambda x: x


class Wrapper(nn.Module):
    """A network with one part that has CSC layers."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.part = part


def test_the_structure_says_which_layer_is_the_first_of_a_model_or_a_sequence(model: nn.Sequential) -> None:
    network = sdnet.create_model("sdnet18_all", num_classes=2, stem="cifar", image_size=8)
    compiled = torch.compile(network)
    assert isinstance(compiled, nn.Module)
    for whole, first in ((network, network.stem.conv), (compiled, network.stem.conv), (model, model[0])):
        sdnet.set_lambda(Wrapper(whole), 0.5, layers="first")
        assert isinstance(first, CSCConv2d)
        assert first.lam.item() == 0.5
        assert lambdas(whole).count(0.5) == 1
        first.lam = 0.1


def test_check_lambda_names_the_layer_whose_lambda_cannot_be_used(model: nn.Sequential) -> None:
    sdnet.check_lambda(model)
    layer = model[1]
    assert isinstance(layer, CSCConv2d)
    layer._lam.fill_(float("nan"))  # as an assignment of a tensor on a GPU, which is not checked
    with pytest.raises(ValueError, match=r"lam of 1 is \[nan\]; it must be finite and at least 0"):
        sdnet.check_lambda(model)


def test_set_impl_switches_a_built_model(model: nn.Sequential, x: Tensor) -> None:
    expected = model(x)
    for impl in ("reference", "torch", "auto"):
        sdnet.set_impl(model, impl)
        assert [layer.impl for layer in model.children()] == [impl, impl]
        torch.testing.assert_close(model(x), expected)
