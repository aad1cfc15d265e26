"""The update of all dictionaries of a network after an optimizer step: projected atoms, re-estimated step sizes.

On a GPU all layers can share a handful of Triton launches (`triton_path.step_sizes`); elsewhere PyTorch's operators run
layer by layer (`step_sizes`). The mathematics is at the head of `step_sizes`. As for calls of the operator, `impl` and
the environment variable SDNET_IMPL say which, and "auto" takes what has been qualified on this machine.
"""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from sdnet.kernels import step_sizes
from sdnet.kernels.dispatch import MOST_ELEMENTS, obstacle_of, requested
from sdnet.kernels.qualify import job
from sdnet.kernels.reference import codes_size
from sdnet.kernels.step_sizes import DictionaryState


def fits(dictionary: DictionaryState) -> bool:
    """Return whether the Triton kernels take it: fp32 on a supported GPU, densely packed in either memory format."""
    weight, power_vector, step_size = dictionary.weight, dictionary.power_vector, dictionary.step_size
    dense = is_dense(weight) and is_dense(power_vector)
    single = weight.dtype == power_vector.dtype == step_size.dtype == torch.float32
    together = weight.device == power_vector.device == step_size.device
    able = dense and single and together and within_reach(dictionary)
    return weight.is_cuda and able and obstacle_of(weight.device, weight.dtype) is None


def within_reach(dictionary: DictionaryState) -> bool:
    """Return whether the Triton kernels, whose offsets have 32 bits, reach all of its atoms, image and codes."""
    weight, image, _, stride, padding = dictionary
    size, kernel_size = (image.shape[2], image.shape[3]), (weight.shape[2], weight.shape[3])
    codes = weight.shape[0] * prod(codes_size(size, kernel_size, stride, padding))
    return max(weight.numel(), image.numel(), codes) <= MOST_ELEMENTS


def is_dense(tensor: Tensor) -> bool:
    """Return whether a 4-d tensor is contiguous or contiguous in channels_last."""
    return tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def update_dictionaries(
    dictionaries: Sequence[DictionaryState], iterations: int = 1, impls: Sequence[str] | None = None
) -> None:
    """Project the atoms of all dictionaries and re-estimate their step sizes in place, without a host sync.

    Args:
        dictionaries: the dictionaries.
        iterations: how often each estimate is repeated.
        impls: what is asked for, for each dictionary; None for "auto". "torch" and "reference" take PyTorch's
            operators, "triton" the Triton kernels where they can run, "auto" what has been qualified on this machine.
    """
    together: dict[tuple[torch.device, str], list[DictionaryState]] = {}
    taken: set[int] = set()  # atoms that several layers share would be projected by two programs at once
    for dictionary, impl in zip(dictionaries, impls or ["auto"] * len(dictionaries), strict=True):
        impl, _ = requested(impl)
        if impl in ("auto", "triton") and fits(dictionary) and dictionary.weight.data_ptr() not in taken:
            taken.add(dictionary.weight.data_ptr())
            together.setdefault((dictionary.weight.device, impl), []).append(dictionary)
        else:
            step_sizes.update_dictionary(dictionary, iterations)
    for (device, impl), group in together.items():
        if impl == "triton":
            update_by_triton(group, iterations)
            continue
        qualified, _, name = job.decide_update(group, device)
        if qualified:
            try:
                update_by_triton(group, iterations)
                continue
            except Exception as error:
                # What has been updated by then is updated again, from where it is.
                job.rescue(error, name, device, "the update of the dictionaries", several_ranks=job.ranks() > 1)
        for dictionary in group:
            step_sizes.update_dictionary(dictionary, iterations)


def update_by_triton(dictionaries: Sequence[DictionaryState], iterations: int = 1) -> None:
    """Do what `update_dictionaries` does, by the Triton kernels, for dictionaries of one device that fit them."""
    from sdnet.kernels.triton_path.step_sizes import update_dictionaries as update_together

    with torch.cuda.device_of(dictionaries[0].weight):
        update_together(dictionaries, iterations)
