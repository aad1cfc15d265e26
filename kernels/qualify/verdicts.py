"""Verdicts, and the tables that keep them: one file per machine, in the user's cache folder or in the package."""

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sdnet.kernels.qualify.key import Machine, digest
from sdnet.kernels.triton_path.paths import Entry

CACHE_VARIABLE = "SDNET_CACHE"

SHIPPED = Path(__file__).with_name("tables")
"""Tables that come with the package. They were measured elsewhere, on a machine of the same facts."""

TORCH = "torch"
"""The path of a verdict that takes the torch path, or PyTorch's update of the dictionaries."""

PLAIN = "plain"
"""The path without a verdict: cuDNN's convolutions, also for the dictionary's gradient, and pointwise kernels."""

UPDATE = "triton"
"""The path of a verdict that takes the Triton update of the dictionaries."""

GAIN = 0.05
"""A fused candidate is taken where its time is at most 1 - GAIN of the best other candidate's."""


@dataclass(frozen=True)
class Trial:
    """What was found out about a candidate.

    Attributes:
        name: the name of the candidate.
        path: "torch", "plain", "triton", or an encoded `triton_path.paths.Entry`.
        fault: why it is refused; "" if its results are right.
        errors: relative errors of its results, by name.
        launched_ms: milliseconds of a forward and a backward pass with their launches; None if it was not timed.
        replayed_ms: the same as a replayed CUDA graph; None if it was not, or could not be, captured.
    """

    name: str
    path: str
    fault: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    launched_ms: float | None = None
    replayed_ms: float | None = None

    def __str__(self) -> str:
        if self.fault:
            return f"{self.name} refused: {self.fault}"
        if self.launched_ms is None:
            return f"{self.name} not timed"
        replayed = "" if self.replayed_ms is None else f" ({self.replayed_ms:.3f} ms replayed)"
        return f"{self.name} {self.launched_ms:.3f} ms{replayed}"


@dataclass(frozen=True)
class Verdict:
    """What a qualification decided for one key.

    Attributes:
        path: what is taken, as in `Trial`.
        reason: why, a clause.
        batch: the number of images that it was measured with; 0 for an update of dictionaries.
        date: when, in ISO format, UTC.
        trials: what was found out about each candidate.
    """

    path: str
    reason: str
    batch: int = 0
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    trials: tuple[Trial, ...] = ()

    @property
    def age(self) -> str:
        """How long ago the verdict was made, in words."""
        minutes = (datetime.now(UTC) - datetime.fromisoformat(self.date)).total_seconds() / 60
        for length, unit in ((1440, "day"), (60, "hour"), (1, "minute")):
            if minutes >= length:
                count = int(minutes // length)
                return f"{count} {unit}{'s' * (count > 1)} ago"
        return "just now"

    def __str__(self) -> str:
        if not self.trials:
            return f"{self.reason}, noted {self.age}"
        return f"{self.reason}, measured {self.age} [{'; '.join(map(str, self.trials))}]"

    def encoded(self) -> dict[str, Any]:
        """Return the verdict as a dictionary that `json` can write."""
        return asdict(self)

    @staticmethod
    def decoded(values: Any) -> "Verdict":
        """Return the verdict that `encoded` described.

        Raises:
            ValueError: `values` describes no verdict.
        """
        try:
            trials = [Trial(**trial) for trial in values["trials"]]
            verdict = Verdict(**(values | {"trials": tuple(trials)}))
            datetime.fromisoformat(verdict.date)
            sound = datetime.fromisoformat(verdict.date).tzinfo is not None and isinstance(verdict.batch, int)
            sound &= all(isinstance(text, str) for text in (verdict.path, verdict.reason))
            for trial in trials:
                times = (trial.launched_ms, trial.replayed_ms, *trial.errors.values())
                sound &= all(time is None or isinstance(time, (int, float)) for time in times)
                sound &= all(isinstance(text, str) for text in (trial.name, trial.path, trial.fault))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"no verdict: {error}") from error
        if not sound or not is_path(verdict.path):
            raise ValueError("no verdict: a field has a wrong type or value")
        return verdict


def is_path(path: str) -> bool:
    """Return whether a string names a path: "torch", "plain", "triton", or an encoded entry."""
    if path in (TORCH, PLAIN, UPDATE):
        return True
    try:
        Entry.decoded(path)
    except ValueError:
        return False
    return True


Table = dict[str, Verdict]
"""Verdicts of one machine by key."""


def encoded_table(table: Mapping[str, Verdict]) -> dict[str, Any]:
    """Return a table as a dictionary that `json` can write."""
    return {key: table[key].encoded() for key in sorted(table)}


def decoded_table(values: Any) -> Table:
    """Return the table that `encoded_table` described.

    Raises:
        ValueError: `values` describes no table.
    """
    if not isinstance(values, dict):
        raise ValueError("no table of verdicts")
    return {str(key): Verdict.decoded(value) for key, value in values.items()}


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder of the tables; None if there is no home folder for it.

    It is `given`, else the one that the environment variable SDNET_CACHE names, else `sdnet` in XDG_CACHE_HOME or
    `~/.cache`.
    """
    named = os.fspath(given) if given is not None else os.environ.get(CACHE_VARIABLE, "")
    if named:
        return Path(os.path.expanduser(named))
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # the specification ignores other values
        base = os.path.expanduser("~/.cache")
    return Path(base, "sdnet") if os.path.isabs(base) else None


class Store:
    """The tables of a folder. What cannot be written is kept in memory, and said once.

    Args:
        folder: the folder; see `cache_folder`.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = cache_folder(folder)
        self.memory: dict[str, Table] = {}
        self.complaint = ""

    def file_of(self, machine: Machine) -> Path | None:
        """Return the file of a machine's table."""
        return self.folder / "verdicts" / f"{digest(machine)}.json" if self.folder else None

    def load(self, machine: Machine) -> Table:
        """Return the verdicts of a machine: those shipped with the package, then those of the folder."""
        name, file = digest(machine), self.file_of(machine)
        shipped = read(SHIPPED / f"{name}.json", machine)
        return shipped | (read(file, machine) if file else {}) | self.memory.get(name, {})

    def add(self, machine: Machine, verdicts: Mapping[str, Verdict]) -> None:
        """Add verdicts to a machine's table on disk, beside those that other processes have added meanwhile."""
        kept = self.memory.setdefault(digest(machine), {})
        kept.update(verdicts)
        file = self.file_of(machine)
        try:
            if file is None:
                raise OSError("there is no home folder")
            file.parent.mkdir(parents=True, exist_ok=True)
            with locked(file.with_suffix(".lock")):
                table = encoded_table(read(file, machine) | kept)
                write(file, json.dumps({"machine": machine, "verdicts": table}, indent=1) + "\n")
        except OSError as error:
            if not self.complaint:
                place = self.folder or "The cache folder"
                self.complaint = (
                    f"{place} cannot be written ({error.strerror or error}), so the verdicts are kept in memory and "
                    f"found out again in the next process; the environment variable {CACHE_VARIABLE} names another "
                    "folder."
                )
                warnings.warn(self.complaint, stacklevel=2)
        else:
            self.memory.pop(digest(machine))


def read(file: Path, machine: Machine) -> Table:
    """Return the verdicts of a file; none if it is absent, damaged or of another machine."""
    try:
        content = json.loads(file.read_text())
        return decoded_table(content["verdicts"]) if content["machine"] == machine else {}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"The verdicts in {file} cannot be read and are ignored: {reason}.", stacklevel=2)
        return {}


def write(file: Path, text: str) -> None:
    """Write a file whole or not at all, whatever other processes write at the same time."""
    descriptor, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as unfinished:
            unfinished.write(text)
            unfinished.flush()
            os.fsync(unfinished.fileno())
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock between processes; without one where the system or the file system has none."""
    with file.open("a") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
