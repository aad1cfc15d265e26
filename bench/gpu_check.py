"""`gpu-check`: the tests that need a GPU, then kernels and train on it, within ten minutes; all results in one folder.

Each stage is a process of its own with a time limit, so that one that hangs or crashes leaves the others their turn.
What matters most comes first, of the stages and within them. What a stage has measured until its end stays, and
summary.json tells after every stage how it went. Needs torch, triton, accelerate, einops, rich, numpy, pytest, pillow
and matplotlib. With pytest-xdist the tests compile side by side, and leave what they compiled to the stages after them.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from sdnet.bench import environment
from sdnet.train.errors import UserError

SECONDS = 540
"""Of all stages together by default: of ten minutes, the rest is for starting, and for the report."""

REPORT = 15
"""Seconds kept for tables and plots."""

LEAST = 45
"""A stage that has less time than this is not begun: starting alone takes half of it."""

GRACE = 8
"""Seconds between the request to end and the end."""

WORKERS = 12
"""The most processes of tests. Each holds a CUDA context of half a gigabyte."""


class Stage(NamedTuple):
    """A process: its name, what it runs (after `python -m`), and the seconds after which it is ended.

    `spare` are those of the limit that it is not told of: what it has begun before its budget is spent may end in them.
    Zero stands for a program without a budget.
    """

    name: str
    command: list[str]
    limit: int
    spare: int = 0

    def within(self, seconds: float) -> list[str]:
        """The command for so many seconds."""
        return [*self.command, "--budget", f"{max(seconds - self.spare, 0):.0f}"] if self.spare else self.command


def stages(out: Path) -> list[Stage]:
    """What is run, the most important first. The last one has what time the others leave."""
    folder = ["--out", str(out)]
    kernels = ["sdnet.bench", "kernels", "--seconds", "0.3", *folder]
    eager = ["--operator", "csc", "--provider", "triton", "torch", "reference", "official"]
    train = ["sdnet.bench", "train", "--layout", "channels_last", *folder]
    large = ["--image-size", "224", "--dtype", "bf16", "--impl", "auto", "torch", "--seconds", "20"]
    tests = ["pytest", "-m", "gpu", "-v", *side_by_side(), f"--junitxml={out / 'tests.xml'}", *test_files()]
    return [
        Stage("tests", tests, 120),
        Stage("kernels", [*kernels, "--layout", "channels_last"], 175, spare=45),
        Stage("train", [*train, *large], 140, spare=50),
        Stage("kernels_contiguous", [*kernels, "--layout", "contiguous", *eager], 55, spare=25),
        Stage("train_more", [*train, "--image-size", "32", "--seconds", "12"], 120, spare=50),
    ]


def test_files() -> list[str]:
    """The test files with tests for a GPU; others may import what a GPU machine need not have."""
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise UserError("There are no tests marked gpu under tests/; run this from the root of a checkout.")
    return files


def side_by_side() -> list[str]:
    """pytest's options for several processes, if pytest-xdist is there."""
    if find_spec("xdist") is None:
        return []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ["--numprocesses", str(max(1, min(WORKERS, cores - 2))), "--dist", "worksteal"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a folder for the ledger, logs, tables and plots")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all stages together; default {SECONDS}")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these; default all")


def run(options: argparse.Namespace) -> int:
    """Run the stages; 1 if one did not pass."""
    end = time.perf_counter() + options.seconds - REPORT
    device = environment.choose_device(options.device)
    if device.type != "cuda":
        raise UserError("gpu-check needs a GPU, and torch sees none; `python -m sdnet.bench kernels` works on a CPU.")
    known = stages(options.out)
    if unknown := sorted(set(options.stage or ()) - {stage.name for stage in known}):
        names = ", ".join(stage.name for stage in known)
        raise UserError(f"--stage {' '.join(unknown)} is unknown; it must be one of {names}.")
    options.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    facts = environment.describe(device)
    for stage in known:
        if options.stage and stage.name not in options.stage:
            continue
        results[stage.name] = run_stage(stage, options.out, min(stage.limit, end - GRACE - time.perf_counter()))
        summary = {"environment": facts, "stages": results}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    report_on(options.out)
    for name, result in results.items():
        print(f"{name}: {result['outcome']} after {result['seconds']:.0f} s, log {result['log']}")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) else 1


def run_stage(stage: Stage, out: Path, limit: float) -> dict[str, Any]:
    """Outcome, seconds and log of a stage."""
    log = out / f"{stage.name}.log"
    if limit < min(LEAST, stage.limit):
        return {"outcome": "left out for want of time", "seconds": 0.0, "log": str(log)}
    print(f"{stage.name} (at most {limit:.0f} s) ...", flush=True)
    begin = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *stage.within(limit)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=surroundings(stage),
            process_group=0,
        )
        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = "ended by its time limit"
        finally:
            end_all(process)
    if outcome != "passed":
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return {"outcome": outcome, "seconds": time.perf_counter() - begin, "log": str(log)}


def surroundings(stage: Stage) -> Mapping[str, str]:
    """The environment of a stage: what it prints is in the log at once; a test's convolutions need no threads."""
    return os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1"} if stage.name == "tests" else {})


def end_all(process: subprocess.Popen[bytes]) -> None:
    """End a stage and all that it started: politely, for pytest writes its results when asked to stop, then surely."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report_on(out: Path) -> None:
    """Tables and plots of what there is; should that fail, the ledger is still there to make them from."""
    document = out / "report.md"
    try:
        from sdnet.bench import report  # matplotlib takes seconds that the stages can use

        document.write_text(report.whole_report(list(report.read(out)), document))
    except Exception as error:
        print(f"No report: {type(error).__name__}: {error}")
        return
    print(f"Tables and plots: {document}")
