"""Inversion: the picture from the codes of a layer, what it undoes on the way, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sdnet
from sdnet import CSCConv2d
from sdnet.inversion import match_contrast, psnr, relative_error
from sdnet.kernels.coding import Coding


def image(batch: int = 2, size: tuple[int, int] = (8, 8), seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def orthogonal(channels: int, kernel_size: int, stride: int = 1, **options: object) -> CSCConv2d:
    """A layer whose dictionary is an orthogonal matrix on disjoint patches: with lambda 0, A z = x exactly."""
    atoms = channels * kernel_size**2
    layer = CSCConv2d(channels, atoms, kernel_size, stride, padding=0, lam=0.0, nonnegative=False, **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        basis, _ = torch.linalg.qr(torch.randn(atoms, atoms, generator=torch.Generator().manual_seed(0)))
        layer.weight.copy_(basis.view_as(layer.weight))
        layer.step_size.fill_(1.0)
    return layer


def norm(channels: int, seed: int = 0) -> nn.BatchNorm2d:
    """A batch norm with statistics and parameters of its own; eps is large enough to be missed."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.BatchNorm2d(channels, eps=0.1)
    for tensor, low, high in (
        (module.running_mean, -1.0, 1.0),
        (module.running_var, 0.2, 2.0),
        (module.weight, -2.0, -0.5),
        (module.bias, -1.0, 1.0),
    ):
        assert tensor is not None
        tensor.data.uniform_(low, high, generator=generator)
    return module


def stack() -> nn.Sequential:
    """A random invertible stack: patches of 2x2, then of 1x1, then again of 2x2, with batch norms between them."""
    return nn.Sequential(
        orthogonal(3, 2, 2),
        norm(12),
        nn.Dropout(0.5),
        orthogonal(12, 1),
        norm(12, 1),
        nn.Identity(),
        orthogonal(12, 2, 2),
    )


def test_every_layer_of_a_random_invertible_stack_gives_the_image_back() -> None:
    model, x = stack(), image()
    found = sdnet.invert_layers(model, x)
    assert list(found) == ["0", "3", "6"]
    for inversion in found.values():
        assert inversion.kind == "exact"
        assert inversion.reason == ""
        torch.testing.assert_close(inversion.picture, x, rtol=0, atol=1e-4)
        assert inversion.layer_error.max() < 1e-5
    picture, error = sdnet.invert(model, x, "6")
    torch.testing.assert_close(picture, x, rtol=0, atol=1e-4)
    assert error.shape == (2,)
    assert error.max() < 1e-4


def test_the_model_is_left_as_it_was() -> None:
    model = stack().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sdnet.invert_layers(model, image())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_the_picture_of_the_first_layer_is_its_reconstruction() -> None:
    torch.manual_seed(0)
    layer = CSCConv2d(3, 8, 3, stride=2, n_dict=2)
    x = image(size=(9, 7))
    picture, error = sdnet.invert(nn.Sequential(layer), x, "0")
    expected = layer.reconstruct(layer(x), (9, 7)).detach()
    torch.testing.assert_close(picture, (expected[:, :3] + expected[:, 3:]) / 2)
    torch.testing.assert_close(error, (picture - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1))


def calibrated(name: str, **options: object) -> nn.Module:
    """An untrained network whose batch norms know its statistics, so that every layer is active."""
    torch.manual_seed(0)
    model = sdnet.create_model(name, 10, image_size=16, lam=0.01, **options)  # pyright: ignore[reportArgumentType]
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model(torch.randn(8, 3, 16, 16))
    return model


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_every_layer_of_a_model_without_shortcuts_is_inverted(stem: str) -> None:
    model = calibrated("sdnet18_all", stem=stem, shortcut=False)
    x = image(size=(16, 16))
    found = sdnet.invert_layers(model, x)
    assert len(found) == (17 if stem == "cifar" else 18)
    for inversion in found.values():
        assert inversion.kind == "approximate"
        assert inversion.picture is not None
        assert inversion.picture.shape == x.shape
        assert inversion.picture.isfinite().all()
    first = found["stem.conv"]
    torch.testing.assert_close(first.error, first.layer_error)
    torch.testing.assert_close(first.psnr, first.layer_psnr)


def test_more_steps_and_less_lambda_bring_the_picture_closer() -> None:
    torch.manual_seed(0)
    layers = [CSCConv2d(3, 32, 3, nonnegative=False), CSCConv2d(32, 288, 3, nonnegative=False)]
    model = nn.Sequential(layers[0], norm(32), layers[1])
    sdnet.refresh_step_size(model)
    few = sdnet.invert(model, image(), "2")
    for layer in layers:
        layer.coding = Coding(n_steps=100, nonnegative=False)
        layer.lam = 1e-4
    many = sdnet.invert(model, image(), "2")
    assert few.error is not None
    assert many.error is not None
    assert bool((many.error < 0.1 * few.error).all())


def test_contrast_is_restored_to_the_mean_square_of_batch_norm() -> None:
    """One step of 0.3 codes an orthogonal dictionary as A z = 0.3 x, which the mean square of x undoes."""
    first, batch_norm, last, x = orthogonal(3, 1), norm(3), orthogonal(3, 1, n_steps=1), image(batch=1)
    model = nn.Sequential(first, batch_norm, last)
    batch_norm.eps, batch_norm.momentum = 1e-12, 1.0
    batch_norm.train()(first(x))
    batch_norm.running_var *= 63 / 64  # pyright: ignore[reportOperatorIssue]  # the deviation of the sample itself
    last.step_size.fill_(0.3)
    assert sdnet.invert(model, x, "2").kind == "approximate"
    restored = sdnet.invert(model, x, "2", restore_contrast=True)
    assert restored.kind == "exact"
    torch.testing.assert_close(restored.picture, x, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"^restore_contrast is 'yes'; it must be True or False\.$"):
        sdnet.invert(model, x, "2", restore_contrast="yes")  # pyright: ignore[reportArgumentType]


def test_layers_behind_a_shortcut_are_refused_with_the_reason() -> None:
    model = calibrated("sdnet18_all", stem="cifar", shortcut=True)
    found = sdnet.invert_layers(model, image(size=(16, 16)))
    able = [name for name, inversion in found.items() if inversion.kind != "refused"]
    assert able == ["stem.conv", "stages.0.0.conv1", "stages.0.0.conv2"]
    assert "a sum with a shortcut" in found["stages.0.1.conv1"].reason
    assert found["stages.0.1.conv1"].picture is None
    assert found["stages.0.1.conv1"].layer_error.isfinite().all()
    with pytest.raises(ValueError, match=r"^stages\.0\.1\.conv1 cannot be inverted: the input of stages\.0\.1\.conv1"):
        sdnet.invert(model, image(size=(16, 16)), "stages.0.1.conv1")


def test_the_stem_of_sdnet18_is_inverted() -> None:
    assert sdnet.invert(calibrated("sdnet18", stem="imagenet"), image(size=(16, 16)), "stem.conv").kind == "approximate"


def test_a_channel_that_batch_norm_multiplies_by_zero_gets_its_running_mean() -> None:
    model = nn.Sequential(orthogonal(3, 1), norm(3), orthogonal(3, 1))
    with torch.no_grad():
        model[1].weight[1] = 0  # pyright: ignore[reportIndexIssue, reportArgumentType, reportOptionalSubscript]
    found = sdnet.invert(model, image(), "2")
    assert found.kind == "approximate"
    assert found.picture is not None
    assert found.picture.isfinite().all()


def test_pooling_is_interpolated() -> None:
    model = nn.Sequential(orthogonal(3, 1), nn.MaxPool2d(2), orthogonal(3, 1))
    flat = torch.ones(1, 3, 8, 8) * torch.tensor([0.5, -1.0, 2.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(sdnet.invert(model, flat, "2").picture, flat)
    assert sdnet.invert(model, image(), "2").kind == "approximate"


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        (lambda: nn.Conv2d(3, 3, 1), r"1 \(Conv2d\) cannot be undone"),
        (lambda: nn.ReLU(), r"1 \(ReLU\) cannot be undone"),
        (lambda: nn.ReLU(inplace=True), r"1 \(ReLU\) changes its input in place"),
        (lambda: nn.BatchNorm2d(3, track_running_stats=False), r"1 \(BatchNorm2d\) keeps no running statistics"),
    ],
    ids=["Conv2d", "ReLU", "in place", "no statistics"],
)
def test_what_cannot_be_undone_is_named(between: Callable[[], nn.Module], reason: str) -> None:
    model = nn.Sequential(orthogonal(3, 1), between(), orthogonal(3, 1))
    assert sdnet.invert(model, image(), "0").kind == "exact"
    with pytest.raises(ValueError, match=f"^2 cannot be inverted: {reason}"):
        sdnet.invert(model, image(), "2")


def test_a_rectifier_after_nonnegative_codes_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(CSCConv2d(3, 8, 3), nn.ReLU(), CSCConv2d(8, 8, 3))
    assert sdnet.invert(model, image(), "2").kind == "approximate"


def test_a_layer_that_is_called_twice_is_refused() -> None:
    layer = orthogonal(3, 1)
    with pytest.raises(ValueError, match="0 cannot be inverted: the forward calls it 2 times"):
        sdnet.invert(nn.Sequential(layer, layer), image(), "0")


@pytest.mark.parametrize("within", [True, False])
def test_inference_mode_changes_nothing(within: bool) -> None:
    model, x = stack(), image()
    expected = sdnet.invert(model, x, "6")
    with torch.inference_mode():
        made = x.clone()
        found = sdnet.invert(model, made, "6") if within else None
    found = found or sdnet.invert(model, made, "6")
    assert found.kind == expected.kind == "exact"
    assert found.picture is not None
    assert expected.picture is not None
    torch.testing.assert_close(found.picture, expected.picture)


def test_bad_arguments_get_one_sentence() -> None:
    model = stack()
    with pytest.raises(ValueError, match=r"^layer is 'stem'; it must be the name of a CSC layer of model: 0, 3, 6\.$"):
        sdnet.invert(model, image(), "stem")
    with pytest.raises(ValueError, match=r"^layer is 0; it must be the name"):
        sdnet.invert(model, image(), 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"^image is of type Tensor and shape \[3, 8, 8\]; it must be"):
        sdnet.invert(model, image()[0], "0")
    with pytest.raises(ValueError, match=r"^model has no CSC layers"):
        sdnet.invert_layers(nn.Conv2d(3, 3, 1), image())


def test_psnr_and_error_are_their_formulas() -> None:
    truth, estimate = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.2, 2.0]])
    torch.testing.assert_close(psnr(estimate, truth), torch.tensor([10 * torch.log10(torch.tensor(4 / 0.02))]))
    torch.testing.assert_close(psnr(estimate, truth, peak=1.0), torch.tensor([16.9897]))
    torch.testing.assert_close(relative_error(estimate, truth), torch.tensor([0.1]))


def test_contrast_is_matched_by_gain_and_offset() -> None:
    x = image()
    torch.testing.assert_close(match_contrast(0.1 * x - 3, x), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("estimate", "truth", "ratio", "error"),
    [
        ([[0.0, 0.0]], [[0.0, 0.0]], float("inf"), 0.0),  # an image of zeros, rebuilt exactly
        ([[1.0, 0.0]], [[0.0, 0.0]], -float("inf"), 1e12),
        ([[3.0, 3.0]], [[3.0, 3.0]], float("inf"), 0.0),  # a constant image
        ([[3.0, 4.0]], [[3.0, 4.0]], float("inf"), 0.0),
        ([[float("nan"), 4.0]], [[3.0, 4.0]], float("nan"), float("nan")),
    ],
)
def test_psnr_and_error_where_the_formulas_have_no_value(
    estimate: list[list[float]], truth: list[list[float]], ratio: float, error: float
) -> None:
    tensors = torch.tensor(estimate), torch.tensor(truth)
    torch.testing.assert_close(psnr(*tensors), torch.tensor([ratio]), equal_nan=True)
    torch.testing.assert_close(relative_error(*tensors), torch.tensor([error]), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_psnr_and_error_of_small_types_do_not_overflow(dtype: torch.dtype) -> None:
    scale = 1 if dtype == torch.uint8 else 256
    estimate, truth = (torch.tensor([row]).mul(scale).to(dtype) for row in ([10, 0], [20, 200]))
    torch.testing.assert_close(relative_error(estimate, truth), torch.tensor([(100 + 40000) ** 0.5 / 40400**0.5]))
    expected = 10 * torch.log10(torch.tensor([180**2 / 20050]))
    torch.testing.assert_close(psnr(estimate, truth), expected)


def test_psnr_and_error_refuse_other_shapes_and_peaks() -> None:
    for function in (psnr, relative_error):
        with pytest.raises(ValueError, match=r"estimate has shape \[1, 1\] and truth \[1, 3\]; they must have one sha"):
            function(torch.zeros(1, 1), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"peak is -1\.0; it must be a finite number of at least 0, or None\."):
        psnr(torch.zeros(1, 3), torch.zeros(1, 3), peak=-1.0)
