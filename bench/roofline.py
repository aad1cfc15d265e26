"""The work of an operator by the counted model of `sdnet.bench.cost`: operations, and bytes in whole passes."""

from typing import NamedTuple

import torch

from sdnet.bench import cost
from sdnet.bench.operators import DTYPES, Case

STEPS = {
    "encode": cost.ANALYSIS._replace(codes=2),
    "residual": cost.SYNTHESIS._replace(images=2),
    "weight_correlation": cost.correlations(3),
}


class Work(NamedTuple):
    """Operations of the convolutions, and bytes read and written."""

    flops: float
    bytes: float


def least_work(case: Case, mode: str) -> Work | None:
    """What the fused formulation does with kept residuals, whoever is timed; None if the time has no such bound."""
    layer, itemsize = case.layer, torch.empty((), dtype=DTYPES[case.dtype]).element_size()
    if case.operator == "csc":
        operations = cost.forward("fused", case.n_steps) if mode != "backward" else []
        operations += cost.backward("fused", case.n_steps, keep_residual=True) if mode != "forward" else []
    elif case.operator in STEPS:
        operations = [STEPS[case.operator]]
    else:
        return None
    total = cost.total(operations, layer, case.batch, itemsize)
    return Work(total.flops, total.bytes)
