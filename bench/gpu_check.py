"""`gpu-check`: the tests that need a GPU, then `kernels` and `train`, within ten minutes; all results in one folder.

Each stage is a process that coreutils' `timeout` ends at its limit: with SIGINT, after which pytest writes its results,
and a few seconds later with SIGKILL. The most important stages come first. Rows are written as they are measured, and
summary.json is written after every stage. With pytest-xdist the tests run in parallel.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdnet.bench.common_options import choose_device, seconds
from sdnet.bench.ledger import ROOT, read, writable_folder
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError

SECONDS = 540
"""Of all stages together; the rest of ten minutes is for the start and the report."""

GRACE = 8
"""Seconds between SIGINT and SIGKILL."""

REPORT = 15
"""Seconds kept for the report."""

TEST_MEMORY = 10 * 2**30
"""Bytes of GPU memory that a process of the tests may need."""

LEAST = 45
"""A stage with less time than this is not started: the start alone takes half of it."""


class Stage(NamedTuple):
    """A process.

    Attributes:
        name: The name of the stage and of its log.
        command: What runs after `python -m`.
        limit: Seconds after which it is ended.
        spare: How much less its --budget is, so that what it has begun can end; 0 for a program without --budget.
    """

    name: str
    command: list[str]
    limit: int
    spare: int = 0

    def within(self, limit: float) -> list[str]:
        """Return the command for so many seconds."""
        return [*self.command, "--budget", f"{max(limit - self.spare, 0):.0f}"] if self.spare else self.command


def stages(out: Path) -> list[Stage]:
    """Return the stages, the most important first."""
    kernels = ["sdnet.bench", "kernels", "--seconds", "0.3", "--out", str(out)]
    eager = ["--operator", "csc", "--provider", "fused", "cudnn", "torch", "reference", "official"]
    train = ["sdnet.bench", "train", "--layout", "channels_last", "--out", str(out)]
    large = ["--image-size", "224", "--dtype", "bf16", "--impl", "auto", "torch", "--seconds", "20"]
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2, memory // TEST_MEMORY))
    parallel = ["--numprocesses", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    tests = ["pytest", "-m", "gpu", "-v", *parallel, f"--rootdir={ROOT}", f"--junitxml={out / 'tests.xml'}", *files]
    return [
        Stage("tests", tests, 120),
        Stage("kernels", [*kernels, "--layout", "channels_last"], 175, spare=45),
        Stage("train", [*train, *large], 140, spare=50),
        Stage("kernels_contiguous", [*kernels, "--layout", "contiguous", *eager], 55, spare=25),
        Stage("train_more", [*train, "--image-size", "32", "--seconds", "12"], 120, spare=50),
    ]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--out", type=Path, required=True, help="a folder for the ledger, logs, tables and plots")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--seconds", type=seconds, default=SECONDS, help=f"of all stages together; default {SECONDS}")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these; default all")


def run(options: argparse.Namespace) -> int:
    """Run the stages; return 1 if one did not pass, else 0."""
    end = time.perf_counter() + options.seconds - GRACE - REPORT
    device = choose_device(options.device)
    if device.type != "cuda":
        raise UserError("gpu-check needs a GPU, and torch finds none; `python -m sdnet.bench kernels` works on a CPU.")
    known = {stage.name: stage for stage in stages(options.out)}
    if unknown := [name for name in options.stage or () if name not in known]:
        raise UserError(f"--stage {' '.join(unknown)} is unknown; it must be one of {', '.join(known)}.")
    writable_folder(options.out)
    results: dict[str, dict[str, Any]] = {}
    facts = describe_environment(device)
    for name in options.stage or known:
        results[name] = run_stage(known[name], options.out, min(known[name].limit, end - time.perf_counter()))
        summary = {"environment": facts, "stages": results}
        (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    write_report(options.out)
    for name, result in results.items():
        print(f"{name}: {result['outcome']} after {result['seconds']:.0f} s, log {result['log']}")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) else 1


def run_stage(stage: Stage, out: Path, limit: float) -> dict[str, Any]:
    """Run a stage for at most `limit` seconds; return its outcome, seconds and log."""
    log = out / f"{stage.name}.log"
    if limit < min(LEAST, stage.limit):
        return {"outcome": "skipped, no time left", "seconds": 0.0, "log": str(log)}
    print(f"{stage.name} (at most {limit:.0f} s) ...", flush=True)
    begin = time.perf_counter()
    command = [
        "timeout",
        "--signal=INT",
        f"--kill-after={GRACE}",
        f"{limit:.0f}",
        sys.executable,
        "-m",
        *stage.within(limit),
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1"} if stage.name == "tests" else {})
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment) as process,
    ):
        try:
            status = process.wait()
        except BaseException:
            process.terminate()  # `timeout` passes it on to all processes of the stage
            raise
    outcome = "passed" if status == 0 else f"failed with status {status}"
    if status in (124, 137, -9):
        outcome = "ended by its time limit"
    if outcome != "passed":
        print("\n".join(log.read_text(errors="replace").splitlines()[-12:]), flush=True)
    return {"outcome": outcome, "seconds": time.perf_counter() - begin, "log": str(log)}


def write_report(out: Path) -> None:
    """Write tables and plots; if that fails, the ledger is still there to make them from."""
    document = out / "report.md"
    try:
        from sdnet.bench import report  # matplotlib takes seconds that the stages can use

        document.write_text(report.whole_report(list(read(out)), document))
    except Exception as error:
        print(f"No report: {type(error).__name__}: {error}")
        return
    print(f"Tables and plots: {document}")
