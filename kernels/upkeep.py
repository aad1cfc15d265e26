"""What a training step does for every dictionary: atoms back to unit norm, one warm power iteration, the step size.

    W[k] <- W[k] / |W[k]|,   v = A A'u,   u <- v / |v|,   step <- 0.9 / |v|

`follow` does it for all layers of a network at once, without waiting for the device: on a GPU with a handful of Triton
launches in all (`fused.spectral`), elsewhere with PyTorch's operators layer by layer.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sdnet.kernels import spectral
from sdnet.kernels.reference import Pair

ATOM_FLOOR = 1e-12
"""The least norm that an atom is divided by."""


class Dictionary(NamedTuple):
    """The state of a layer: weight [K, C, kh, kw], the power iteration's vector [1, C, H, W] and step, 0-d, in fp32."""

    weight: Tensor
    vector: Tensor
    step: Tensor
    stride: Pair
    padding: Pair


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fits(dictionary: Dictionary) -> bool:
    """Whether the Triton kernels take it: fp32 on a GPU, densely packed."""
    weight, vector, step = dictionary.weight, dictionary.vector, dictionary.step
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    single = weight.dtype == vector.dtype == step.dtype == torch.float32
    return has_triton() and weight.is_cuda and dense and single and vector.is_contiguous()


@torch.no_grad()
def follow(dictionaries: Sequence[Dictionary], iterations: int = 1) -> None:
    """Projects the atoms of all dictionaries and runs `iterations` power iterations; changes them in place."""
    fused: dict[torch.device, list[Dictionary]] = {}
    for dictionary in dictionaries:
        if fits(dictionary):
            fused.setdefault(dictionary.weight.device, []).append(dictionary)
        else:
            follow_one(dictionary, iterations)
    for device, together in fused.items():
        with torch.cuda.device(device):
            import_module("sdnet.kernels.fused.spectral").follow(together, iterations)


@torch.no_grad()
def follow_one(dictionary: Dictionary, iterations: int = 1) -> None:
    """The same for one dictionary with PyTorch's operators."""
    weight, vector, step, stride, padding = dictionary
    norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    weight.div_(norms.clamp_min(ATOM_FLOOR))
    image, eigenvalue = spectral.power_iteration(weight, vector, stride, padding, iterations)
    vector.copy_(image)
    step.copy_(spectral.step_size(eigenvalue))
