"""The update of all dictionaries of a network after an optimiser step: projected atoms, re-estimated step sizes.

On a GPU all layers share a handful of Triton launches (`triton_path.step_sizes`); elsewhere PyTorch's operators run
layer by layer (`step_sizes`). The mathematics is at the head of `step_sizes`.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from sdnet.kernels import step_sizes
from sdnet.kernels.step_sizes import DictionaryState


@cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def fits(dictionary: DictionaryState) -> bool:
    """Return whether the Triton kernels take it: fp32 on a GPU, densely packed in either memory format."""
    weight, power_vector, step_size = dictionary.weight, dictionary.power_vector, dictionary.step_size
    dense = is_dense(weight) and is_dense(power_vector)
    single = weight.dtype == power_vector.dtype == step_size.dtype == torch.float32
    return has_triton() and weight.is_cuda and dense and single


def is_dense(tensor: Tensor) -> bool:
    """Return whether a 4-d tensor is contiguous or contiguous in channels_last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def update_dictionaries(dictionaries: Sequence[DictionaryState], iterations: int = 1) -> None:
    """Project the atoms of all dictionaries and re-estimate their step sizes in place, without a host sync."""
    fused: dict[torch.device, list[DictionaryState]] = {}
    for dictionary in dictionaries:
        if fits(dictionary):
            fused.setdefault(dictionary.weight.device, []).append(dictionary)
        else:
            step_sizes.update_dictionary(dictionary, iterations)
    for device, together in fused.items():
        from sdnet.kernels.triton_path.step_sizes import update_dictionaries as update_together

        with torch.cuda.device(device):
            update_together(together, iterations)
