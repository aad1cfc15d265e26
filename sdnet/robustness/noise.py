"""An estimate of the noise in single images, without labels and without clean images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels import checks

LAPLACIAN_DIFFERENCE = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
"""The difference of two discrete Laplacians. It removes constant and linear parts; its entries have squares that sum
to 36, so white noise of standard deviation s comes out with 6 s."""


def estimate_noise(images: Tensor) -> Tensor:
    """Estimate the standard deviation of the noise in every image (Immerkaer, 1996).

        sigma = sqrt(pi / 2) / 6 · mean |L * x|,

    with L the difference of two Laplacians, a 3x3 filter that is applied to every channel; the result is the mean over
    the channels. Gaussian noise of standard deviation s gives s. Edges and texture of the image add to the estimate:
    about 0.014 for clean CIFAR-10 pictures in [0, 1].

    Args:
        images: images in any unit, normalised or not; the estimate is in the same unit.

    Shape:
        - images: [N, C, H, W], with H and W at least 3.
        - Output: [N], in fp32, or fp64 for fp64 images.

    Returns:
        The estimates, differentiable with respect to `images`.

    Raises:
        ValueError: `images` has another shape or type.

    Example:
        >>> noise = 0.1 * torch.randn(4, 3, 32, 32)
        >>> estimate_noise(noise)  # close to 0.1
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or min(images.shape[1:]) < 1 or min(images.shape[2:]) < 3:
        raise ValueError(
            f"images is {checks.shown(images)}; it must be a tensor [N, C, H, W] with H and W of at least 3."
        )
    if not images.is_floating_point():
        raise ValueError(f"images is {images.dtype}; it must be floating point.")
    channels = images.shape[1]
    with torch.autocast(images.device.type, enabled=False):
        x = images if images.dtype == torch.float64 else images.float()
        kernel = torch.tensor(LAPLACIAN_DIFFERENCE, dtype=x.dtype, device=x.device).expand(channels, 1, 3, 3)
        return F.conv2d(x, kernel, groups=channels).abs().mean((1, 2, 3)) * (math.sqrt(math.pi / 2) / 6)
