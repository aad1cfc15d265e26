"""The display of a run: a live bar on a terminal, plain lines in a log."""

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
    """The wall time since the start, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.waited = 0.0

    @property
    def elapsed(self) -> float:
        """The seconds since the start."""
        return time.perf_counter() - self.start

    @property
    def wait_share(self) -> float:
        """The share of the time that went into waiting, 0 to 1."""
        return self.waited / max(self.elapsed, 1e-9)

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and count the time until each one arrives as waiting."""
        iterator = iter(items)
        while True:
            before = time.perf_counter()
            item = next(iterator, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            yield item


class Display:
    """The progress of a run, shown while the display is open as a context manager.

    Args:
        steps: The optimiser steps of the whole run.
        done: The optimiser steps already taken when the display opens.
        active: Whether this process shows anything; only one should.
    """

    def __init__(self, steps: int, done: int, active: bool) -> None:
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self.steps = steps
        self._begin, self._done = 0.0, done
        self._live: Live | None = None
        if active and self.console.is_terminal:
            self._text = Text("starting")
            self._bar = Progress(BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn())
            self._task = self._bar.add_task("", total=steps, completed=done)
            self._live = Live(Group(self._text, self._bar), console=self.console)

    def __enter__(self) -> "Display":
        self._begin = time.perf_counter()
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(one_line(text, self.console.encoding), markup=False)

    def show(self, step: int, text: str) -> None:
        """Show where the run stands: above the bar, or in a line with the time that is left.

        Args:
            step: The optimiser steps taken.
            text: What to say about them.
        """
        if self._live:
            self._text.plain = text
            self._bar.update(self._task, completed=step)
            return
        left = (time.perf_counter() - self._begin) / max(step - self._done, 1) * (self.steps - step)
        self.say(f"step {step}/{self.steps}  {text}  {_clock(left)} left")


def one_line(text: str, encoding: str) -> str:
    """Return a text that can be printed on one line in an encoding.

    File names may hold line breaks, escape sequences of a terminal, and bytes that are not UTF-8 (which Python keeps
    as lone surrogates). Such characters are replaced by backslash escapes.

    Args:
        text: The text.
        encoding: The encoding of the output.
    """
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return escaped.encode(encoding, "backslashreplace").decode(encoding)


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process has held, in GB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
