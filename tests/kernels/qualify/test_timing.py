"""Timers on sleeps of known length."""

import time
from types import SimpleNamespace

import pytest
import torch

from sdnet.bench import step_clock
from sdnet.bench.roofline import Ceilings
from sdnet.bench.step_clock import StepClock
from sdnet.kernels.qualify.timing import burst_length, interleave, make_sampler, percentiles, wall_time

CPU = torch.device("cpu")


def test_percentiles_interpolate() -> None:
    assert percentiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0, 6))
    assert percentiles([3.0]) == (3.0, 3.0, 3.0, 1)


@pytest.mark.parametrize("value", [0.1, 0.3, 1.1, 123.456])
def test_percentiles_of_equal_samples_are_in_order(value: float) -> None:
    p20, p50, p80, _ = percentiles([value] * 7)
    assert p20 <= p50 <= p80 == pytest.approx(value)


def test_ratio_of_known_sleeps() -> None:
    samplers = {
        name: make_sampler([lambda seconds=seconds: time.sleep(seconds)], CPU, capturable=True)[0]
        for name, seconds in {"short": 0.1, "long": 0.3}.items()
    }
    timings = interleave(samplers, seconds=0.0, least=3)
    assert timings["short"].p20 >= 100
    assert timings["long"].p20 / timings["short"].p20 == pytest.approx(3, rel=0.2)


def test_turns_alternate_and_end() -> None:
    order: list[str] = []

    def sampler(name: str):
        return lambda: float(len(order.append(name) or order))

    timings = interleave({"a": sampler("a"), "b": sampler("b")}, seconds=60.0, least=1, most=4)
    assert "".join(order) == "abbaabba"
    assert timings["a"].samples == timings["b"].samples == 4


def test_burst_goes_through_all_inputs_and_is_long_enough() -> None:
    seen: list[int] = []
    calls = [lambda i=i: seen.append(i) for i in range(3)]
    length = burst_length(calls, wall_time)
    assert length % 3 == 0
    assert length > 30
    assert set(seen) == {0, 1, 2}


def test_clock_splits_a_step_into_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.02, 1.07, 1.09, 2.0])
    monkeypatch.setattr(step_clock, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    clock = StepClock(CPU)
    clock.lap()
    for phase in ("data", "forward", "data"):
        clock.mark(phase)
    assert clock.split() == pytest.approx({"data": 40, "forward": 50})
    clock.lap()
    assert clock.split() == {}


def test_marks_on_a_gpu_are_events_of_its_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events of the first GPU say nothing about the second one."""
    streams: list[torch.device] = []
    event = SimpleNamespace(record=streams.append)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    StepClock(torch.device("cuda:1")).mark("forward")
    assert streams == [torch.device("cuda:1")]


def test_roofline_is_the_higher_of_both_times() -> None:
    ceilings = Ceilings(copy_gb_s=100, gemm_tflop_s=1)
    assert ceilings.shortest_ms(flops=2e9, bytes_moved=1e6) == pytest.approx(2)
    assert ceilings.shortest_ms(flops=2e6, bytes_moved=1e9) == pytest.approx(10)
