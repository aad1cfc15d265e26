"""Channels of zeros for images of few channels, so that a thread loads a whole pixel at a time.

A pixel of 3 channels in channels_last starts at an address that no wide load can take, and the kernels of the form
"few" gather it element by element. With a fourth channel of zeros it is one aligned load of 8 bytes (of 16 bits each).
Zeros in images and dictionary change no product; the additional channel of the residual and of all gradients is zero,
and is left out of the results.
"""

import torch.nn.functional as F
from torch import Tensor

from sdnet.kernels.triton_path.tiles import padded_channels


def padded(tensor: Tensor) -> Tensor:
    """Return images [N, C, H, W] or a dictionary [K, C, kh, kw] with zero channels up to `padded_channels(C)`."""
    more = padded_channels(tensor.shape[1]) - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, 0, 0, more)) if more else tensor


def without_padding(tensor: Tensor, channels: int) -> Tensor:
    """Return the first channels of images [N, C', H, W] or a dictionary [K, C', kh, kw]."""
    return tensor[:, :channels] if tensor.shape[1] > channels else tensor
