"""The time of each phase of a training step, measured without waiting for the device in between."""

import time

import torch

PHASES = ("data", "refresh", "forward", "backward", "optimiser")


class StepClock:
    """Records the ends of phases; a phase lasts from the mark before it.

    On a GPU marks are events of its current stream. The time of a phase is then the time that the GPU took for it, and
    that of "data" is the time that the GPU waited for the batch.

    Args:
        device: The device that computes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def mark(self, phase: str) -> None:
        """Record the end of a phase."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def lap(self) -> None:
        """Remove all marks and start here."""
        self._marks.clear()
        self.mark("begin")

    def split(self) -> dict[str, float]:
        """Return the milliseconds of every phase since the last `lap`, after waiting for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        totals: dict[str, float] = {}
        for (_, begin), (phase, end) in zip(self._marks, self._marks[1:], strict=False):
            totals[phase] = totals.get(phase, 0.0) + milliseconds(begin, end)
        return totals


def milliseconds(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    """Return the milliseconds between two marks of one clock."""
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return begin.elapsed_time(end)
    assert isinstance(begin, float)
    assert isinstance(end, float)
    return 1e3 * (end - begin)
