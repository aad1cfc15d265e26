"""An estimate of the noise in single images, without labels and without clean images."""

import math

import torch
from torch import Tensor

from sdnet.kernels import checks
from sdnet.kernels.autocast import without_autocast


def estimate_noise(images: Tensor) -> Tensor:
    """Estimate the standard deviation of the noise in every image (Immerkaer, 1996).

        sigma = sqrt(pi / 2) / 6 · mean |L * x|,

    with the 3x3 filter L = [1, -2, 1]' [1, -2, 1], the difference of two Laplacians, applied to every channel; the
    result is the mean over the channels. L removes constant and linear parts, and the squares of its entries sum to
    36, so white noise of standard deviation s has the standard deviation 6 s in L * x. Gaussian noise of standard
    deviation s therefore gives s. Edges and texture of the image add to the estimate: about 0.014 for clean CIFAR-10
    pictures in [0, 1].

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
    with without_autocast(images.device):
        x = images if images.dtype == torch.float64 else images.float()
        # L separates into second differences along both axes, which cost less than a depthwise convolution.
        filtered = x.diff(n=2, dim=3).diff(n=2, dim=2)
        return filtered.abs().mean((1, 2, 3)) * (math.sqrt(math.pi / 2) / 6)
