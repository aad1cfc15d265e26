"""Atoms of unit norm and the step size, 0.9 / (largest eigenvalue of A'A).

Power iteration runs in the input's space: AA' has the same largest eigenvalue as A'A, its vectors are images of the
size that the layer sees, and they are no larger than the codes. From a unit vector u,

    v = A A'u,   eigenvalue ~ |v|,   u <- v / |v|.

|v| approaches the eigenvalue from below and is at least the Rayleigh quotient u'AA'u. Nothing here waits for the
device, so a training step can afford one iteration of every layer.


`update_dictionaries` is what a training step does for every layer: it scales the atoms back to unit norm and
re-estimates the step size from the power vector of the last step,

    W[k] <- W[k] / |W[k]|,   v = A A'u,   u <- v / |v|,   step_size <- 0.9 / |v|.

It does so for all layers of a network at once: on a GPU with a handful of Triton launches in all
(`triton_path.step_sizes`), elsewhere with PyTorch's operators layer by layer.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from sdnet.kernels.reference import Pair, analysis, synthesis

SAFETY = 0.9
"""step times the largest eigenvalue: the official margin over an estimate that comes from below."""

SEED = 0

FLOOR = 1e-12
"""The least eigenvalue that a step is computed from: a dictionary of zeros has a long step, not an infinite one."""


def initial_power_vector(shape: tuple[int, ...]) -> Tensor:
    """A random unit vector that is the same in every process, whatever its random state; fp32, on the CPU."""
    power_vector = torch.randn(shape, generator=torch.Generator().manual_seed(SEED), device="cpu", dtype=torch.float32)
    return power_vector / torch.linalg.vector_norm(power_vector)


def gram(weight: Tensor, power_vector: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """A A'u of a vector [1, C, H, W] over a dictionary [K, C, kh, kw], and its norm, 0-d; fp32."""
    weight = weight.detach().float()
    size = (power_vector.shape[2], power_vector.shape[3])
    image = synthesis(analysis(power_vector, weight, stride, padding), weight, size, stride, padding)
    return image, torch.linalg.vector_norm(image)


def power_iteration(
    weight: Tensor, power_vector: Tensor, stride: Pair, padding: Pair, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """At least one iteration from a unit vector [1, C, H, W]: the new unit vector and the eigenvalue's estimate, 0-d.

    Both are fp32 and computed without a host sync.
    """
    eigenvalue = power_vector.new_zeros(())
    for _ in range(iterations):
        image, eigenvalue = gram(weight, power_vector, stride, padding)
        power_vector = image / eigenvalue.clamp_min(FLOOR)
    return power_vector, eigenvalue


def largest_eigenvalue(
    weight: Tensor,
    power_vector: Tensor,
    stride: Pair,
    padding: Pair,
    tolerance: float = 1e-5,
    subspace: int = 16,
    max_restarts: int = 100,
) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of A'A, 0-d, and its unit vector [1, C, H, W], from a vector to start from; fp32.

    Rayleigh-Ritz on the Krylov space of `subspace` power iterations, restarted from its best vector until a restart
    raises the eigenvalue by less than `tolerance` of it: some ten times fewer applications of AA' than power iteration
    alone needs. Looks at the device once in a restart.
    """
    shape, basis_size = power_vector.shape, min(subspace, power_vector.numel())
    previous = 0.0
    eigenvalue = power_vector.new_zeros(())
    for _ in range(max_restarts):
        basis: list[Tensor] = []
        images: list[Tensor] = []
        candidate = power_vector.flatten()
        for _ in range(basis_size):
            for _ in range(2):  # the second pass removes what rounding leaves of the first
                for q in basis:
                    candidate = candidate - (q @ candidate) * q
            candidate = candidate / torch.linalg.vector_norm(candidate).clamp_min(FLOOR)
            image, _ = gram(weight, candidate.view(shape), stride, padding)
            basis.append(candidate)
            images.append(image.flatten())
            candidate = images[-1]
        q = torch.stack(basis)
        projected = q @ torch.stack(images).mT
        eigenvalues, mixtures = torch.linalg.eigh((projected + projected.mT) / 2)
        eigenvalue = eigenvalues[-1]
        power_vector = (mixtures[:, -1] @ q).view(shape)
        power_vector = power_vector / torch.linalg.vector_norm(power_vector).clamp_min(FLOOR)
        current = float(eigenvalue)
        if current - previous <= tolerance * current:
            break
        previous = current
    return power_vector, eigenvalue


def step_size_of(eigenvalue: Tensor) -> Tensor:
    """0.9 / eigenvalue."""
    return SAFETY / eigenvalue.clamp_min(FLOOR)


ATOM_FLOOR = 1e-12
"""The least norm that an atom is divided by."""


class DictionaryState(NamedTuple):
    """The state of a layer: weight [K, C, kh, kw], the power iteration's vector [1, C, H, W] and step, 0-d, in fp32."""

    weight: Tensor
    power_vector: Tensor
    step_size: Tensor
    stride: Pair
    padding: Pair


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def fits(dictionary: DictionaryState) -> bool:
    """Whether the Triton kernels take it: fp32 on a GPU, densely packed."""
    weight, power_vector, step_size = dictionary.weight, dictionary.power_vector, dictionary.step_size
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    single = weight.dtype == power_vector.dtype == step_size.dtype == torch.float32
    return has_triton() and weight.is_cuda and dense and single and power_vector.is_contiguous()


@torch.no_grad()
def update_dictionaries(dictionaries: Sequence[DictionaryState], iterations: int = 1) -> None:
    """Projects the atoms of all dictionaries and runs `iterations` power iterations; changes them in place."""
    fused: dict[torch.device, list[DictionaryState]] = {}
    for dictionary in dictionaries:
        if fits(dictionary):
            fused.setdefault(dictionary.weight.device, []).append(dictionary)
        else:
            update_dictionary(dictionary, iterations)
    for device, together in fused.items():
        with torch.cuda.device(device):
            import_module("sdnet.kernels.triton_path.step_sizes").update_dictionaries(together, iterations)


@torch.no_grad()
def update_dictionary(dictionary: DictionaryState, iterations: int = 1) -> None:
    """The same for one dictionary with PyTorch's operators."""
    weight, power_vector, step_size, stride, padding = dictionary
    norms = torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True)
    weight.div_(norms.clamp_min(ATOM_FLOOR))
    image, eigenvalue = power_iteration(weight, power_vector, stride, padding, iterations)
    power_vector.copy_(image)
    step_size.copy_(step_size_of(eigenvalue))
