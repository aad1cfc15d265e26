"""The parts of `gpu-check`, in their order, and what their outputs say in numbers."""

import csv
import os
import re
import shutil
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from sdnet.bench.ledger import ROOT

TEST_MEMORY = 10 * 2**30
"""Bytes of GPU memory that a process of the tests may need."""

METRICS = (
    "gpu__time_duration.sum",
    "lts__t_bytes.sum",
    "dram__bytes.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "l1tex__data_pipe_lsu_wavefronts.sum",
)
"""What Nsight Compute counts: whether a kernel is bound by the L2 cache, by memory or by the tensor cores."""

TESTS = "tests.xml"
"""What pytest writes into the folder of the results."""

CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
"""The CUDA toolkit, whose programs need not be on PATH."""


class Stage(NamedTuple):
    """A process.

    Attributes:
        name: The name of the stage and of its log.
        command: What runs after `python -m`.
        limit: Seconds after which it is ended.
        spare: How much less its --budget is, so that what it has begun can end; 0 for a program without --budget.
        tool: A program and its options that runs Python, as compute-sanitizer; none for Python alone.
    """

    name: str
    command: list[str]
    limit: int
    spare: int = 0
    tool: tuple[str, ...] = ()

    def within(self, limit: float) -> list[str]:
        """Return the command for so many seconds."""
        return [*self.command, "--budget", f"{max(limit - self.spare, 0):.0f}"] if self.spare else self.command

    @property
    def missing(self) -> str:
        """The tool that this machine lacks; "" if it lacks none."""
        return "" if not self.tool or tool_path(self.tool[0]) else self.tool[0]


def tool_path(name: str) -> str | None:
    """Return the path of a program of the CUDA toolkit, or None if it is not installed."""
    return shutil.which(name) or shutil.which(name, path=str(CUDA / "bin"))


def stages(out: Path) -> list[Stage]:
    """Return the stages in their order: first whether the kernels are right, then how quick they are.

    Every layer gets a verdict on the rules' tiles before one is measured in other tiles, which takes minutes of
    compiling.
    """
    calls, verdicts = ["sdnet.bench.gpu_calls"], ["--cache", str(out / "verdicts")]
    sanitizer = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
    ncu = ("ncu", "--csv", "--metrics", ",".join(METRICS), "--kernel-name", "regex:.*_kernel")
    large = ["--image-size", "224", "--batch", "256", *verdicts]
    small = ["--image-size", "32", "--batch", "512", *verdicts]
    qualify = ["sdnet.kernels.qualify", "--model"]
    measured = ["--layout", "channels_last", "--out", str(out)]
    kernels = ["sdnet.bench", "kernels", "--seconds", "0.3", *measured]
    train = ["sdnet.bench", "train", *measured]
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2, memory // TEST_MEMORY))
    parallel = ["--numprocesses", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    tests = ["pytest", "-m", "gpu", "-v", *parallel, f"--rootdir={ROOT}", f"--junitxml={out / TESTS}", *files]
    bf16 = ["--image-size", "224", "--dtype", "bf16", "--seconds", "15"]
    return [
        Stage("memcheck", calls, 75, tool=(*sanitizer, "memcheck")),
        Stage("racecheck", calls, 60, tool=(*sanitizer, "racecheck")),
        Stage("tests", tests, 150),
        Stage("qualify_sdnet18_224", [*qualify, "sdnet18", *large, "--quick"], 40, spare=15),
        Stage("qualify_sdnet18_all_224", [*qualify, "sdnet18_all", *large, "--quick"], 120, spare=15),
        Stage("qualify_sdnet18_32", [*qualify, "sdnet18", *small, "--quick"], 40, spare=15),
        Stage("qualify_sdnet18_all_32", [*qualify, "sdnet18_all", *small, "--quick"], 90, spare=15),
        Stage("train", [*train, *bf16, "--impl", "auto", "torch"], 140, spare=50),
        Stage("ncu", [*calls, "--layer", "64@56", "256@14", "--batch", "256"], 60, tool=ncu),
        Stage("tiles_sdnet18_all_224", [*qualify, "sdnet18_all", *large, "--fresh"], 240, spare=15),
        Stage("kernels", [*kernels, "--operator", "csc", "--image-size", "224"], 175, spare=45),
        Stage("train_more", [*train, "--image-size", "32", "--seconds", "12"], 120, spare=50),
    ]


NEEDED = 9
"""The first so many stages are those that fit into a quarter of an hour together; the others take what is left."""


def numbers_of(name: str, out: Path, log: str) -> dict[str, float]:
    """Return what a stage found, by name: errors and hazards, outcomes of tests, or counters of kernels."""
    if name in ("memcheck", "racecheck"):
        summaries = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", log)
        return {"errors": float(sum(int(count) for pair in summaries for count in pair if count))} if summaries else {}
    if name == "tests" and (out / TESTS).is_file():
        try:
            root = ET.parse(out / TESTS).getroot()
        except ET.ParseError:  # pytest was killed while it wrote
            return {}
        found = [suite.attrib for suite in root.iter("testsuite")]
        return {
            word: float(sum(int(suite[word]) for suite in found)) for word in ("tests", "failures", "errors", "skipped")
        }
    if name == "ncu":
        return counters_of(log)
    return {}


def counters_of(log: str) -> dict[str, float]:
    """Return each counter of each kernel in Nsight Compute's CSV, the mean over the kernel's launches."""
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values: dict[str, list[float]] = {}
    for row in csv.DictReader(lines[start:]):
        value = (row.get("Metric Value") or "").replace(",", "")
        if re.fullmatch(r"[\d.]+", value):
            key = f"{row['Kernel Name'].split('(')[0]} {row['Metric Name']} [{row['Metric Unit']}]"
            values.setdefault(key, []).append(float(value))
    return {key: sum(found) / len(found) for key, found in values.items()}
