"""The ledger: one line of JSON per measurement, complete by itself, checked when it is written and when it is read.

A file is named theme_hardware_date.jsonl. A line is appended by one write under a lock, so that commands that measure
at the same time, or are killed, leave complete lines.
"""

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from sdnet.train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""The root of the checkout. The wheel does not ship `sdnet.bench`, so there always is one."""

RESULTS = ROOT / "bench" / "results"
"""The ledger that is committed."""

SCHEMA = 1
Theme = Literal["kernels", "train", "load", "profile", "margins", "gpu", "counts", "inference"]
Status = Literal["ok", "refused", "unsupported", "skipped"]
ENVIRONMENT = ("device", "device_type", "driver", "threads", "packages", "commit", "dirty", "command", "date")


@dataclass(frozen=True)
class Row:
    """One measurement, or the reason why there is none.

    Attributes:
        theme: The command that measured.
        provider: What was measured: an implementation, a model, a loader.
        mode: What it did: "forward", "backward", "both", "step", "load".
        shape: The sizes that the theme has: batch, channels, image size, steps.
        dtype: The type of the numbers; "" where there are none.
        layout: The memory format; "" where there is none.
        time_ms: p20, p50 and p80 of one call, and the number of samples; None unless the status is "ok".
        memory_mib: The peak of the GPU's memory during the call, less what was allocated before; None on a CPU.
        metrics: Derived numbers by name; the name holds the unit.
        settings: What else distinguishes the row (compile, timer, threads).
        status: "ok"; "refused" for a wrong answer or a crash; "unsupported" or "skipped".
        reason: Why the status is not "ok".
        run: The name of the run; names sort by date.
        environment: The facts of `sdnet.train.environment`, the command and its label.
        schema: The version of this list of fields.
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
        """Raise a ValueError that names the first field which breaks the schema."""
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
        """Return the row as one line of JSON, with its line end."""
        return json.dumps(asdict(self), allow_nan=False) + "\n"

    @classmethod
    def from_line(cls, line: str | bytes) -> "Row":
        """Return the row that `to_line` wrote; raise a ValueError if it breaks the schema."""
        values = json.loads(line)
        if wrong := sorted({item.name for item in fields(cls)} ^ set(values)):
            raise ValueError(f"fields that are missing or unknown: {', '.join(wrong)}.")
        row = cls(**values)
        row.check()
        return row


class Ledger:
    """Appends the rows of one run, each with the run's name and environment.

    Args:
        folder: Where the file lies, or will lie.
        theme: The command that measures.
        environment: The facts of the run, `ENVIRONMENT` among them.

    Attributes:
        path: The file.
        rows: The rows of this run.
    """

    def __init__(self, folder: Path, theme: Theme, environment: Mapping[str, Any]) -> None:
        date = str(environment["date"])
        hardware = re.sub(r"[^a-z0-9]+", "-", str(environment["device"]).lower()).strip("-")
        self.path = folder / f"{theme}_{hardware}_{date[:10]}.jsonl"
        self.theme: Theme = theme
        self.environment = environment
        self.run = f"{date}-{uuid4().hex[:6]}"
        self.rows: list[Row] = []

    def prepare(self) -> None:
        """Make the folder, and raise a UserError if it cannot be written to."""
        writable_folder(self.path.parent)

    def add(self, provider: str, mode: str, shape: Mapping[str, Any], **values: Any) -> Row:
        """Check a row, append it to the file, and return it.

        Raises:
            UserError: The file cannot be written to.
        """
        row = Row(self.theme, provider, mode, shape, run=self.run, environment=self.environment, **values)
        row.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, row.to_line())
        self.rows.append(row)
        return row


def writable_folder(folder: Path) -> None:
    """Make a folder, and raise a UserError if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be written to: {error.strerror}.") from error


def append(path: Path, line: str) -> None:
    """Append a line to a file under a lock, the whole line or nothing.

    Raises:
        UserError: The file cannot be written to, or the disk is full.
    """
    data = line.encode()
    try:
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            end = os.fstat(handle).st_size
            if os.write(handle, data) < len(data):
                os.ftruncate(handle, end)
                raise UserError(f"{path} could not take another row: the disk is full.")
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(f"{path} could not take another row: {error.strerror}.") from error


def read(folder: Path) -> Iterator[tuple[Path, Row]]:
    """Yield all rows of a ledger, each with its file.

    Raises:
        UserError: There is no such folder, or a line is not JSON or breaks the schema.
    """
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                yield path, Row.from_line(line)
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}, line {number}, is not a row of the ledger: {error}") from error


def print_outcome(ledger: Ledger) -> int:
    """Print why rows have no time, and where the rows are; return 1 if one was refused, else 0."""
    left_out = [row for row in ledger.rows if row.status != "ok"]
    for provider, status, reason in dict.fromkeys((row.provider, row.status, row.reason) for row in left_out):
        print(f"{provider} {status}: {reason}")
    print(f"{len(ledger.rows)} rows in {ledger.path}")
    return 1 if any(row.status == "refused" for row in left_out) else 0
