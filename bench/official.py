"""The official SDNet, transcribed step by step: the oracle of the parity tests and the rival of the benchmarks.

Slow and literal on purpose, and independent of `sdnet.kernels`: the recurrences, the layout of the networks and the
names in the state dict are those of the official release (Delay-Xili/SDNet), so that its checkpoints load here as they
are. Three things are left out. The reconstruction losses that its forward computes and drops are not computed. Its
threshold goes stale until the next `update_stepsize`; here it is lam * step_size at once. Its adaptive lambda takes
effect from the second refresh; here from the first forward.
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
    """What the official configuration files choose; the field names are theirs where they have one."""

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
        return F.conv2d(x, self.weight, stride=self.stride, padding=self.padding)

    def conv_transpose(self, codes: Tensor) -> Tensor:
        """The adjoint of `conv` where inputs are `stride` times the size of their codes; no other size is supported."""
        output_padding = 0 if self.stride == 1 else 1
        return F.conv_transpose2d(
            codes, self.weight, stride=self.stride, padding=self.padding, output_padding=output_padding
        )

    def normalize_weight(self) -> None:
        """Scale each atom to unit norm, in place and unseen by autograd; in evaluation mode too."""
        with torch.no_grad():
            norm = self.weight.flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
            self.weight.data = self.weight.data / norm.view(-1, 1, 1, 1)

    def update_stepsize(self, max_iterations: int = 50, tolerance: float = 1e-5) -> None:
        """step_size = 0.9 / |A v|^2, v by at least one and at most `max_iterations` power iterations on A'A.

        Starts from the last v; the first one is random and lies on the codes' grid of the first forward.
        """
        if self.eigenvector is None:
            raise RuntimeError("update_stepsize needs one forward before it: the codes' size is not known yet.")
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
        scale = 1 + self.config.mu * step
        codes = F.softshrink(v / scale, lmbd * step / scale)
        return F.relu(codes) if self.config.nonnegative else codes

    def gradient(self, x: Tensor, codes: Tensor) -> Tensor:
        """A'r of the residual r = x - A c, or A'(r / |r|) / 2 with the norm detached and taken per sample."""
        residual = x - self.conv_transpose(codes)
        if self.config.square_noise:
            return self.conv(residual)
        norm = residual.detach().flatten(1).norm(dim=1).clamp_min(NORM_FLOOR)
        return 0.5 * self.conv(residual / norm.view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
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
    """The wrapper that gives the official state dict its `dn`."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int, config: OfficialConfig):
        super().__init__()
        self.dn = DictConv2d(in_channels, out_channels, kernel_size, stride, config)

    def forward(self, x: Tensor) -> Tensor:
        return self.dn(x)


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """The 1x1 convolution of a shortcut where the shape changes; empty where it does not."""
    if stride == 1 and in_channels == out_channels:
        return nn.Sequential()
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class ResidualBlock(nn.Module):
    """The block of sdnet18 and sdnet34: ResNet's own."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class DictResidualBlock(nn.Module):
    """The block of sdnet18_all and sdnet34_all: no ReLU but the one after a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, config: OfficialConfig):
        super().__init__()
        self.conv1 = DictBlock(in_channels, out_channels, 3, stride, config)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = DictBlock(out_channels, out_channels, 3, 1, config)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = projection(in_channels, out_channels, stride) if config.shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x))
        out = self.bn2(self.conv2(out))
        return out if self.shortcut is None else F.relu(out + self.shortcut(x))


class DictStage(nn.Module):
    """The wrapper that gives the official state dict of the _all networks its `layers`."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.layers = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class OfficialSDNet(nn.Module):
    """Logits [N, num_classes] of an image [N, 3, H, W], H and W such that every strided layer meets an even size."""

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
        """The CSC layers, from the input to the logits."""
        return [module for module in self.modules() if isinstance(module, DictConv2d)]

    def update_stepsize(self) -> None:
        """What the official loop does before every batch, training or validation."""
        for layer in self.dict_layers():
            layer.update_stepsize()

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer0(x)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            out = stage(out)
        return self.linear(out.mean(dim=(2, 3)))
