"""Robust inference: corruptions, rules that choose lambda at test time, and attacks.

docs/robustness.md explains when to trust them, with measurements.
"""

from sdnet.robustness.attacks import pgd
from sdnet.robustness.corruptions import (
    NOISES,
    SEVERITIES,
    corrupt,
    gaussian_noise,
    impulse_noise,
    occlude,
    shot_noise,
    speckle_noise,
    to_uint8,
)
from sdnet.robustness.fitting import (
    PixelModel,
    accuracy,
    accuracy_over_lambda,
    calibrate_noise_rule,
    fit_residual_rule,
    noisy_copies,
)
from sdnet.robustness.model import RobustModel, with_batch_statistics
from sdnet.robustness.noise import estimate_noise
from sdnet.robustness.published import PublishedFolder, corruptions_of, read_cifar_c, read_imagenet_c
from sdnet.robustness.rules import NoiseRule, ResidualRule, Rule, UnlabelledRule, residual_of

__all__ = [
    "NOISES",
    "SEVERITIES",
    "NoiseRule",
    "PixelModel",
    "PublishedFolder",
    "ResidualRule",
    "RobustModel",
    "Rule",
    "UnlabelledRule",
    "accuracy",
    "accuracy_over_lambda",
    "calibrate_noise_rule",
    "corrupt",
    "corruptions_of",
    "estimate_noise",
    "fit_residual_rule",
    "gaussian_noise",
    "impulse_noise",
    "noisy_copies",
    "occlude",
    "pgd",
    "read_cifar_c",
    "read_imagenet_c",
    "residual_of",
    "shot_noise",
    "speckle_noise",
    "to_uint8",
    "with_batch_statistics",
]
