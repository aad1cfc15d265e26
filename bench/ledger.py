"""The ledger: one JSON line per measurement, each whole by itself, checked when written and when read.

A file is named theme_hardware_date.jsonl. A line is appended by one write under a lock, so that programs which measure
at the same time, or are stopped, leave whole lines.
"""

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from sdnet.train.errors import UserError

RESULTS = Path("bench/results")
"""The ledger's folder, from the root of a checkout."""

SCHEMA = 1
Theme = Literal["kernels", "train", "load", "profile"]
Status = Literal["ok", "refused", "unsupported", "skipped"]
ENVIRONMENT = ("device", "device_type", "driver", "threads", "packages", "commit", "dirty", "command", "date")


@dataclass(frozen=True)
class Row:
    """One measurement, or why there is none.

    Attributes:
        theme: the sub-command that measured.
        provider: what was measured: an implementation, a model, a loader.
        mode: what it did: "forward", "backward", "both", "step", "load".
        shape: sizes, whatever the theme has: batch, channels, image size, steps.
        dtype, layout: of the numbers; "" where there are none.
        time_ms: p20, p50 and p80 of one call, and the number of samples; None unless status is "ok".
        memory_mib: peak of the GPU's memory during the call beyond what was held before; None on a CPU.
        metrics: derived numbers by name, with the unit in the name.
        settings: what else distinguishes the row (compile, timer, threads ...).
        status, reason: "ok"; "refused" for wrong answers; "unsupported" and "skipped" with a sentence each.
    """

    theme: Theme
    provider: str
    mode: str
    shape: Mapping[str, Any]
    dtype: str = ""
    layout: str = ""
    time_ms: Mapping[str, float] | None = None
    memory_mib: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    status: Status = "ok"
    reason: str = ""
    run: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def check(self) -> None:
        """ValueError, with a sentence, unless the row can be trusted to hold what the schema promises."""
        for name, allowed in (("theme", get_args(Theme)), ("status", get_args(Status))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")
        if self.schema != SCHEMA:
            raise ValueError(f"schema is {self.schema}; this version reads {SCHEMA}.")
        if not (self.provider and self.mode and self.run):
            raise ValueError("provider, mode and run must not be empty.")
        if missing := [name for name in ENVIRONMENT if name not in self.environment]:
            raise ValueError(f"environment lacks {', '.join(missing)}.")
        if self.status != "ok":
            if self.time_ms is not None or not self.reason:
                raise ValueError(f"a row with status {self.status!r} has a reason and no time.")
            return
        times = self.time_ms or {}
        if not 0 < times.get("p20", 0) <= times.get("p50", 0) <= times.get("p80", 0) < float("inf"):
            raise ValueError(f"time_ms is {dict(times)}; p20, p50 and p80 must be positive and in order.")
        if not all(isinstance(value, int | float) for value in self.metrics.values()):
            raise ValueError("metrics must be numbers.")

    def to_line(self) -> str:
        """The row as one line of JSON with a line end."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Row":
        """The row that `to_line` wrote; ValueError if it breaks the schema."""
        values = json.loads(line)
        if wrong := sorted({item.name for item in fields(cls)} ^ set(values)):
            raise ValueError(f"fields that are missing or unknown: {', '.join(wrong)}.")
        row = cls(**values)
        row.check()
        return row


class Ledger:
    """Appends the rows of one run, each with the run's name and environment.

    `rows` holds them too. Runs are named by their date, so that names sort as they happened.
    """

    def __init__(self, folder: Path, theme: Theme, environment: Mapping[str, Any]) -> None:
        date = str(environment["date"])
        hardware = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
        self.path = folder / f"{theme}_{hardware}_{date[:10]}.jsonl"
        self.theme: Theme = theme
        self.environment = environment
        self.run = f"{date}-{uuid4().hex[:6]}"
        self.rows: list[Row] = []

    def add(self, provider: str, mode: str, shape: Mapping[str, Any], **values: Any) -> Row:
        """Check a row, append it to the file, and return it."""
        row = Row(self.theme, provider, mode, shape, run=self.run, environment=self.environment, **values)
        row.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, row.to_line())
        self.rows.append(row)
        return row


def append(path: Path, line: str) -> None:
    """Append to a file by one write under a lock."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def read(folder: Path) -> Iterator[tuple[Path, Row]]:
    """All rows of a ledger with the file that each stands in.

    Raises:
        UserError: a line is not JSON or breaks the schema; which, and why.
    """
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                yield path, Row.from_line(line)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}, is no row of the ledger: {error}") from error


def refused(rows: Iterable[Row]) -> list[Row]:
    """The rows whose answers were wrong."""
    return [row for row in rows if row.status == "refused"]
