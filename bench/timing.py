"""How time is measured: samplers that give the milliseconds of one call, taken in turns.

A sampler times a burst of calls and divides. On a CPU it reads `perf_counter` around the burst. On a GPU it replays
a captured CUDA graph between two events, so that launches cost nothing, or, for calls that read the device from the
host and cannot be captured, records the events around the calls themselves. A burst goes through several copies of the
inputs, together larger than the last-level cache of a GPU, so that no call finds its input there.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
Sampler = Callable[[], float]
"""Takes one sample: milliseconds of one call."""

BURST_MS = 2.0
"""The least length of a burst."""

LONGEST_BURST = 200


class Timing(NamedTuple):
    """Percentiles of a call's milliseconds over `samples` samples."""

    p20: float
    p50: float
    p80: float
    samples: int


def percentiles(samples: Sequence[float]) -> Timing:
    """p20, p50, p80 with linear interpolation."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])

    return Timing(at(0.2), at(0.5), at(0.8), len(ordered))


def interleave(samplers: Mapping[str, Sampler], seconds: float, least: int = 3, most: int = 1000) -> dict[str, Timing]:
    """Samples of every sampler in turns, so that all meet the same weather.

    Rounds go on for `seconds` of all samplers together, but at least `least` and at most `most` rounds. Every other
    round runs backwards: nobody always follows the same neighbour.
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
    """Where everything to be timed must be prepared and run: a GPU's side stream, because it may be captured."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def wall_sampler(calls: Sequence[Call]) -> Sampler:
    """Times bursts by the host's clock; the calls must have finished their work when they return."""
    repeats = burst_length(calls, time_of=wall_time) // len(calls)

    def sample() -> float:
        return wall_time(list(calls) * repeats) / (repeats * len(calls))

    return sample


def wall_time(calls: Sequence[Call]) -> float:
    """Milliseconds of the calls together."""
    begin = time.perf_counter()
    for call in calls:
        call()
    return 1e3 * (time.perf_counter() - begin)


def event_time(calls: Sequence[Call]) -> float:
    """Milliseconds of the calls together between two events of the current stream; waits for them."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def event_sampler(calls: Sequence[Call]) -> Sampler:
    """Times bursts of launched calls by events."""
    length = burst_length(calls, time_of=event_time)
    burst = [calls[i % len(calls)] for i in range(length)]
    return lambda: event_time(burst) / length


def graph_sampler(calls: Sequence[Call]) -> Sampler:
    """Times replays of a CUDA graph of a burst; to be made and used within `measuring_stream`."""
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
    """How many calls last BURST_MS, a multiple of the number of inputs; warms up."""
    time_of(calls)
    once = time_of(calls)
    rounds = math.ceil(BURST_MS / max(once, 1e-3))
    return len(calls) * max(1, min(rounds, LONGEST_BURST // len(calls)))


def make_sampler(calls: Sequence[Call], device: torch.device, capturable: bool) -> tuple[Sampler, str]:
    """The sharpest sampler for these calls, one per copy of the inputs, and its name for the ledger."""
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
    """How many copies of an input are twice as large as the GPU's L2; one on a CPU, where inputs come warm."""
    if device.type == "cpu":
        return 1
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return max(1, min(most, math.ceil(2 * cache / max(bytes_of_one, 1))))


def peak_memory(call: Call, device: torch.device) -> float | None:
    """MiB that a call holds at its peak beyond what was held before; None on a CPU."""
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
    """fp32 convolutions and matrix products on a GPU in tf32, or as IEEE has them."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = tf32
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value
