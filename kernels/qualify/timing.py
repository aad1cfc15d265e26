"""Measurement of time: samplers that return the milliseconds of one call, run in turns.

A sampler times a burst of calls and divides. On a CPU it reads `perf_counter` around the burst. On a GPU it replays a
captured CUDA graph between two events, so that launches cost nothing. Calls that read device memory on the host cannot
be captured; they are timed with their launches between two events. A burst goes through several copies of the inputs,
together larger than the L2 cache of the GPU, so that no call finds its input there.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]
"""Returns one sample, the milliseconds of one call."""

BURST_MS = 2.0
"""The least length of a burst, in milliseconds."""

LONGEST_BURST = 200


class Timing(NamedTuple):
    """Percentiles of a call's milliseconds over `samples` samples."""

    p20: float
    p50: float
    p80: float
    samples: int


def percentiles(samples: Sequence[float]) -> Timing:
    """Return p20, p50 and p80 of the samples, with linear interpolation."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    p20, p50, p80 = sorted((deciles[1], deciles[4], deciles[7]))  # rounding can exchange equal ones
    return Timing(p20, p50, p80, len(samples))


def interleave(samplers: Mapping[str, Sampler], seconds: float, least: int = 3, most: int = 1000) -> dict[str, Timing]:
    """Run the samplers in turns, so that changes of the machine's speed affect all alike, and return their timings.

    Args:
        samplers: The samplers by name.
        seconds: How long the rounds go on, all samplers together.
        least: The least number of rounds.
        most: The largest number of rounds.

    Every other round runs in reverse order, so that no sampler always follows the same one.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    order, begin = list(samplers), time.perf_counter()
    while samplers and len(samples[order[0]]) < most:
        if len(samples[order[0]]) >= least and time.perf_counter() - begin > seconds:
            break
        for name in order:
            samples[name].append(samplers[name]())
        order.reverse()
    return {name: percentiles(values) for name, values in samples.items()}


def measuring_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Return the context for timed calls and their preparation: a side stream of a GPU, where capture is allowed."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def wall_sampler(calls: Sequence[Call]) -> Sampler:
    """Return a sampler of bursts by the host's clock; the calls must have finished their work when they return."""
    repeats = burst_length(calls, time_of=wall_time) // len(calls)

    def sample() -> float:
        return wall_time(list(calls) * repeats) / (repeats * len(calls))

    return sample


def wall_time(calls: Sequence[Call]) -> float:
    """Return the milliseconds of the calls together."""
    begin = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - begin)


def event_time(calls: Sequence[Call]) -> float:
    """Return the milliseconds of the calls together, between two events of the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def event_sampler(calls: Sequence[Call]) -> Sampler:
    """Return a sampler of bursts of launched calls, by events."""
    length = burst_length(calls, time_of=event_time)
    burst = [calls[i % len(calls)] for i in range(length)]
    return lambda: event_time(burst) / length


def graph_sampler(calls: Sequence[Call]) -> Sampler:
    """Return a sampler of replays of a CUDA graph of a burst; make and use it within `measuring_stream`."""
    length = burst_length(calls, time_of=event_time)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for i in range(length):
            calls[i % len(calls)]()
    graph.replay()
    # Without launches the burst may last a fraction of what it was sized for.
    repeats = math.ceil(BURST_MS / max(event_time([graph.replay]), 1e-3))
    burst = [graph.replay] * max(1, min(repeats, LONGEST_BURST))
    return lambda: event_time(burst) / len(burst) / length


def burst_length(calls: Sequence[Call], time_of: Callable[[Sequence[Call]], float]) -> int:
    """Return how many calls last BURST_MS, a multiple of the number of calls; runs each of them as a warm-up."""
    time_of(calls)
    once = time_of(calls)
    rounds = math.ceil(BURST_MS / max(once, 1e-3))
    return len(calls) * max(1, min(rounds, LONGEST_BURST // len(calls)))


def make_sampler(calls: Sequence[Call], device: torch.device, capturable: bool) -> tuple[Sampler, str]:
    """Return the most exact sampler that works for these calls, one per copy of the inputs, and its name."""
    if device.type == "cpu":
        return wall_sampler(calls), "wall"
    if not capturable:
        return event_sampler(calls), "events"
    try:
        return graph_sampler(calls), "graph"
    except RuntimeError as error:
        print(f"A call could not be captured and is timed with its launches: {str(error).splitlines()[0]}")
        return event_sampler(calls), "events"


def copies_past_cache(bytes_of_one: int, device: torch.device, most: int = 16) -> int:
    """Return how many copies of an input fill the GPU's L2 cache twice; one on a CPU, where inputs are timed warm."""
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return max(1, min(most, math.ceil(2 * cache / max(bytes_of_one, 1))))


def peak_memory(call: Call, device: torch.device) -> float | None:
    """Return the peak of the memory during a call less what was allocated before, in MiB; None on a CPU."""
    if device.type == "cpu":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


@contextmanager
def fp32_products(tf32: bool) -> Iterator[None]:
    """Compute fp32 convolutions and matrix products on a GPU in tf32, or in IEEE fp32."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = tf32
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
