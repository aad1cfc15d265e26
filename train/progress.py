"""What a person sees: a live bar on a terminal, plain lines in a log."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")


class Stopwatch:
    """Wall time since the start, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def wait_share(self) -> float:
        """The share of the time that went into waiting, 0 to 1."""
        return self.waited / max(self.elapsed, 1e-9)

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, with the time until each one counted as waiting."""
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            item = next(iterator, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            yield item


class Display:
    """Progress of the run; silent on all ranks but one.

    `steps` are the optimiser steps of the whole run, `done` those already taken when it opens.
    """

    def __init__(self, steps: int, done: int, active: bool) -> None:
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.steps = steps
        self._begin, self._done = time.perf_counter(), done
        self._live: Live | None = None
        if active and self.console.is_terminal:
            self._text = Text("starting")
            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._live = Live(Group(self._text, self._bar), console=self.console)

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def show(self, step: int, text: str) -> None:
        """Where the run stands: above the bar, or as a line with the time that is left."""
        if self._live:
            self._text.plain = text
            self._bar.update(self._task, completed=step)
            return
        left = (time.perf_counter() - self._begin) / max(step - self._done, 1) * (self.steps - step)
        self.say(f"step {step}/{self.steps}  {text}  {_clock(left)} left")


def peak_memory(device: torch.device) -> str:
    """The most memory that this process has held: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
