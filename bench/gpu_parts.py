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

COLUMNS = ("Kernel Name", "Grid Size", "Metric Name", "Metric Unit", "Metric Value")
"""Columns of its CSV."""

KERNELS = "regex:^(proximal_step|codes_gradient|synthesis|correlate)"
"""The kernels that Nsight Compute counts in: those that multiply."""

UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING=1"
"""Makes PyTorch allocate each tensor by itself; in its larger blocks memcheck finds no access beyond a tensor."""

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
        variables: What is added to the environment, as NAME=VALUE.
    """

    name: str
    command: list[str]
    limit: int
    spare: int = 0
    tool: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()

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
    compiling. The layer of SDNet-18 is also one of SDNet-18_all, which therefore comes first.
    """
    calls = ["sdnet.bench.gpu_calls"]
    # PyTorch asks drivers for functions that they may lack, and Triton starts programs that use no GPU.
    sanitizer = ("compute-sanitizer", "--target-processes", "application-only", "--report-api-errors", "no")
    sanitizer += ("--error-exitcode", "9", "--tool")
    ncu = ("ncu", "--csv", "--print-units", "base", "--metrics", ",".join(METRICS), "--kernel-name", KERNELS)
    large, small = ["--image-size", "224", "--batch", "256"], ["--image-size", "32", "--batch", "512"]
    qualify = ["sdnet.kernels.qualify", "--cache", str(out / "verdicts"), "--model"]
    measured = ["--layout", "channels_last", "--out", str(out)]
    kernels = ["sdnet.bench", "kernels", "--seconds", "0.3", *measured]
    train = ["sdnet.bench", "train", "--dtype", "bf16", *measured]
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    memory = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    workers = max(1, min(12, len(os.sched_getaffinity(0)) - 2, memory // TEST_MEMORY))
    parallel = ["--numprocesses", str(workers), "--dist", "worksteal"] if find_spec("xdist") else []
    tests = ["pytest", "-m", "gpu", "-v", *parallel, f"--rootdir={ROOT}", f"--junitxml={out / TESTS}", *files]
    return [
        Stage("memcheck", calls, 75, tool=(*sanitizer, "memcheck"), variables=(UNCACHED,)),
        Stage("racecheck", calls, 60, tool=(*sanitizer, "racecheck")),
        Stage("tests", tests, 150, variables=("OMP_NUM_THREADS=1",)),
        Stage("qualify_sdnet18_all_224", [*qualify, "sdnet18_all", *large, "--quick"], 120, spare=15),
        Stage("qualify_sdnet18_224", [*qualify, "sdnet18", *large, "--quick"], 40, spare=15),
        Stage("qualify_sdnet18_all_32", [*qualify, "sdnet18_all", *small, "--quick"], 90, spare=15),
        Stage("qualify_sdnet18_32", [*qualify, "sdnet18", *small, "--quick"], 40, spare=15),
        Stage("train", [*train, *large, "--seconds", "15", "--impl", "auto", "torch"], 140, spare=50),
        Stage("ncu", [*calls, "--layer", "64@56", "256@14", "--batch", "256"], 60, tool=ncu),
        Stage("tiles_sdnet18_all_224", [*qualify, "sdnet18_all", *large, "--fresh"], 240, spare=15),
        Stage("kernels", [*kernels, "--operator", "csc", "--image-size", "224"], 175, spare=45),
        Stage("train_more", [*train, *small, "--seconds", "12"], 120, spare=50),
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
    """Return each counter of each kernel and grid in Nsight Compute's CSV, the mean over these launches.

    The grid tells layers apart.
    """
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    values: dict[str, list[float]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel, grid, metric, unit, value = (row.get(name) or "" for name in COLUMNS)
        if re.fullmatch(r"[\d.]+", value := value.replace(",", "")):
            key = f"{kernel.split('(')[0]} {grid.replace(' ', '')} {metric} [{unit}]"
            values.setdefault(key, []).append(float(value))
    return {key: sum(found) / len(found) for key, found in values.items()}
