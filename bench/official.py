"""The official SDNet, transcribed step by step: the oracle of the parity tests and a model of the benchmarks.

Slow and literal on purpose, and independent of `sdnet.kernels`: the recurrences, the structure of the networks and the
names in the state dict are those of the official release (Delay-Xili/SDNet), so that its checkpoints load unchanged.
Three things differ. The official forward pass computes reconstruction losses and does not use them; here they are left
out. The official threshold keeps its old value until the next `update_stepsize`; here it is lam * step_size at once.
The official adaptive lambda takes effect from the second refresh on; here from the first forward pass on.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_FLOOR = 1e-12


@dataclass(frozen=True)
class OfficialConfig:
    """The options of the official configuration files, under their names where they have one."""

    depth: Literal[18, 34] = 18
    all_layers: bool = False
    stem: Literal["cifar", "imagenet"] = "cifar"
    num_classes: int = 10
    shortcut: bool = True
    n_steps: int = 2
    lmbd: float = 0.1
    mu: float = 0.0
    nonnegative: bool = True
    square_noise: bool = True
    expansion_factor: int = 1
    adaptive_lambda: bool = False


class DictConv2d(nn.Module):
    """Codes [N, K, h, w] of an input [N, C, H, W] over a dictionary [K, expansion_factor C, k, k]."""

    step_size: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, config: OfficialConfig):
        super().__init__()
        self.config = config
        self.stride = stride
        self.padding = kernel_size // 2
        self.weight = nn.Parameter(
            torch.empty(out_channels, config.expansion_factor * in_channels, kernel_size, kernel_size)
        )
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.register_buffer("step_size", torch.tensor(0.1))
        self.eigenvector: Tensor | None = None

    def conv(self, x: Tensor) -> Tensor:
        """Return A'x."""
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)

    def conv_transpose(self, codes: Tensor) -> Tensor:
        """Return A c for an input of `stride` times the size of its codes; no other size is supported."""
        output_padding = 0 if self.stride == 1 else 1
        return F.conv_transpose2d(
            codes, self.weight, stride=self.stride, padding=self.padding, output_padding=output_padding
        )

    def normalize_weight(self) -> None:
        """Scale each atom to unit norm in place, without a gradient, in evaluation mode too."""
        with torch.no_grad():
            norm = self.weight.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
            self.weight.data = self.weight.data / norm.view(-1, 1, 1, 1)

    def update_stepsize(self, max_iterations: int = 50, tolerance: float = 1e-5) -> None:
        """Set step_size = 0.9 / |A v|^2, with v from 1 to `max_iterations` power iterations on A'A.

        They start from the last v. The first v is random and has the codes' size of the first forward pass.
        """
        if self.eigenvector is None:
            raise RuntimeError("update_stepsize needs a forward pass before it, which sets the codes' size.")
        with torch.no_grad():
            v, error = self.eigenvector, float("inf")
            for _ in range(max_iterations):
                if error <= tolerance:
                    break
                v_next = self.conv(self.conv_transpose(v))
                v_next = v_next / v_next.norm().clamp_min(NORM_FLOOR)
                error = (v_next - v).square().sum().item()
                v = v_next
            self.eigenvector = v
            self.step_size.copy_(0.9 / self.conv_transpose(v).square().sum())

    def prox(self, v: Tensor, lmbd: float, step: float) -> Tensor:
        """Return the proximal operator of step * (lmbd |c|_1 + mu/2 |c|^2), one-sided if nonnegative."""
        scale = 1 + self.config.mu * step
        codes = F.softshrink(v / scale, lmbd * step / scale)
        return F.relu(codes) if self.config.nonnegative else codes

    def gradient(self, x: Tensor, codes: Tensor) -> Tensor:
        """Return A'r of the residual r = x - A c, or A'(r / |r|) / 2 with the norm of each sample detached."""
        residual = x - self.conv_transpose(codes)
        if self.config.square_noise:
            return self.conv(residual)
        norm = residual.detach().flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
        return 0.5 * self.conv(residual / norm.view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes of x."""
        self.normalize_weight()
        step, lmbd = self.step_size.item(), self.config.lmbd
        height, width = x.shape[2:]
        x = x.repeat(1, self.config.expansion_factor, 1, 1)

        c = self.conv(x)
        if self.eigenvector is None:
            self.eigenvector = torch.randn(1, *c.shape[1:]).to(c)
        if self.config.adaptive_lambda:
            lmbd *= (x.shape[1] // self.config.expansion_factor) * height * width / c[0].numel()
        c = self.prox(step * c, lmbd, step)

        t, c_pre = 1.0, c
        for i in range(1, self.config.n_steps):
            t_pre, t = t, (1 + math.sqrt(1 + 4 * t * t)) / 2
            a = c if i == 1 else (t_pre + t - 1) / t * c + (1 - t_pre) / t * c_pre
            c_pre, c = c, self.prox(a + step * self.gradient(x, c), lmbd, step)
        return c


class DictBlock(nn.Module):
    """A wrapper for the name `dn` in the official state dict."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, config: OfficialConfig):
        super().__init__()
        self.dn = DictConv2d(in_channels, out_channels, kernel_size, stride, config)

    def forward(self, x: Tensor) -> Tensor:
        """Return the codes of x."""
        return self.dn(x)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return the 1x1 convolution of a shortcut, or an empty module if the shape does not change."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """The block of sdnet18 and sdnet34, which is ResNet's."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the block."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class DictResidualBlock(nn.Module):
    """The block of sdnet18_all and sdnet34_all, whose only ReLU follows the shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, config: OfficialConfig):
        super().__init__()
        self.conv1 = DictBlock(in_channels, out_channels, 3, stride, config)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = DictBlock(out_channels, out_channels, 3, 1, config)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride) if config.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the block."""
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))


class DictStage(nn.Module):
    """A wrapper for the name `layers` in the official state dict of the _all networks."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the features of the stage."""
        return self.layers(x)


class OfficialSDNet(nn.Module):
    """The network, from images [N, 3, H, W] to logits [N, num_classes]; every strided layer needs an even size."""

    def __init__(self, config: OfficialConfig):
        super().__init__()
        self.layer0 = self._stem(config)
        counts = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}[config.depth]
        self.layer1 = self._stage(64, 64, counts[0], 1, config)
        self.layer2 = self._stage(64, 128, counts[1], 2, config)
        self.layer3 = self._stage(128, 256, counts[2], 2, config)
        self.layer4 = self._stage(256, 512, counts[3], 2, config)
        self.linear = nn.Linear(512, config.num_classes)

    @staticmethod
    def _stem(config: OfficialConfig) -> nn.Sequential:
        if config.stem == "cifar":
            return nn.Sequential(DictBlock(3, 64, 3, 1, config), nn.BatchNorm2d(64))
        pool = DictBlock(64, 64, 3, 2, config) if config.all_layers else nn.MaxPool2d(3, 2, 1)
        return nn.Sequential(DictBlock(3, 64, 7, 2, config), nn.BatchNorm2d(64), pool)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, count: int, stride: int, config: OfficialConfig) -> nn.Module:
        shapes = [(in_channels, out_channels, stride)] + [(out_channels, out_channels, 1)] * (count - 1)
        if config.all_layers:
            return DictStage([DictResidualBlock(*shape, config) for shape in shapes])
        return nn.Sequential(*(ResidualBlock(*shape) for shape in shapes))

    def dict_layers(self) -> list[DictConv2d]:
        """Return the CSC layers, from the input to the logits."""
        return [module for module in self.modules() if isinstance(module, DictConv2d)]

    def update_stepsize(self) -> None:
        """Refresh all step sizes, as the official loop does before every batch of training and validation."""
        for layer in self.dict_layers():
            layer.update_stepsize()

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of x."""
        out = self.layer0(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return self.linear(out.mean(dim=(2, 3)))
