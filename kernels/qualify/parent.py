"""The parent's side of a qualification: it starts child processes, waits for them, and keeps their verdicts.

Each verdict is written as soon as it is known, so that a qualification that was ended goes on where it was. A child
that ends early, is silent for too long, or breaks the GPU's context leaves the verdict "torch" for its key, with the
reason, and a new child does the keys that are left. This process makes no CUDA context.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sdnet.kernels.qualify.child import Job
from sdnet.kernels.qualify.key import Call, Flags, Machine, Update
from sdnet.kernels.qualify.verdicts import TORCH, Store, Table, Verdict

COMMAND = (sys.executable, "-P", "-m", "sdnet.kernels.qualify.child")

BUDGET = 600.0
"""Seconds of a whole qualification, unless another number is given."""

START = 120.0
"""Seconds that a child may take to import torch and to describe its machine."""

SILENCE = 120.0
"""Seconds that a candidate may take: compiling its kernels takes tens of seconds at most."""

LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "OMPI_", "PMI_", "PMIX_", "MV2_", "SLURM_", "NCCL_", "SDNET_")
"""The beginnings of environment variables that make a process one of several, or decide for it."""

RANKS = frozenset(
    {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME",
     "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED"}
)  # fmt: skip
"""Further environment variables of that kind."""

Say = Callable[[str], None]


class Outcome(NamedTuple):
    """The result of a qualification.

    Attributes:
        machine: the facts of the machine; None if no child could describe it.
        table: the verdicts of the items, by key.
        notes: sentences about what could not be done.
    """

    machine: Machine | None
    table: Table
    notes: tuple[str, ...] = ()


class ChildError(Exception):
    """A child process ended, or was silent for too long; the message is a clause."""


class Child:
    """A child process and its lines of JSON."""

    def __init__(self, command: Sequence[str], job: Job) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment()
        )
        self.buffer = b""
        self.send(job.encoded())

    def send(self, value: Any) -> None:
        """Send a line; a child that has ended is noticed when its answer is read."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(value).encode() + b"\n")
            self.process.stdin.flush()

    def read(self, seconds: float) -> dict[str, Any]:
        """Return the next event.

        Raises:
            ChildError: it ended, or sent nothing in so many seconds.
        """
        assert self.process.stdout is not None
        pipe, end = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise ChildError(f"took more than {seconds:.0f} seconds")
            data = os.read(pipe, 65536)
            if not data:
                raise ChildError(f"ended its process {self.status()}")
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def status(self) -> str:
        """Return how the process ended, with the last line of its errors."""
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        if code < 0:
            return f"by signal {-code} ({signal.Signals(-code).name})"
        return f"with status {code}" + (f" ({lines[-1].strip()[:300]})" if lines else "")

    def close(self) -> None:
        """End the process, at once."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def environment() -> dict[str, str]:
    """Return the environment of a child: this one's, without what makes it one of several processes."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) and name not in RANKS
    }  # fmt: skip
    root = str(Path(__file__).parents[3])  # the folder of the package that this process uses
    if Path(root, "sdnet", "__init__.py").is_file():
        kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return kept


def qualify(
    items: Sequence[Call | Update],
    device: str = "cuda",
    *,
    flags: Flags | None = None,
    store: Store | None = None,
    fresh: bool = False,
    budget: float = BUDGET,
    silence: float = SILENCE,
    memory_gib: float | None = None,
    all_tiles: bool = True,
    seconds: float = 0.3,
    say: Say = print,
    command: Sequence[str] = COMMAND,
) -> Outcome:
    """Find out the verdicts of calls and updates, as far as the table of this machine lacks them.

    Args:
        items: the calls and updates.
        device: the name of the device.
        flags: the flags of PyTorch; None for those of this process.
        store: where verdicts are read from and added to; None for the user's cache folder.
        fresh: whether items that have a verdict are qualified again.
        budget: the seconds after which it ends. Items that are left keep the verdict that they have, or get the verdict
            "torch", which is not stored.
        silence: the most seconds of one candidate.
        memory_gib: the most GPU memory that the child uses, in GiB; None for all that is free.
        all_tiles: whether other tiles than the rules' are candidates.
        seconds: of timing two candidates of a call.
        say: takes a line of progress.
        command: starts the child.
    """
    flags, store = flags or Flags.now(), store or Store()
    unique: dict[str, Call | Update] = {}
    for item in items:
        unique.setdefault(item.key(flags), item)
    names, end = list(unique), time.monotonic() + budget
    patience = min(silence, budget)
    job = Job(device, flags, tuple(unique.values()), all_tiles, seconds, patience, memory_gib)
    run = Qualification(job, names, store, fresh, end, say, command)
    try:
        run.until_done(silence)
    finally:
        run.close()
    if run.machine is None:
        spent = f"The budget of {budget:g} seconds was spent before the machine was known."
        return Outcome(None, {}, tuple(run.notes) or (spent,))
    known = store.load(run.machine) | run.found
    table = {name: known[name] for name in names if name in known}
    left = [name for name in names if name not in table or (fresh and name not in run.found)]
    reason = f"PyTorch computes it, because the budget of {budget:.0f} seconds was spent before its turn"
    earlier = sum(name in table for name in left)
    for name in left:
        item = unique[name]
        table.setdefault(name, Verdict(TORCH, reason, item.batch if isinstance(item, Call) else 0))
    if left:
        kept = f"; {earlier} of these {'is' if earlier == 1 else 'are'} kept as before" if earlier else ""
        run.notes.append(
            f"The budget of {budget:.0f} seconds was spent before {len(left)} of {len(names)} verdicts{kept}."
        )
    return Outcome(run.machine, table, tuple(run.notes))


def known(items: Sequence[Call | Update], machine: Machine, flags: Flags, store: Store) -> Outcome:
    """Return the verdicts of calls and updates that are there already."""
    table = store.load(machine)
    names = [item.key(flags) for item in items]
    return Outcome(machine, {name: table[name] for name in names if name in table})


class Qualification:
    """The run of a qualification over as many child processes as it takes."""

    def __init__(
        self, job: Job, names: list[str], store: Store, fresh: bool, end: float, say: Say, command: Sequence[str]
    ) -> None:
        self.job, self.names, self.store, self.fresh, self.end = job, names, store, fresh, end
        self.say, self.command = say, command
        self.machine: Machine | None = None
        self.found: Table = {}
        self.notes: list[str] = []
        self.child: Child | None = None

    def until_done(self, silence: float) -> None:
        """Start children until no item is left, the budget is spent, or a child cannot start."""
        while self.machine is None or self.left():
            if time.monotonic() >= self.end:
                return
            self.child = Child(self.command, self.job)
            try:
                if not self.started() or self.finished(silence):
                    return
            finally:
                self.close()

    def close(self) -> None:
        """End the child."""
        if self.child is not None:
            self.child.close()
            self.child = None

    def left(self) -> list[int]:
        """Return the numbers of the items without a verdict."""
        assert self.machine is not None
        known = self.found if self.fresh else self.store.load(self.machine) | self.found
        return [number for number, name in enumerate(self.names) if name not in known]

    def remaining(self, limit: float) -> float:
        """Return the seconds until `limit` or the end of the budget."""
        return max(0.0, min(limit, self.end - time.monotonic()))

    def started(self) -> bool:
        """Return whether the child has described the machine, and tell it what to do."""
        assert self.child is not None
        limit = self.remaining(START)
        answer: dict[str, Any]
        try:
            answer = self.child.read(limit)
        except ChildError as error:
            if limit < START and time.monotonic() >= self.end:
                return False  # the budget, and no fault of the child
            answer = {"event": "failed", "reason": f"the child {error}"}
        if answer["event"] != "machine":
            self.notes.append(f"The kernels could not be qualified: {answer.get('reason', 'no answer')}.")
            return False
        if self.machine is not None and answer["facts"] != self.machine:
            self.notes.append("The kernels could not be qualified: the machine changed meanwhile.")
            return False
        self.machine = machine = answer["facts"]
        left = self.left()
        if not left:
            return False
        self.say(f"Qualifying {len(left)} of {len(self.names)} on {machine['gpu']} ...")
        self.child.send(left)
        return True

    def finished(self, silence: float) -> bool:
        """Take the events of the child; return whether it has done all, or the budget is spent."""
        assert self.child is not None
        assert self.machine is not None
        todo, candidate = self.left(), "the start"
        while todo:
            number = todo[0]
            limit = self.remaining(silence)
            event: dict[str, Any]
            try:
                event = self.child.read(limit)
            except ChildError as error:
                if limit < silence and time.monotonic() >= self.end:
                    return True  # the budget, and no fault of the item
                event = {"event": "lost", "reason": f"{candidate} {error}"}
            kind = event["event"]
            if kind == "started":
                candidate = event["candidate"]
            elif kind == "verdict":
                self.keep(event["item"], Verdict.decoded(event["verdict"]))
                todo, candidate = todo[1:], "the start"
            else:
                reason = event.get("reason", "the child ended early")
                if kind == "broken":
                    reason = f"{candidate} broke the GPU's context ({reason})"
                item = self.job.items[number]
                batch = item.batch if isinstance(item, Call) else 0
                self.keep(number, Verdict(TORCH, f"PyTorch computes it, because {reason}", batch))
                return False
        return True

    def keep(self, number: int, verdict: Verdict) -> None:
        """Store a verdict and show it."""
        assert self.machine is not None
        self.found[self.names[number]] = verdict
        self.store.add(self.machine, {self.names[number]: verdict})
        item = self.job.items[number]
        what = item.layer if isinstance(item, Call) else f"the update of {len(item.layers)} dictionaries"
        done = len(self.names) - len(self.left())
        figures = "".join(f"\n    {trial}" for trial in verdict.trials)
        self.say(f"[{done}/{len(self.names)}] {what}: {verdict.reason}{figures}")
