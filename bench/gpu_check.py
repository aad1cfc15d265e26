"""`gpu-check`: the first checks and measurements on a GPU, within 15 minutes; all results in one folder.

In this order: compute-sanitizer over one small call of each kernel; the tests that need a GPU; the qualification of
SDNet-18 and SDNet-18_all in the rules' tiles; training speed with these verdicts; Nsight Compute on two layers. What
time is left goes to other tiles and further measurements. `bench/gpu_parts.py` lists the stages.

Each stage is a process that coreutils' `timeout` ends at its limit: with SIGINT, after which pytest writes its results,
and a few seconds later with SIGKILL. After every stage a row enters the ledger and summary.json is written. A stage
whose tool is not installed is left out, with that reason. With pytest-xdist the tests run in parallel. PyTorch, Triton,
einops and NumPy suffice; pytest runs the tests.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sdnet.bench.common_options import choose_device, seconds
from sdnet.bench.gpu_parts import TESTS, Stage, numbers_of, stages, tool_path
from sdnet.bench.ledger import Ledger, read, writable_folder
from sdnet.files import write_text
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError

SECONDS = 880
"""Of all stages together; the rest of a quarter of an hour is for the start."""

GRACE = 8
"""Seconds between SIGINT and SIGKILL."""

REPORT = 15
"""Seconds kept for the report."""

LEAST = 45
"""A stage with less time than this is not started: the start alone takes half of it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--out", type=Path, required=True, help="a folder for the ledger, logs, tables and plots")
    parser.add_argument("--device", default="auto", help="default: the GPU")
    parser.add_argument("--seconds", type=seconds, default=SECONDS, help=f"of all stages together; default {SECONDS}")
    parser.add_argument("--stage", nargs="+", metavar="NAME", help="only these; default all")
    parser.add_argument("--dry-run", action="store_true", help="print the stages and what they would run, and end")


def run(options: argparse.Namespace) -> int:
    """Run the stages; return 1 if one did not pass, else 0."""
    end = time.perf_counter() + options.seconds - GRACE - REPORT
    known = {stage.name: stage for stage in stages(options.out)}
    if unknown := [name for name in options.stage or () if name not in known]:
        raise UserError(f"--stage {' '.join(unknown)} is unknown; it must be one of {', '.join(known)}.")
    if options.dry_run:
        for number, name in enumerate(options.stage or known, 1):
            print(f"{number}. {described(known[name])}")
        return 0
    device = choose_device(options.device)
    if device.type != "cuda":
        raise UserError("gpu-check needs a GPU, and torch finds none; `python -m sdnet.bench kernels` works on a CPU.")
    writable_folder(options.out)
    results: dict[str, dict[str, Any]] = {}
    facts = describe_environment(device) | {"command": "python -m sdnet.bench gpu-check", "label": ""}
    ledger = Ledger(options.out, "gpu", facts)
    for name in options.stage or known:
        results[name] = run_stage(known[name], options.out, min(known[name].limit, end - time.perf_counter()))
        add_row(ledger, name, results[name], options.out)
        summary = {"environment": facts, "stages": results}
        write_text(options.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_report(options.out)
    for name, result in results.items():
        print(f"{name}: {result['outcome']} after {result['seconds']:.0f} s, log {result['log']}")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) else 1


def described(stage: Stage) -> str:
    """Return a line on a stage: its name, its limit, and what it runs."""
    missing = f" ({stage.missing} is not installed here)" if stage.missing else ""
    command = shlex.join([*stage.variables, *stage.tool, "python", "-m", *stage.within(stage.limit)])
    return f"{stage.name}, at most {stage.limit} s{missing}: {command}"


def add_row(ledger: Ledger, name: str, result: dict[str, Any], out: Path) -> None:
    """Add the row of a stage: its time and what it found, or why it has none."""
    log = Path(result["log"])
    ran = result["seconds"] > 0  # else the log is of an earlier check in this folder
    numbers = numbers_of(name, out, log.read_text(errors="replace")) if ran else {}
    facts = {"shape": {"stage": name}, "metrics": numbers, "settings": {"outcome": result["outcome"]}}
    if result["outcome"] == "passed":
        spent = dict.fromkeys(("p20", "p50", "p80"), 1000 * max(result["seconds"], 1e-3))
        ledger.add(name, "stage", time_ms=spent, **facts)
    else:
        status = "skipped" if result["seconds"] == 0 else "refused"
        ledger.add(name, "stage", status=status, reason=result["outcome"], **facts)


def run_stage(stage: Stage, out: Path, limit: float) -> dict[str, Any]:
    """Run a stage for at most `limit` seconds; return its outcome, seconds and log."""
    log = out / f"{stage.name}.log"
    if stage.missing:
        return {"outcome": f"skipped, {stage.missing} is not installed", "seconds": 0.0, "log": str(log)}
    if limit < min(LEAST, stage.limit):
        return {"outcome": "skipped, no time left", "seconds": 0.0, "log": str(log)}
    print(f"{stage.name} (at most {limit:.0f} s) ...", flush=True)
    begin = time.perf_counter()
    command = [
        "timeout",
        "--signal=INT",
        f"--kill-after={GRACE}",
        f"{limit:.0f}",
        *((tool_path(stage.tool[0]) or stage.tool[0], *stage.tool[1:]) if stage.tool else ()),
        sys.executable,
        "-m",
        *stage.within(limit),
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "SDNET_CACHE": str((out / "verdicts").resolve())}
    environment |= dict(variable.split("=", 1) for variable in stage.variables)
    if stage.name == "tests":
        (out / TESTS).unlink(missing_ok=True)  # of an earlier check in this folder
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

        write_text(document, report.whole_report(list(read(out)), document))
    except Exception as error:
        print(f"No report: {type(error).__name__}: {error}")
        return
    print(f"Tables and plots: {document}")
