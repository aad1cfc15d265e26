"""The registry of models: sizes, layout, what is refused, and whole networks learning by either implementation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d

SMALL = {"num_classes": 10, "stem": "cifar", "image_size": 8}


def create(name: str, seed: int = 0, **options: Any) -> nn.Module:
    """A small CIFAR network for ten classes unless told."""
    torch.manual_seed(seed)
    return sdnet.create_model(name, **{**SMALL, **options})


def csc_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, CSCConv2d)]


def test_the_models_are_listed() -> None:
    assert sdnet.list_models() == [
        *("resnet18", "resnet34", "resnet50", "sdnet18", "sdnet34", "sdnet50"),
        *("sdnet18_all", "sdnet34_all", "sdnet50_all"),
    ]


@pytest.mark.parametrize(
    ("name", "stem", "shortcut", "parameters"),
    [
        ("resnet18", "cifar", True, 11_173_962),
        ("resnet18", "imagenet", True, 11_689_512),
        ("resnet34", "cifar", True, 21_282_122),
        ("resnet34", "imagenet", True, 21_797_672),
        ("sdnet18", "cifar", True, 11_173_962),
        ("sdnet18", "imagenet", True, 11_689_512),
        ("sdnet34", "cifar", True, 21_282_122),
        ("sdnet34", "imagenet", True, 21_797_672),
        ("sdnet18_all", "cifar", True, 11_173_962),
        ("sdnet18_all", "cifar", False, 11_000_138),
        ("sdnet18_all", "imagenet", True, 11_726_376),
        ("sdnet18_all", "imagenet", False, 11_552_552),
        ("sdnet34_all", "cifar", True, 21_282_122),
        ("sdnet34_all", "cifar", False, 21_108_298),
        ("sdnet34_all", "imagenet", True, 21_834_536),
        ("sdnet34_all", "imagenet", False, 21_660_712),
        ("resnet50", "cifar", True, 23_520_842),
        ("resnet50", "imagenet", True, 25_557_032),
        ("sdnet50", "imagenet", True, 25_557_032),
        ("sdnet50_all", "cifar", True, 23_520_842),
        ("sdnet50_all", "imagenet", True, 25_557_032 + 64 * 64 * 9),
    ],
)
def test_parameters_are_as_many_as_the_official_ones(name: str, stem: str, shortcut: bool, parameters: int) -> None:
    num_classes = 10 if stem == "cifar" else 1000
    with torch.device("meta"):
        model = create(name, num_classes=num_classes, stem=stem, image_size=16, shortcut=shortcut)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_csc_layers_are_where_the_table_says() -> None:
    assert csc_names(create("resnet18", stem="imagenet")) == []
    assert csc_names(create("sdnet18", stem="imagenet")) == ["stem.conv"]
    assert len(csc_names(create("sdnet18_all"))) == 17
    of_all = csc_names(create("sdnet18_all", stem="imagenet", image_size=16))
    assert len(of_all) == 18
    assert of_all[:3] == ["stem.conv", "stem.pool", "stages.0.0.conv1"]


def test_in_a_bottleneck_the_3x3_convolution_alone_is_a_csc_layer_and_has_the_stride() -> None:
    with torch.device("meta"):
        model = create("sdnet50_all", stem="imagenet", image_size=64)
        assert csc_names(create("sdnet50", stem="imagenet", image_size=64)) == ["stem.conv"]
    names = csc_names(model)
    assert len(names) == 2 + 16
    assert {name.rpartition(".")[2] for name in names[2:]} == {"conv2"}
    first = model.get_submodule("stages.1.0")
    assert (first.conv1.stride, first.conv2.stride, first.conv3.stride) == ((1, 1), (2, 2), (1, 1))  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("name", ["resnet50", "sdnet50_all"])
def test_a_bottleneck_is_the_composition_of_its_modules(name: str) -> None:
    """No ReLU after codes, one after every plain convolution, and one after the sum."""
    model = create(name, width=4)
    block: Any = model.get_submodule("stages.1.0").eval()
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    out = block.norm1(block.conv1(x)).relu()
    out = block.norm2(block.conv2(out))
    out = block.norm3(block.conv3(out.relu() if name == "resnet50" else out))
    assert out.shape == (2, 32, 4, 4)
    assert block.output_size == (4, 4)
    torch.testing.assert_close(block(x), (out + block.shortcut(x)).relu())


def test_images_may_have_other_channels_and_the_classifier_may_be_left_out() -> None:
    model = create("sdnet50_all", width=4, in_channels=1, num_classes=0)
    assert isinstance(model, sdnet.SDNet)
    assert (model.num_classes, model.in_channels, model.num_features) == (0, 1, 128)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    features = model(x)
    torch.testing.assert_close(features, model.stages(model.stem(x)).mean((2, 3)))
    assert features.shape == (2, 128)
    sdnet.refresh_step_size(model, image_size=8)
    with pytest.raises(ValueError, match=r"x is .*shape \[2, 3, 8, 8\]; it must be a tensor \[N, 1, H, W\]\."):
        model(torch.randn(2, 3, 8, 8))
    again = sdnet.create_model(**model.config)
    again.load_state_dict(model.state_dict())


def test_a_bottleneck_needs_its_shortcut() -> None:
    with pytest.raises(ValueError, match=r"shortcut=False is for sdnet18_all, sdnet34_all; sdnet50_all needs its shor"):
        create("sdnet50_all", shortcut=False)


def test_the_options_reach_every_csc_layer() -> None:
    options: dict[str, Any] = {
        "n_steps": 3,
        "mu": 0.2,
        "nonnegative": False,
        "solver": "sdnet",
        "data_term": "norm",
        "n_dict": 2,
        "impl": "reference",
    }
    model = create("sdnet18_all", lam=0.25, **options)
    for layer in [module for module in model.modules() if isinstance(module, CSCConv2d)]:
        assert {name: getattr(layer, name) for name in options} == options
        assert layer.lam.item() == 0.25


@pytest.mark.parametrize(
    ("stem", "image_size", "expected"), [("cifar", None, 32), ("imagenet", None, 224), ("cifar", 20, 20)]
)
def test_the_step_is_estimated_at_the_image_size(stem: str, image_size: int | None, expected: int) -> None:
    model = create("sdnet18", stem=stem, image_size=image_size)
    assert model.state_dict()["stem.conv.power_vector"].shape == (1, 3, expected, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {}),
        ("sdnet18", {"stem": "imagenet"}),
        ("sdnet18_all", {"solver": "ista"}),
        ("sdnet18_all", {"stem": "imagenet", "image_size": 32}),
        ("sdnet18_all", {"shortcut": False}),
    ],
    ids=str,
)
def test_any_image_size_goes_through_and_every_parameter_learns(name: str, options: dict[str, Any]) -> None:
    model = create(name, **options)
    logits = model(torch.randn(3, 3, 33, 46))
    assert logits.shape == (3, 10)
    F.cross_entropy(logits, torch.arange(3)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert still == []


def test_no_relu_follows_the_codes_of_a_block_without_shortcut() -> None:
    """Its output is batch-normalised and signed; with a shortcut it is rectified."""
    x = torch.randn(4, 3, 8, 8)
    for shortcut, signed in ((False, True), (True, False)):
        features = list(create("sdnet18_all", shortcut=shortcut).children())[:2]
        assert bool((nn.Sequential(*features)(x) < 0).any()) is signed


def test_a_seed_gives_the_same_network_again() -> None:
    first, again, other = (create("sdnet18_all", seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.conv.weight"], other["stem.conv.weight"])


def learned(name: str, impl: str, n_steps: int) -> tuple[Tensor, Tensor]:
    """The loss curve on one batch of eight in fp64, learned with `attach`, and the stem's last gradient."""
    model = create(name, impl=impl).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    sdnet.attach(model, optimizer)
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    curve = []
    for _ in range(n_steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.arange(8))
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    gradient = next(model.parameters()).grad
    assert gradient is not None
    return torch.stack(curve), gradient


@pytest.mark.slow
def test_the_torch_path_learns_as_the_reference_does() -> None:
    expected, _ = learned("sdnet18", "reference", n_steps=20)
    actual, _ = learned("sdnet18", "torch", n_steps=20)
    assert expected[-1] < 0.1 * expected[0]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


def test_the_torch_path_of_many_layers_has_the_loss_and_the_gradient_of_the_reference() -> None:
    """One step of optimisation: many layers of thresholds are chaotic, and rounding grows from step to step."""
    loss, gradient = learned("sdnet18_all", "reference", n_steps=1)
    actual_loss, actual_gradient = learned("sdnet18_all", "torch", n_steps=1)
    torch.testing.assert_close(actual_loss, loss, rtol=1e-12, atol=0)
    assert (actual_gradient - gradient).norm() < 1e-9 * gradient.norm()


@pytest.mark.parametrize(("stem", "pool"), [("cifar", []), ("imagenet", [16])], ids=["cifar", "imagenet"])
def test_the_width_scales_every_stage(stem: str, pool: list[int]) -> None:
    model = create("sdnet18_all", width=16, stem=stem, image_size=16)
    atoms = [layer.out_channels for layer in model.modules() if isinstance(layer, CSCConv2d)]
    assert atoms == [16, *pool, *[16] * 4, *[32] * 4, *[64] * 4, *[128] * 4]
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 10)


@pytest.mark.parametrize("width", [0, -64, 16.0, "64", True])
def test_a_width_that_is_no_positive_int_is_refused(width: Any) -> None:
    with pytest.raises(ValueError, match=r"^width is .*; it must be an int of at least 1\.$"):
        create("resnet18", width=width)
