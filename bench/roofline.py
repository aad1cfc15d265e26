"""The least work that an operator needs: operations and bytes, counted from its shape."""

from typing import NamedTuple

import torch

from sdnet.bench.operators import DTYPES, Case


class Work(NamedTuple):
    """Operations and bytes that cannot be avoided: each input read once, each output written once."""

    flops: float
    bytes: float


def least_work(case: Case, mode: str) -> Work | None:
    """Of the CSC layer; None for operators whose time says nothing about a ceiling.

    With n steps the forward pass has 2 n - 1 convolutions; the backward pass has 2 n - 1 for the data and as many for
    the dictionary, if the residuals were kept. Forward reads x and writes z_n; backward reads x, dL/dz_n and all codes
    and writes dL/dx. The dictionary is read in both, its gradient written.
    """
    if case.operator != "csc":
        return None
    layer = case.layer
    height, width = layer.codes_size
    codes = case.batch * layer.atoms * height * width
    image = case.batch * layer.channels * layer.size[0] * layer.size[1]
    weight = layer.atoms * layer.channels * layer.kernel_size**2
    convolutions = 2 * case.n_steps - 1
    flops = 2 * codes * layer.channels * layer.kernel_size**2 * convolutions
    forward = Work(flops, image + weight + codes)
    backward = Work(2 * flops, 2 * image + 2 * weight + (case.n_steps + 1) * codes)
    works = {"forward": forward, "backward": backward}
    works["both"] = Work(*(a + b for a, b in zip(forward, backward, strict=True)))
    element = torch.empty((), dtype=DTYPES[case.dtype]).element_size()
    return Work(works[mode].flops, works[mode].bytes * element)
