"""The largest eigenvalue of A'A, which fixes the step size: step = 0.9 / eigenvalue.

Power iteration runs in the input's space: AA' has the same largest eigenvalue as A'A, its vectors are images of the
size that the layer sees, and they are no larger than the codes. From a unit vector u,

    v = A A'u,   eigenvalue ~ |v|,   u <- v / |v|.

|v| approaches the eigenvalue from below and is at least the Rayleigh quotient u'AA'u. Nothing here waits for the
device, so a training step can afford one iteration of every layer.
"""

import torch
from torch import Tensor

from sdnet.kernels.reference import Pair, analysis, synthesis

SAFETY = 0.9
"""step times the largest eigenvalue: the official margin over an estimate that comes from below."""

FLOOR = 1e-12
"""The least eigenvalue that a step is computed from: a dictionary of zeros has a long step, not an infinite one."""


def power_iteration(
    weight: Tensor, vector: Tensor, stride: Pair, padding: Pair, iterations: int = 1
) -> tuple[Tensor, Tensor]:
    """`iterations` steps from a vector [1, C, H, W] over a dictionary [K, C, kh, kw].

    Returns the new unit vector and the estimate of the largest eigenvalue, 0-d, both fp32, without a host sync.
    """
    weight = weight.detach().float()
    size = (vector.shape[2], vector.shape[3])
    eigenvalue = vector.new_zeros(())
    for _ in range(iterations):
        vector = synthesis(analysis(vector, weight, stride, padding), weight, size, stride, padding)
        eigenvalue = torch.linalg.vector_norm(vector)
        vector = vector / eigenvalue.clamp_min(FLOOR)
    return vector, eigenvalue


def largest_eigenvalue(
    weight: Tensor,
    vector: Tensor,
    stride: Pair,
    padding: Pair,
    tolerance: float = 1e-6,
    max_iterations: int = 1000,
    check_every: int = 10,
) -> tuple[Tensor, Tensor]:
    """Power iteration until `check_every` steps change the eigenvalue by less than `tolerance` of it.

    Looks at the device only once in `check_every` iterations.
    """
    previous = float("nan")
    eigenvalue = vector.new_zeros(())
    for _ in range(0, max_iterations, check_every):
        vector, eigenvalue = power_iteration(weight, vector, stride, padding, check_every)
        current = float(eigenvalue)
        if abs(current - previous) <= tolerance * current:
            break
        previous = current
    return vector, eigenvalue


def step_size(eigenvalue: Tensor) -> Tensor:
    """0.9 / eigenvalue."""
    return SAFETY / eigenvalue.clamp_min(FLOOR)
