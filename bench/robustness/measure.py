"""What robustness tables are made of: which pictures a model classifies rightly, and what the first layer does."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn

from sdnet.bench.robustness.pictures import PIXEL_MEAN, PIXEL_STD
from sdnet.layers import CSCConv2d
from sdnet.robustness.fitting import PixelModel, is_right
from sdnet.robustness.model import RobustModel
from sdnet.robustness.rules import Rule, residual_of

BATCH = 200
"""Pictures of one forward, where a result depends on the batch: with its statistics, or with rule c."""

CPU_BATCH = 50
"""Pictures of one forward on a CPU, where a result does not depend on the batch: their activations fit in the cache.

Measured for sdnet18 of width 16 on one core of two, beside two trainings: 781 images/s for 50 pictures, 540 for 200.
"""


def batch_for(pixels: Tensor) -> int:
    """Return how many pictures one forward takes where results do not depend on the batch."""
    return CPU_BATCH if pixels.device.type == "cpu" else BATCH


def pixel_model(model: nn.Module) -> PixelModel:
    """Return a model of pixels that normalises as the training program does, in evaluation mode."""
    device = next(model.parameters()).device
    return PixelModel(model, PIXEL_MEAN, PIXEL_STD).to(device).eval()


@torch.no_grad()
def correct(model: nn.Module, pixels: Tensor, labels: Tensor, batch: int | None = None) -> Tensor:
    """Return which pictures a model of pixels classifies rightly, [N] bool; `batch` is by default `batch_for`."""
    batch = batch or batch_for(pixels)
    parts = [is_right(model(pixels[at : at + batch]), labels[at : at + batch]) for at in range(0, len(pixels), batch)]
    return torch.cat(parts)


def percent(flags: Tensor) -> float:
    """Return the share of true flags in percent, rounded to 4 digits."""
    return round(100 * float(flags.double().mean()), 4)


@torch.no_grad()
def correct_with_lambda(robust: RobustModel, pixels: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Return which pictures a robust model classifies rightly, [N] bool, and the mean lambda that its rule chose."""
    batch = batch_for(pixels) if isinstance(robust.rule, Rule) and robust.rule.per_sample else BATCH
    normalise, right, lambdas = pixel_model(robust).normalise, [], []
    for at in range(0, len(pixels), batch):
        x = normalise(pixels[at : at + batch])
        lam = torch.as_tensor(robust.lam_of(x), device=x.device)
        right.append(is_right(robust.model(x, lam=lam), labels[at : at + batch]))
        lambdas.append(lam.float().mean().expand(len(x)))
    return torch.cat(right), float(torch.cat(lambdas).mean())


@torch.no_grad()
def first_layer_facts(
    layer: CSCConv2d, pixels: Tensor, normalise: Callable[[Tensor], Tensor], lam: float | None = None
) -> dict[str, float]:
    """Return the mean residual |x - A z|² / n_dict, relative residual and sparsity of a layer.

    Args:
        layer: the first layer.
        pixels: the pictures.
        normalise: returns the input of the layer for pixels.
        lam: lambda; None is the layer's own.
    """
    residuals, relative, zeros = [], [], []
    for part in map(normalise, pixels.split(batch_for(pixels))):
        residual = residual_of(layer, part, lam)
        residuals.append(residual)
        relative.append((residual / part.square().sum((1, 2, 3)).clamp_min(1e-12)).sqrt())
        zeros.append((layer(part, lam) == 0).float().mean((1, 2, 3)))
    return {
        "residual": float(torch.cat(residuals).mean()),
        "relative_residual": float(torch.cat(relative).mean()),
        "sparsity": float(torch.cat(zeros).mean()),
    }


@torch.no_grad()
def cost_of(model: nn.Module, rules: dict[str, Rule], x: Tensor, repeats: int = 15) -> dict[str, float]:
    """Return the time of a robust model over that of the model itself, for every rule: medians of interleaved calls."""
    calls: dict[str, nn.Module] = {"plain": model} | {name: RobustModel(model, rule) for name, rule in rules.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):
        for name, call in calls.items():
            begin = perf_counter()
            call(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)
            times[name].append(perf_counter() - begin)
    plain = median(times["plain"][1:])
    return {name: round(median(times[name][1:]) / plain, 3) for name in rules}


def digest_of(file: Path) -> str:
    """Return the SHA-256 sum of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()
