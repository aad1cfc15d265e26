"""The display of a run: a live bar on a terminal, plain lines in a log, and a log file."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0
"""In a log, how long a task is silent."""


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
    """What a run shows: lines that stay, and on a terminal a bar and the last report below them.

    With a clock, every line ends with the time of day. All lines go into a log file too, with the date. On a terminal
    nothing of the bar stays when the display closes.

    Args:
        steps: The optimizer steps of the whole run.
        done: The optimizer steps already taken when the display opens.
        active: Whether this process shows anything; only one should.
        clock: Whether lines end with the time of day.
    """

    def __init__(self, steps: int = 0, done: int = 0, active: bool = True, clock: bool = False) -> None:
        self.active, self._clock = active, clock
        self.console = Console(quiet=not active, highlight=False, soft_wrap=True)
        self._begin = 0.0
        self._live: Live | None = None
        self._facts, self._told = Text(), 0.0
        self._bar = Progress(
            BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn(), expand=True
        )
        self._task = self._bar.add_task("")
        self._log: TextIO | None = None
        self._early: list[str] = []
        self.set_length(steps, done)

    def set_length(self, steps: int, done: int) -> None:
        """Set the length of a run that was not known when the display was made."""
        self._steps, self._begin_step = steps, done
        self._bar.update(self._task, total=steps, completed=done)

    def log_to(self, path: Path) -> None:
        """Write all lines to the end of a file too, those that were shown before included."""
        if self.active and self._log is None:
            self._log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
            for line in self._early:
                self._note(line)
            self._early = []

    def __enter__(self) -> "Display":
        self._begin = time.perf_counter()
        if self.active and self.console.is_terminal:
            self._start("starting", self._bar)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._log:
            self._log.close()
            self._log = None

    def say(self, text: str) -> None:
        """Print a line that stays."""
        text = one_line(text, self.console.encoding)
        line = f"{text}  {datetime.now():%H:%M:%S}" if self._clock else text
        # A terminal breaks lines between words; a log has every line whole.
        self.console.print(line, markup=False, soft_wrap=not self.console.is_terminal)
        self._note(f"{text}  {datetime.now():%Y-%m-%d %H:%M:%S}")

    def show(self, step: int, text: str) -> None:
        """Show where the run stands: above the bar, or in a line with the time that is left.

        Args:
            step: The optimizer steps taken.
            text: What to say about them; two spaces stand between its parts.
        """
        left = (time.perf_counter() - self._begin) / max(step - self._begin_step, 1) * (self._steps - step)
        line = f"step {step}/{self._steps}  {text}  {_clock(left)} left"
        if self._live:
            self._facts.plain = folded(text, self.console.width)
            self._bar.update(self._task, completed=step)
            self._note(f"{line}  {datetime.now():%Y-%m-%d %H:%M:%S}")
        else:
            self.say(line)

    @contextmanager
    def phase(self, title: str) -> Iterator[None]:
        """Show on a terminal what is being done inside the block."""
        if not (self.active and self.console.is_terminal):
            yield
            return
        before, nested = self._facts.plain, self._live is not None
        if nested:
            self._facts.plain = title
        else:
            self._start(title)
        try:
            yield
        finally:
            if nested:
                self._facts.plain = before
            else:
                self._stop()

    def tell(self, task: str, done: int, total: int) -> None:
        """Show how far a long task is; in a log only now and then.

        Args:
            task: What is done, such as "checking images".
            done: How much of it is done.
            total: How much there is to do.
        """
        text = f"{task}  {done}/{total}"
        if self._live:
            self._facts.plain = text
        elif self.active and time.perf_counter() - self._told > SECONDS_BETWEEN_LINES:
            if self._told:
                self.say(text)
            self._told = time.perf_counter()

    def counted(self, task: str, batches: Iterable[Item], total: int) -> Iterator[Item]:
        """Yield batches, and tell how many of them are done.

        Args:
            task: What is done with them.
            batches: The batches.
            total: Their number.
        """
        self._told, before = 0.0, self._facts.plain
        for done, batch in enumerate(batches):
            self.tell(task, done, total)
            yield batch
        self._facts.plain = before

    def _start(self, title: str, *below: Progress) -> None:
        self._facts.plain = title
        self._live = Live(Group(self._facts, *below), console=self.console, transient=True)
        self._live.start()

    def _stop(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None

    def _note(self, line: str) -> None:
        """Write a line to the log file, or keep it until there is one."""
        if self._log is None:
            self._early.append(line)
            return
        try:
            self._log.write(line + "\n")
        except OSError:  # a full disk ends the run at the next checkpoint, with the state that it had then
            self._log = None


def folded(text: str, width: int) -> str:
    """Return a text whose parts, with two spaces between them, are on as many lines as the width needs."""
    lines: list[str] = []
    for part in text.split("  "):
        if lines and len(lines[-1]) + 2 + len(part) <= width:
            lines[-1] += f"  {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


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


def peak_memory(device: torch.device) -> float:
    """Return the most memory that this process has held, in GB: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
