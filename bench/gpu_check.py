"""`gpu-check`: the tests that need a GPU, then kernels and train on it, within ten minutes; all results in one folder.

Each stage is a process of its own with a time limit, so that one that hangs or crashes leaves the others their turn.
Needs torch, triton, accelerate, einops, rich, numpy, pytest, pillow and matplotlib.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from sdnet.bench import environment, report
from sdnet.train.errors import UserError


class Stage(NamedTuple):
    """A process: its name, what it runs (after `python -m`), and the seconds after which it is ended."""

    name: str
    command: list[str]
    limit: int


def stages(out: Path) -> list[Stage]:
    """Less than ten minutes together. Within a stage the shapes come first that matter most."""
    folder = ["--out", str(out)]
    kernels = ["sdnet.bench", "kernels", "--seconds", "0.3", *folder]
    eager = ["--provider", "triton", "torch", "reference", "official"]  # compiled convolutions run channels_last anyway
    train = ["sdnet.bench", "train", "--layout", "channels_last", "--seconds", "20", "--budget", "80", *folder]
    tests = ["pytest", "-m", "gpu", "-q", f"--junitxml={out / 'tests.xml'}", *test_files()]
    return [
        Stage("tests", tests, 140),
        Stage("kernels, channels_last", [*kernels, "--layout", "channels_last", "--budget", "170"], 215),
        Stage("kernels, contiguous", [*kernels, "--layout", "contiguous", "--budget", "50", *eager], 80),
        Stage("train", train, 155),
    ]


def test_files() -> list[str]:
    """The test files with tests for a GPU; others may import what a GPU machine need not have."""
    files = [str(path) for path in sorted(Path("tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise UserError("There are no tests marked gpu under tests/; run this from the root of a checkout.")
    return files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a folder for the ledger, logs, tables and plots")
    parser.add_argument("--device", default="auto", help="default: the GPU")


def run(options: argparse.Namespace) -> int:
    """Run all stages; 1 if one failed."""
    device = environment.choose_device(options.device)
    if device.type != "cuda":
        raise UserError("gpu-check needs a GPU, and torch sees none; `python -m sdnet.bench kernels` works on a CPU.")
    options.out.mkdir(parents=True, exist_ok=True)
    results = {stage.name: run_stage(stage, options.out) for stage in stages(options.out)}
    summary = {"environment": environment.describe(device), "stages": results}
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    document = options.out / "report.md"
    document.write_text(report.whole_report(list(report.read(options.out)), document))
    for name, result in results.items():
        print(f"{name}: {result['outcome']} after {result['seconds']:.0f} s, log {result['log']}")
    print(f"Tables and plots: {document}")
    return 0 if all(result["outcome"] == "passed" for result in results.values()) else 1


def run_stage(stage: Stage, out: Path) -> dict[str, str | float]:
    """Outcome, seconds and log of a stage."""
    log = out / f"{stage.name.replace(', ', '_')}.log"
    print(f"{stage.name} (at most {stage.limit} s) ...", flush=True)
    begin = time.perf_counter()
    with log.open("w") as file:
        try:
            command = [sys.executable, "-m", *stage.command]
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=stage.limit).returncode
            outcome = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = "ended by its time limit"
    return {"outcome": outcome, "seconds": time.perf_counter() - begin, "log": str(log)}
