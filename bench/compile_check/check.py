"""Compile every kernel in every configuration that its launcher can choose, for GPUs that need not be there.

    python -m sdnet.bench.compile_check [--arch 80 86 89 90 100 120] [--quick] [--only TEXT] [--out FILE.json]

The configurations are recorded from the launchers, run on tensors of the meta device. For sm_80 and sm_90 they are
those of every layer of the registered models, for the other architectures those of SDNet-18_all at 224 pixels in
bfloat16 and a sample of the rest. Kernels that Triton would compile from the same source are compiled once.

A kernel passes if it holds tensor-core instructions where it multiplies matrices (mma.sync, wgmma on sm_90, tcgen05 on
sm_100), spills no register, fits into shared memory, and ptxas does not serialise its wgmma. With several warpgroups a
barrier must stand between a wait for wgmma and the next write into shared memory (see `sass`). This shows lean code,
not speed: nothing runs. Each compilation runs in a process of a pool, because a bad layout can abort one.

With --out, reports of kernels whose source has not changed since the file was written are taken from it. The file is
written every few reports, so that an interrupted check goes on where it ended.
"""

import argparse
import importlib
import json
import multiprocessing
import multiprocessing.context
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import get_ptxas

from sdnet.bench.common_options import at_least
from sdnet.bench.compile_check.compile_case import CompileCase
from sdnet.bench.compile_check.sass import disassembled, unguarded_refills
from sdnet.bench.ledger import writable_folder
from sdnet.files import write_text
from sdnet.kernels.triton_path.tiles import most_shared
from sdnet.train.errors import UserError

ARCHS = (80, 86, 89, 90, 100, 120)

REGISTERS, THREADS = 65536, {80: 2048, 90: 2048, 100: 2048}
"""Registers and threads of a multiprocessor; 1536 threads on the architectures that are not named."""

PRODUCTS = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The tensor-core instructions of an architecture; mma.sync on the others."""

WRITTEN_EVERY = 20
"""Reports between two writings of the file."""

Job = tuple[str, str, int]
"""A module, the name of one of its cases, an architecture: what a process of the pool is given."""


@dataclass(frozen=True)
class Report:
    """What a compilation showed.

    `occupancy` is programs per multiprocessor, and `source` stands for all that the code depends on: source, arguments,
    options, architecture and Triton's version. A kernel without `faults` passes.
    """

    module: str
    name: str
    arch: int
    warps: int = 0
    stages: int = 0
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    occupancy: int = 0
    instructions: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    source: str = ""


MODULES = ("fused", "correlation", "candidate", "pointwise", "step_size")

KERNEL_MODULES = tuple(f"{__package__}.{name}_cases" for name in MODULES)
"""The modules that list compile cases."""


@cache
def cases_of(module: str, arch: int) -> dict[str, CompileCase]:
    """Return the cases of a module by name."""
    cases = list(importlib.import_module(module).compile_cases(arch))
    by_name = {case.name: case for case in cases}
    if len(by_name) != len(cases):
        twice = sorted({case.name for case in cases if by_name[case.name] is not case})
        raise ValueError(f"{module} gives several cases one name: {', '.join(twice[:5])}.")
    return by_name


reports_by_source: dict[str, Report] = {}
"""The reports that a process has made or was given."""


def remember(reports: Iterable[Report]) -> None:
    """Take reports of an earlier check for cases whose source has not changed."""
    reports_by_source.update({report.source: report for report in reports if report.source})


def check(module: str, name: str, arch: int) -> Report:
    """Compile one case, unless the same source has been compiled before, and read the outcome."""
    report = Report(module.rpartition(".")[2], name, arch)
    try:
        case = cases_of(module, arch)[name]
        key = case.key(arch)
        if key not in reports_by_source:
            reports_by_source[key] = compiled_report(case, replace(report, source=key))
    except Exception as error:
        return replace(report, faults=[f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"])
    return replace(reports_by_source[key], module=report.module, name=name)


def compiled_report(case: CompileCase, report: Report) -> Report:
    """Return the report of a compilation."""
    arch = report.arch
    try:
        compiled = case.compiled(arch)
    except Exception as error:
        return replace(report, faults=[f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"])
    log = assembler_log(compiled.asm["ptx"], arch)
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    registers = int(first_group(r"Used (\d+) registers", log))
    spilled = sum(int(first_group(rf"(\d+) bytes spill {way}", log)) for way in ("stores", "loads"))
    instructions = sorted(set(re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", compiled.asm["ptx"])))
    allocated = threads * -(-registers // 8) * 8
    shared_of_processor = most_shared(arch) + 1024
    occupancy = min(REGISTERS // allocated, shared_of_processor // (shared + 1024), THREADS.get(arch, 1536) // threads)
    faults = []
    if case.tensor_cores and PRODUCTS.get(arch, "mma.sync") not in instructions:
        faults.append("no tensor-core instructions" + (f" of sm_{arch}: {instructions}" if instructions else ""))
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if shared > most_shared(arch):
        faults.append(f"{shared} bytes of shared memory do not fit")
    if "serializ" in log:
        faults.append("ptxas serialises wgmma")
    several = compiled.metadata.num_warps > 4 and "wgmma.mma_async" in instructions
    if several and (writes := unguarded_refills(disassembled(compiled.asm["cubin"]))):
        faults.append(f"no barrier between the wait for wgmma and {writes[0]}")
    return replace(
        report,
        warps=compiled.metadata.num_warps,
        stages=compiled.metadata.num_stages,
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=occupancy,
        instructions=instructions,
        faults=faults,
    )


def assembler_log(ptx: str, arch: int) -> str:
    """Return what `ptxas -v` prints for a program."""
    target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", target, str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def first_group(pattern: str, text: str) -> str:
    """Return the first group of the pattern in the text; "0" if it is not there."""
    match = re.search(pattern, text)
    return match[1] if match else "0"


def jobs_of(archs: Iterable[int], only: str = "", quick: bool = False) -> list[Job]:
    """Return every case whose module and name hold `only`; with `quick` one of each kernel and form, in bf16 if any."""
    jobs: dict[object, Job] = {}
    for arch in archs:
        for module in KERNEL_MODULES:
            cases = cases_of(module, arch).items()
            for name, case in sorted(cases, key=lambda item: quick and not item[1].in_bf16):
                form = case.tile.form if case.tile is not None else ""
                if only in f"{module} {name}":
                    jobs.setdefault(
                        (arch, id(case.kernel), form) if quick else (arch, module, name), (module, name, arch)
                    )
    return list(jobs.values())


def submitted(pool: ProcessPoolExecutor, jobs: list[Job]) -> list[Future[Report]]:
    """Submit the jobs to processes that start without the interpreter, which is chosen when Triton is imported."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return [pool.submit(check, *job) for job in jobs]
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def reports_of(jobs: list[Job], processes: int, known: Iterable[Report] = ()) -> Iterator[Report]:
    """Yield the reports of the jobs in order, from a pool of processes; a job that kills its process gets one too.

    `known` are reports of an earlier check, for `remember`.
    """
    known = list(known)
    context = multiprocessing.get_context("spawn")
    while jobs:
        done = 0
        with ProcessPoolExecutor(processes, context, remember, (known,)) as pool:
            try:
                for future in submitted(pool, jobs):
                    yield future.result()
                    done += 1
            except BrokenProcessPool:
                pass
        if done < len(jobs):  # which of those under way broke the pool is not known: the first unfinished goes alone
            yield alone(jobs[done], context)
            done += 1
        jobs = jobs[done:]


def alone(job: Job, context: multiprocessing.context.SpawnContext) -> Report:
    """Return the report of a job in a process of its own, which it may kill."""
    module, name, arch = job
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return submitted(pool, [job])[0].result()
        except BrokenProcessPool:
            return Report(module.rpartition(".")[2], name, arch, faults=["compiling it kills the process"])


def summary(reports: list[Report]) -> str:
    """Return a line for each module and architecture: compilations, faults, the most registers and shared memory."""
    lines = []
    for module, arch in sorted({(r.module, r.arch) for r in reports}):
        group = [r for r in reports if (r.module, r.arch) == (module, arch)]
        lines.append(
            f"{module}, sm_{arch}: {len(group)} compilations, {sum(bool(r.faults) for r in group)} with faults, "
            f"at most {max(r.registers for r in group)} registers and {max(r.shared for r in group) / 1024:.0f} KB."
        )
    failed = sum(bool(r.faults) for r in reports)
    lines.append(f"Triton {triton.__version__}: {len(reports)} compilations, {failed} with faults.")
    return "\n".join(lines)


def document(reports: list[Report]) -> str:
    """Return the JSON that is committed: Triton's version and one report a line."""
    rows = ",\n".join(json.dumps(asdict(report)) for report in reports)
    return f'{{"triton": "{triton.__version__}", "reports": [\n{rows}\n]}}\n'


def earlier_reports(file: Path | None) -> list[Report]:
    """Return the reports of an earlier check by the same version of Triton; none without a file.

    Raises:
        UserError: The file holds something else, or its folder cannot be written to.
    """
    if file is None:
        return []
    writable_folder(file.parent)
    if not file.exists():
        return []
    try:
        written = json.loads(file.read_text())
        return [Report(**report) for report in written["reports"]] if written["triton"] == triton.__version__ else []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out is {file}, which holds no reports of a compile check.") from error


def write(file: Path | None, reports: list[Report]) -> None:
    """Write the reports, if there is a file for them."""
    if file is not None:
        write_text(file, document(reports))


def main() -> int:
    """Run the command; return 1 if a case has faults."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.compile_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one case of each kernel, form and architecture, in bf16")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose module and name hold this text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the reports as JSON")
    parser.add_argument("--processes", type=at_least(1), default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.out is not None and options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json.")
    jobs = jobs_of(options.arch, options.only, options.quick)
    if not jobs:
        parser.error(f"--only {options.only} is in the module and name of no case, such as 'step_size_cases project'.")
    try:
        reports, known = [], earlier_reports(options.out)
    except UserError as error:
        parser.error(str(error))
    for report in reports_of(jobs, options.processes, known):
        reports.append(report)
        if len(reports) % WRITTEN_EVERY == 0:
            write(options.out, [*reports, *known])
        outcome = "; ".join(report.faults) or "ok"
        print(
            f"sm_{report.arch} {report.module} {report.name}: {report.registers} registers, "
            f"{report.shared / 1024:.0f} KB, {report.occupancy} per SM: {outcome}",
            flush=True,
        )
    print(summary(reports))
    write(options.out, reports)
    return 1 if any(report.faults for report in reports) else 0
