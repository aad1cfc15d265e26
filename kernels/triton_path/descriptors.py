"""Tensors as TMA reads and writes them: boxes that go straight between memory and shared memory, zeros from outside."""

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ALIGNMENT = 16
"""Bytes that addresses and strides are multiples of."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address that a descriptor can take; copied if it lies elsewhere, as a slice may."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def pixel_boxes(tensor: Tensor, images: int, channels: int) -> TensorDescriptor:
    """A channels_last tensor [N, C, H, W] as [H, W, N, C], one pixel of so many images and channels at a time."""
    batch, depth, height, width = tensor.shape
    # Not the tensor's own strides: an axis of length one may have any.
    strides = [width * depth, depth, height * width * depth, 1]
    return TensorDescriptor(tensor, [height, width, batch, depth], strides, [1, 1, images, channels])


def matrix_blocks(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A dense tensor as a matrix of its first axis and all others, so many rows and columns at a time."""
    count, length = tensor.shape[0], tensor[0].numel()
    return TensorDescriptor(tensor, [count, length], [length, 1], [rows, columns])
