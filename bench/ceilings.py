"""What the device can do at best, measured in the same run: a large copy and a large matrix product."""

from typing import NamedTuple

import torch

from sdnet.bench.timing import Timing, interleave, make_sampler, measuring_stream


class Ceilings(NamedTuple):
    """Bytes read and written per second by a copy, and operations per second of a product, medians."""

    copy_gb_s: float
    gemm_tflop_s: float

    def shortest_ms(self, flops: float, bytes_moved: float) -> float:
        """The roofline: milliseconds that the work takes if either ceiling is reached."""
        return max(flops / (self.gemm_tflop_s * 1e9), bytes_moved / (self.copy_gb_s * 1e6))


def measure_ceilings(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> Ceilings:
    """Copy of 1 GiB (CPU: 256 MiB) and product of 8192 x 8192 matrices (CPU: 1024 x 1024)."""
    on_gpu = device.type == "cuda"
    size, bytes_copied = (8192, 2**30) if on_gpu else (1024, 2**28)
    with measuring_stream(device):
        source = torch.empty(bytes_copied // 8, dtype=torch.int64, device=device).random_()  # zeros may move faster
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls = {"copy": lambda: target.copy_(source), "gemm": lambda: a @ b}
        samplers = {name: make_sampler([call], device, capturable=True)[0] for name, call in calls.items()}
        timings: dict[str, Timing] = interleave(samplers, seconds)
    return Ceilings(
        copy_gb_s=2 * bytes_copied / timings["copy"].p50 / 1e6, gemm_tflop_s=2 * size**3 / timings["gemm"].p50 / 1e9
    )
