"""`convert`: which convolutions it replaces, what new layers keep, what it leaves alone, and other people's models."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import sdnet
from sdnet import CSCConv2d
from tests import with_timm  # noqa: F401  # before torchvision and timm


def images(batch: int = 2, size: int = 16) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(8, 6, (1, 3), bias=False, padding="same"), nn.BatchNorm2d(6)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


def csc_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CSCConv2d)]


def test_every_convolution_is_replaced_in_place_with_its_geometry_and_the_size_of_its_input() -> None:
    model = network().train()
    report = sdnet.convert(model, images(), lam=0.05, n_steps=3)
    assert csc_names(model) == ["0", "2.0"] == list(report.converted)
    assert report.left == {}
    first, second = (model.get_submodule(name) for name in csc_names(model))
    assert isinstance(first, CSCConv2d)
    assert isinstance(second, CSCConv2d)
    assert (first.stride, first.padding, first.power_vector.shape[2:]) == ((2, 2), (1, 1), (16, 16))
    assert (second.kernel_size, second.padding, second.power_vector.shape[2:]) == ((1, 3), (0, 1), (8, 8))
    assert first.n_steps == second.n_steps == 3
    assert first.lam == second.lam == pytest.approx(0.05)
    assert all(module.training for module in model.modules())
    assert all(0.85 < margin <= 0.95 for margin in sdnet.step_margins(model).values())
    assert model(images()).shape == (2, 4)


def test_filters_become_atoms_of_unit_norm_and_the_bias_is_added_to_the_codes() -> None:
    model = network()
    convolution = copy.deepcopy(model[0])
    assert isinstance(convolution, nn.Conv2d)
    sdnet.convert(model, images())
    layer: Any = model[0]
    atoms = convolution.weight / convolution.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.weight, atoms)
    assert convolution.bias is not None
    torch.testing.assert_close(layer.bias, convolution.bias)
    codes = CSCConv2d.forward(layer, images())
    torch.testing.assert_close(layer(images()), codes + convolution.bias.view(-1, 1, 1))
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in network().named_parameters()]


def test_the_report_is_a_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2))
    with torch.no_grad():
        next(model.parameters())[2] = 0
    assert str(sdnet.convert(model, images())).splitlines() == [
        "1 convolutions converted, 1 left alone",
        "  0  3 -> 8, 3x3, stride 1: weights kept, bias added to the codes, 1 atoms of zeros",
        "  1  left alone: it has 2 groups, and every atom spans all input channels",
    ]


def test_a_filter_chooses() -> None:
    model = network()
    report = sdnet.convert(model, images(), filter_fn=lambda module, name: name == "2.0")
    assert csc_names(model) == ["2.0"]
    assert report.left == {"0": "filter_fn leaves it out"}


def test_several_dictionaries_have_new_atoms() -> None:
    model = network()
    report = sdnet.convert(model, images(), n_dict=2, learn_lam="atom")
    assert model.get_parameter("0.weight").shape == (8, 6, 3, 3)
    assert model.get_parameter("0.raw_lam").shape == (8,)
    assert report.converted["2.0"] == "8 -> 6, 1x3, stride 1: new weights, for n_dict = 2"
    assert model(images()).isfinite().all()


class Other(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Twice(nn.Module):
    """Two convolutions, of which the second is not called or shares its weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.first, self.second, self.tied = nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3), tied
        if tied:
            self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)) if self.tied else self.first(x)


class Called(nn.Module):
    """A convolution that is called by keyword or without a batch dimension."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.convolution, self.by_keyword = nn.Conv2d(3, 3, 3), by_keyword

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(input=x) if self.by_keyword else self.convolution(x[0])


def hooked() -> nn.Module:
    convolution = nn.Conv2d(3, 3, 3)
    convolution.register_forward_hook(lambda *_: None)
    return nn.Sequential(convolution)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, dilation=2)), r"its dilation is \(2, 2\), and atoms are dense"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "its padding mode is reflect"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 2, padding="same")), r"padding 'same' for a kernel of \(2, 2\) is not"),
        (lambda: nn.Sequential(Other(3, 3, 3)), "its class Other has a forward of its own"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 3, 3)), "it is a ConvTranspose2d, and CSC layers take the place"),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3))), "its weight is computed from other"),
        (lambda: nn.Conv2d(3, 3, 3), "it is the model itself; put it into an nn.Sequential"),
        (lambda: Twice(tied=False), "the example does not reach it"),
        (lambda: Twice(tied=True), "its weight is shared by first.weight, second.weight"),
        (
            lambda: Called(by_keyword=True),
            "the model passes its input by keyword, and a CSC layer takes it by position",
        ),
        (lambda: Called(by_keyword=False), "its input has no batch dimension"),
        (hooked, "it has hooks, which a new layer would not have"),
    ],
)
def test_what_cannot_be_converted_is_left_alone_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    model = make()
    before = copy.deepcopy(model)
    report = sdnet.convert(model, images())
    assert next(iter(reversed(report.left.values()))).startswith(reason.replace("\\", ""))
    if not report.converted:
        torch.testing.assert_close(model(images()), before(images()))
        assert type(model.get_submodule(next(iter(report.left)))) is type(before.get_submodule(next(iter(report.left))))


def test_a_weight_that_is_not_finite_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3))
    nn.init.constant_(model.get_parameter("0.weight"), float("nan"))
    assert sdnet.convert(model, images()).left == {"0": "its weight holds NaN or infinite values"}


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    convolution = nn.Conv2d(3, 3, 3)
    model = nn.Sequential(convolution, nn.ReLU(), convolution)
    sdnet.convert(model, images())
    assert model[0] is model[2]
    assert isinstance(model[0], CSCConv2d)


def test_dtype_memory_format_mode_and_frozen_weights_are_kept() -> None:
    model: Any = network().double().eval()
    model = model.to(memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    sdnet.convert(model, images().double())
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.requires_grad
    assert not model[0].training


class TwoInputs(nn.Module):
    """Calls one convolution with two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.conv(a).sum() + self.conv(b).sum()


def test_the_step_size_is_safe_for_every_input_of_a_convolution_that_is_called_twice() -> None:
    model, wide, high = TwoInputs(), torch.zeros(1, 3, 4, 40), torch.zeros(1, 3, 16, 16)
    sdnet.convert(model, (wide, high))
    assert isinstance(model.conv, CSCConv2d)
    assert model.conv.power_vector.shape == (1, 3, 16, 40)


def test_a_model_that_is_converted_under_inference_mode_learns() -> None:
    model = network()
    with torch.inference_mode():
        sdnet.convert(model, images())
    sdnet.attach(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1))
    before = model.get_parameter("0.weight").detach().clone()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.get_parameter("0.weight"), before)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"model": 3}, "model is 3; it must be an nn.Module."),
        ({"model": torch.jit.ScriptModule()}, "model is a torch.jit.ScriptModule, whose layers are fixed"),
        ({"example": [1]}, r"example is \[1\]; it must be a tensor, a tuple or a dict of arguments."),
        ({"filter_fn": "stem"}, "filter_fn is 'stem'; it must be a function"),
        ({"n_steps": 0}, "n_steps is 0; it must be an int of at least 1."),
        ({"impl": "cuda"}, "impl is 'cuda'; it must be one of"),
        ({"lam": -1.0}, "lam is -1.0; it must be a finite number"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(changed: dict[str, Any], sentence: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=f"^{sentence}"):
        sdnet.convert(**{"model": model, "example": images(), **changed})
    assert csc_names(model) == []
    with pytest.raises(TypeError, match="convert has no argument 'steps'"):
        sdnet.convert(model, images(), steps=2)


def test_inversion_undoes_the_bias() -> None:
    model = network()
    sdnet.convert(model, images(), filter_fn=lambda module, name: name == "0")
    layer: Any = model[0]
    expected = layer.reconstruct(CSCConv2d.forward(layer, images()), (16, 16)).detach()
    torch.testing.assert_close(sdnet.invert(model, images(), "0").picture, expected)


def losses(model: nn.Module, x: Tensor, n_steps: int = 3) -> list[float]:
    """The losses of some steps on one batch with `attach`."""
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    sdnet.attach(model, optimizer)
    values = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model.train()(x), torch.arange(len(x)))
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


@pytest.mark.slow
def test_the_resnet50_of_timm_is_converted_and_learns() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet50", num_classes=4)
    three = {name for name, module in model.named_modules() if getattr(module, "kernel_size", None) == (3, 3)}
    report = sdnet.convert(model, images(4, 32), filter_fn=lambda module, name: name in three)
    assert len(report.converted) == 16
    assert set(report.converted) == {name for name in three if name != "maxpool"}
    values = losses(model, images(4, 32))
    assert values[-1] < values[0]


def test_the_stem_of_a_convnext_is_converted_and_its_depthwise_convolutions_are_not() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("convnext_atto", num_classes=4)
    report = sdnet.convert(model, images(4, 64))
    assert report.converted["stem.0"] == "3 -> 40, 4x4, stride 4: weights kept, bias added to the codes"
    assert all("groups" in reason for reason in report.left.values())
    assert len(report.left) == 12
    values = losses(model, images(4, 64))
    assert values[-1] < values[0]


def test_vgg11_whose_rectifiers_change_codes_in_place_is_converted_and_learns() -> None:
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.vgg11(num_classes=4, dropout=0.0)
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(512 * 49, 4))
    report = sdnet.convert(model, images(4, 32), lam=0.01)
    assert len(report.converted) == 8
    assert report.left == {}
    values = losses(model, images(4, 32))
    assert values[-1] < values[0]
