"""Rules choose lambda from the image alone, and recover what was planted."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdnet
from sdnet.robustness import (
    NoiseRule,
    PixelModel,
    ResidualRule,
    RobustModel,
    Rule,
    UnlabelledRule,
    accuracy,
    accuracy_over_lambda,
    calibrate_noise_rule,
    estimate_noise,
    fit_residual_rule,
    pgd,
    residual_of,
)
from sdnet.robustness.rules import line_through

PER_SAMPLE = [NoiseRule(1.5), ResidualRule(1e-3, 0.05, most=1.4)]
RULES = [*PER_SAMPLE, UnlabelledRule(steps=5)]


@pytest.fixture(scope="module")
def model() -> sdnet.SDNet:
    torch.manual_seed(0)
    return sdnet.create_model("sdnet18", 10, stem="cifar", width=8).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Images of different amounts of noise, normalised."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([0.0, 0.1, 0.4, 1.0]).view(-1, 1, 1, 1)
    return 0.5 + scale * torch.randn(4, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("std", [0.02, 0.05, 0.1, 0.2])
def test_the_noise_of_a_smooth_image_is_estimated_within_five_percent(std: float) -> None:
    ramp = torch.linspace(0, 1, 32).view(1, 1, 32, 1) + torch.linspace(0, 0.5, 32)
    noisy = ramp.expand(16, 3, 32, 32) + std * torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert estimate_noise(noisy).shape == (16,)
    assert float(estimate_noise(noisy).mean()) == pytest.approx(std, rel=0.05)
    assert float(estimate_noise(ramp)[0]) == pytest.approx(0, abs=1e-6)


def test_the_estimate_is_that_of_the_filter_of_immerkaer(images: Tensor) -> None:
    kernel = torch.tensor([[1.0, -2.0, 1.0], [-2.0, 4.0, -2.0], [1.0, -2.0, 1.0]]).expand(3, 1, 3, 3)
    filtered = torch.nn.functional.conv2d(images, kernel, groups=3)
    expected = math.sqrt(math.pi / 2) / 6 * filtered.abs().mean((1, 2, 3))
    torch.testing.assert_close(estimate_noise(images), expected)
    assert float(estimate_noise(images)[0]) == 0, "the first image is constant"


def test_lambda_of_the_noise_rule_is_its_formula(model: sdnet.SDNet, images: Tensor) -> None:
    lam = RobustModel(model, NoiseRule(2.0)).lam_of(images)
    assert isinstance(lam, Tensor)
    assert torch.allclose(lam, (2 * estimate_noise(images)).clamp_min(0.1))
    assert float(lam[0]) == pytest.approx(0.1)
    assert float(lam[3]) > 1


def test_lambda_of_the_residual_rule_is_its_formula(model: sdnet.SDNet, images: Tensor) -> None:
    layer = model.stem.conv
    assert isinstance(layer, sdnet.CSCConv2d)
    with torch.no_grad():
        residual = sdnet.diagnose(model, images)["stem.conv"].residual
        lam = RobustModel(model, ResidualRule(1e-3, 0.05, most=1.0)).lam_of(images)
        assert torch.allclose(residual_of(layer, images), residual)
    assert isinstance(lam, Tensor)
    assert torch.allclose(lam, (1e-3 * residual + 0.05).clamp(0.1, 1.0))


@pytest.mark.parametrize("rule", PER_SAMPLE, ids=lambda rule: type(rule).__name__)
def test_a_batch_equals_a_loop_over_its_images(model: sdnet.SDNet, images: Tensor, rule: Rule) -> None:
    robust = RobustModel(model, rule)
    with torch.no_grad():
        alone = torch.cat([robust(image[None]) for image in images])
        torch.testing.assert_close(robust(images), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_change_no_state_and_work_without_gradients(model: sdnet.SDNet, images: Tensor, rule: Rule) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    robust = RobustModel(model, rule)
    with torch.no_grad():
        logits = robust(images)
    with torch.inference_mode():
        assert robust(images).equal(logits)
        assert robust(images.clone()).equal(logits), "images of inference mode"
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not logits.equal(model(images)), "the rule has no effect"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_rules_work_in_bfloat16_and_under_autocast(model: sdnet.SDNet, images: Tensor, rule: Rule) -> None:
    expected = RobustModel(model, rule).lam_of(images)
    half = copy.deepcopy(model).bfloat16()
    for lam in (RobustModel(half, rule).lam_of(images.bfloat16()), autocast_lambda(model, rule, images)):
        assert isinstance(lam, Tensor)
        assert lam.dtype == torch.float32
        torch.testing.assert_close(lam, torch.as_tensor(expected), rtol=0.05, atol=0.02)
    with torch.no_grad():
        assert RobustModel(half, rule)(images.bfloat16()).isfinite().all()


def autocast_lambda(model: sdnet.SDNet, rule: Rule, images: Tensor) -> float | Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return RobustModel(model, rule).lam_of(images)


@pytest.mark.parametrize("rule", PER_SAMPLE, ids=lambda rule: type(rule).__name__)
def test_per_sample_rules_compile_into_one_graph(model: sdnet.SDNet, images: Tensor, rule: Rule) -> None:
    robust = RobustModel(model, rule)
    with torch.no_grad():
        compiled = torch.compile(robust, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), robust(images))
        torch.testing.assert_close(compiled(images[:1]), robust(images[:1]))


def test_the_loss_of_acsc_falls_and_lambda_stays_finite(model: sdnet.SDNet, images: Tensor) -> None:
    rule, layer = UnlabelledRule(steps=10), model.stem.conv
    assert isinstance(layer, sdnet.CSCConv2d)
    lam = rule(layer, images)
    assert lam.ndim == 0
    assert 0 < float(lam) < 2
    with torch.no_grad():
        assert float(rule.loss(layer, images, lam)) < float(rule.loss(layer, images, layer.lam))
    compiled = torch.compile(RobustModel(model, rule), backend="eager")
    torch.testing.assert_close(compiled(images), RobustModel(model, rule)(images))


def test_gradients_flow_through_the_noise_estimate(model: sdnet.SDNet, images: Tensor) -> None:
    x = images[2:3].clone().requires_grad_()
    lam = RobustModel(model, NoiseRule(2.0)).lam_of(x)
    assert isinstance(lam, Tensor)
    (through_rule,) = torch.autograd.grad(lam.sum(), x)
    assert float(through_rule.abs().sum()) > 0
    fixed = RobustModel(model, float(lam.detach()))
    gradients = [torch.autograd.grad(m(x)[:, 0].sum(), x)[0] for m in (RobustModel(model, NoiseRule(2.0)), fixed)]
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_training_lambda_per_atom_is_the_least(rule: Rule, images: Tensor) -> None:
    torch.manual_seed(0)
    model = sdnet.create_model("sdnet18", 10, stem="cifar", width=8, learn_lam="atom").eval()
    with torch.no_grad():
        robust = RobustModel(model, rule)
        lam = torch.as_tensor(robust.lam_of(images))
        assert lam.shape == ((4, 8, 1, 1) if rule.per_sample else ())
        assert (lam >= 0.1 - 1e-6).all()
        assert robust(images).isfinite().all()


@pytest.mark.parametrize("rule", PER_SAMPLE, ids=lambda rule: type(rule).__name__)
def test_a_training_lambda_per_image_is_the_least_and_has_to_fit_the_batch(
    model: sdnet.SDNet, rule: Rule, images: Tensor
) -> None:
    per_image = copy.deepcopy(model)
    sdnet.set_lambda(per_image, torch.tensor([0.1, 5.0, 0.1, 0.1]), "first")
    with torch.no_grad():
        lam = torch.as_tensor(RobustModel(per_image, rule).lam_of(images))
        assert float(lam[1]) == 5
        if isinstance(rule, NoiseRule):
            with pytest.raises(ValueError, match=r"lam of the first layer has shape \[4, 1, 1, 1\]; for 2 images"):
                RobustModel(per_image, rule)(images[:2])


def test_a_pixel_model_is_traced(model: sdnet.SDNet) -> None:
    pixels = PixelModel(model, [0.5] * 3, [0.25] * 3)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(torch.fx.symbolic_trace(pixels)(images), pixels(images))


def test_the_line_is_recovered() -> None:
    residuals = [10.0, 20.0, 50.0, 80.0]
    slope, intercept = line_through(residuals, [0.01 * r + 0.2 for r in residuals])
    assert slope == pytest.approx(0.01)
    assert intercept == pytest.approx(0.2)


def test_fit_finds_the_lambdas_that_were_planted(model: sdnet.SDNet, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, best = [], [0.2, 0.4, 0.6]
    for scale in (0.1, 0.5, 1.0):
        x = scale * torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
        groups.append((x, torch.zeros(4, dtype=torch.long)))
    by_energy = {round(float(x.square().sum()), 2): lam for (x, _), lam in zip(groups, best, strict=True)}

    def planted(_: nn.Module, x: Tensor, lam: float | Tensor | None = None) -> Tensor:
        right = lam == by_energy[round(float(x.square().sum()), 2)]
        return torch.tensor([[1.0, 0.0] if right else [0.0, 1.0]]).expand(len(x), 2)

    residuals = [float(residual_of(model.stem.conv, x).detach().double().mean()) for x, _ in groups]  # type: ignore[arg-type]
    monkeypatch.setattr(sdnet.SDNet, "forward", planted)
    rule = fit_residual_rule(model, groups, [0.1, 0.2, 0.4, 0.6, 0.8])
    slope, intercept = line_through(residuals, best)
    assert rule.slope == pytest.approx(slope)
    assert rule.intercept == pytest.approx(intercept)
    assert rule.most == 0.8


def test_calibration_takes_the_best_factor_of_those_that_keep_clean_accuracy(model: sdnet.SDNet) -> None:
    images = torch.rand(20, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    mean, std = [0.5] * 3, [0.25] * 3
    with torch.no_grad():
        labels = PixelModel(model, mean, std)(images).argmax(1)  # the training lambda is right on all clean images
    rule = calibrate_noise_rule(model, images, labels, mean=mean, std=std, factors=[0.5, 8.0], severities=[1, 3])
    robust = PixelModel(RobustModel(model, rule), mean, std)
    assert accuracy(robust, images, labels) == 100
    assert rule.k < 8


def test_grids_are_taken_as_arrays_and_tensors(model: sdnet.SDNet) -> None:
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    expected = accuracy_over_lambda(model, images, labels, [0.1, 0.5])
    grids: list[Any] = [np.array([0.1, 0.5]), torch.tensor([0.1, 0.5]), (0.1, np.float32(0.5))]
    assert all(accuracy_over_lambda(model, images, labels, grid) == expected for grid in grids)
    assert ResidualRule(SINGLE, np.float64(0.25), most=1).slope == 0.5


def test_uint8_pixels_are_those_in_the_unit_range(model: sdnet.SDNet) -> None:
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    arrays: Any = np.array([0.5] * 3), np.array([0.25] * 3)
    with torch.no_grad():
        expected = model((images / 255 - 0.5) / 0.25)
        torch.testing.assert_close(PixelModel(model, [0.5] * 3, [0.25] * 3)(images), expected)
        torch.testing.assert_close(PixelModel(model, *arrays)(images / 255), expected)


def test_logits_that_are_nan_are_wrong(model: sdnet.SDNet) -> None:
    diverged = copy.deepcopy(model)
    with torch.no_grad():
        diverged.linear.weight.fill_(float("nan"))  # type: ignore[union-attr, operator]
    assert accuracy(diverged, torch.rand(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)) == 0


def test_a_half_precision_batch_is_adapted_to_under_autocast(model: sdnet.SDNet, images: Tensor) -> None:
    robust = RobustModel(model, UnlabelledRule(steps=2))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.as_tensor(robust.lam_of(images.bfloat16())).item() == pytest.approx(
            torch.as_tensor(robust.lam_of(images)).item(), rel=0.02
        )
        assert robust(images.bfloat16()).isfinite().all()


def test_batch_statistics_are_those_of_the_batch(images: Tensor) -> None:
    torch.manual_seed(0)
    model = sdnet.create_model("resnet18", 10, stem="cifar", width=8)
    expected = model.train()(images).detach()
    model.eval()
    before = model.state_dict()["stem.norm.running_mean"].clone()
    robust = RobustModel(model, None, batch_statistics=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(robust(images), expected)
        assert robust(images[:1]).isfinite().all()
        assert not model(images).allclose(expected)
    assert model.state_dict()["stem.norm.running_mean"].equal(before)
    assert robust.model.linear.weight is model.linear.weight  # type: ignore[union-attr]


IMAGE = torch.rand(1, 3, 32, 32)
LABEL = torch.zeros(1, dtype=torch.long)
UNPACKED: Any = (0.5, 0.2)
ONE: Any = 1.0
TEXT: Any = "abc"
SINGLE: Any = np.float32(0.5)


def calibrated(model: sdnet.SDNet, **options: Any) -> NoiseRule:
    return calibrate_noise_rule(model, IMAGE, LABEL, mean=[0.5] * 3, std=[0.2] * 3, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: NoiseRule(-1.0), "k is -1.0; it must be a finite number of at least 0"),
        (lambda m: ResidualRule(float("nan"), 0, 1), "slope is nan; it must be a finite number"),
        (lambda m: UnlabelledRule(steps=0), "steps is 0; it must be an int of at least 1"),
        (lambda m: RobustModel(m, -0.1), "rule is -0.1; it must be a finite number of at least 0"),
        (lambda m: RobustModel(nn.Linear(3, 3), None), "model is of type Linear; it must be an sdnet.SDNet"),
        (lambda m: RobustModel(m, NoiseRule(1))(IMAGE[0]), r"x is of type Tensor and shape \[3, 32, 32\]"),
        (lambda m: m(IMAGE, lam=-0.1), "lam is -0.1; it must be a finite number of at least 0"),
        (lambda m: accuracy(m, IMAGE, torch.zeros(2, dtype=torch.long)), r"labels is .*\[2\]; it must hold 1 integers"),
        (lambda m: accuracy(m, IMAGE[:0], LABEL[:0]), r"images is .*\[0, 3, 32, 32\]; it must be a tensor"),
        (lambda m: estimate_noise(IMAGE[:, :, :2]), "H and W of at least 3"),
        (lambda m: fit_residual_rule(m, [(IMAGE, LABEL)], [0.1]), "groups holds 1 groups; a line needs two at least"),
        (lambda m: fit_residual_rule(m, [(IMAGE, LABEL)], [-0.1]), "lambdas is -0.1; it must be a finite number"),
        (lambda m: PixelModel(m, [0.5] * 3, [0.0] * 3), "std above 0"),
        (
            lambda m: PixelModel(m, *UNPACKED),
            "mean is 0.5 and std 0.2; they must be sequences of one number per channel",
        ),
        (lambda m: PixelModel(m, [0.5] * 3, [float("nan")] * 3), "std above 0"),
        (lambda m: PixelModel(m, TEXT, TEXT), "they must be sequences of one number per channel"),
        (lambda m: PixelModel(m, [0.5] * 2, [0.2] * 2)(IMAGE), r"pixels is .*; it must be a tensor \[N, 2, H, W\]"),
        (lambda m: PixelModel(m, [0.5] * 3, [0.2] * 3)(IMAGE.int()), "pixels is torch.int32; it must be uint8, or"),
        (lambda m: accuracy(m, IMAGE, LABEL.bool()), "labels is torch.bool; it must hold 1 integers"),
        (lambda m: accuracy_over_lambda(m, IMAGE, LABEL, []), "lambdas is empty; it must hold one value at least"),
        (lambda m: accuracy_over_lambda(m, IMAGE, LABEL, ONE), "lambdas is 1.0; it must be a sequence of numbers"),
        (lambda m: accuracy_over_lambda(m, IMAGE, LABEL, TEXT), "lambdas is 'abc'; it must be a sequence of numbers"),
        (lambda m: fit_residual_rule(m, ONE, [0.1]), "groups is 1.0; it must hold pairs of images and labels"),
        (lambda m: fit_residual_rule(m, [ONE], [0.1]), "groups holds 1.0; it must hold pairs of images and labels"),
        (lambda m: calibrated(m, severities=ONE), "severities is 1.0; it must be a sequence of numbers"),
        (lambda m: calibrated(m, severities=[6]), "severity is 6; for gaussian noise of scale cifar10-c"),
        (lambda m: calibrated(m, factors=ONE), "factors is 1.0; it must be a sequence of numbers"),
        (lambda m: calibrated(m, most_lost=-1.0), "most_lost is -1.0; it must be a finite number of at least 0"),
        (lambda m: RobustModel(m, TEXT), "rule is 'abc'; it must be a finite number of at least 0, a Rule or None"),
        (lambda m: accuracy(m, IMAGE, LABEL + 10), "labels holds 10; the model has classes 0 to 9"),
        (lambda m: accuracy(m, IMAGE, LABEL - 1), "labels holds -1; the model has classes 0 to 9"),
        (lambda m: pgd(m, IMAGE, LABEL + 10, eps=0.1), "labels holds 10; the model has classes 0 to 9"),
        (lambda m: residual_of(m.linear, IMAGE), "layer is of type Linear; it must be a CSC layer"),
        (lambda m: line_through([1.0, 1.0], [0.1, 0.2]), "residuals has 1 different values; a line needs two"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    model: sdnet.SDNet, call: Callable[[sdnet.SDNet], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)


def test_a_resnet_takes_no_lambda() -> None:
    resnet = sdnet.create_model("resnet18", 10, stem="cifar", width=8).eval()
    with pytest.raises(ValueError, match="model has no CSC layers, so a rule has no lambda to choose"):
        RobustModel(resnet, NoiseRule(1))
    with pytest.raises(ValueError, match="the stem of this network has no CSC layer"):
        resnet(IMAGE, lam=0.1)
