"""The roofline: the least time of an operator, from its counted work and two rates measured in the same run."""

from typing import NamedTuple

import torch

from sdnet.bench import cost
from sdnet.bench.providers import DTYPES, Workload
from sdnet.kernels.qualify.timing import interleave, make_sampler, measuring_stream

STEPS = {
    "encode": cost.ANALYSIS._replace(codes=2),
    "residual": cost.SYNTHESIS._replace(images=2),
    "weight_correlation": cost.correlations(3),
}


class Work(NamedTuple):
    """Floating-point operations of the convolutions, and bytes read and written."""

    flops: float
    bytes: float


class Ceilings(NamedTuple):
    """The rate of a large copy, in bytes read and written, and of a large matrix product; medians."""

    copy_gb_s: float
    gemm_tflop_s: float

    def shortest_ms(self, flops: float, bytes_moved: float) -> float:
        """Return the milliseconds of the work at the lower of both rates."""
        return max(flops / (self.gemm_tflop_s * 1e9), bytes_moved / (self.copy_gb_s * 1e6))


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Ceilings:
    """Time a copy of 1 GiB (CPU: 256 MiB) and a product of 8192 x 8192 matrices (CPU: 1024 x 1024)."""
    on_gpu = device.type == "cuda"
    size, bytes_copied = (8192, 2**30) if on_gpu else (1024, 2**28)
    with measuring_stream(device):
        source = torch.empty(bytes_copied // 8, dtype=torch.int64, device=device).random_()  # zeros may move faster
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
        samplers = {name: make_sampler([call], device, capturable=True)[0] for name, call in calls.items()}
        timings = interleave(samplers, seconds)
    return Ceilings(
        copy_gb_s=2 * bytes_copied / timings["copy"].p50 / 1e6, gemm_tflop_s=2 * size**3 / timings["gemm"].p50 / 1e9
    )


def least_work(workload: Workload, mode: str) -> Work | None:
    """Return the work of the fused formulation with kept residuals, for any provider; None if it is not counted."""
    if workload.operator == "csc":
        operations = cost.forward(workload.n_steps) if mode != "backward" else []
        operations += cost.backward(workload.n_steps, keep_residual=True) if mode != "forward" else []
    elif workload.operator in STEPS:
        operations = [STEPS[workload.operator]]
    else:
        return None
    total = cost.total(operations, workload.layer, workload.batch, DTYPES[workload.dtype].itemsize)
    return Work(total.flops, total.bytes)
