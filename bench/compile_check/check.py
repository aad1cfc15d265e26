"""Compiles every kernel in every configuration that its launcher can choose, for GPUs that need not be there.

    python -m sdnet.bench.compile_check [--arch 80 90] [--quick] [--only TEXT] [--out FILE.json|FILE.md]

A kernel passes if it holds tensor-core instructions (wgmma on sm_90, mma.sync on sm_80) where it multiplies matrices,
spills no register, fits into shared memory, and ptxas does not serialise its wgmma. What a compilation shows, no run
has shown: lean code, not speed. Each compilation runs in a process of a pool, for a bad layout can abort one.
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
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sdnet.bench.compile_check.compile_case import CompileCase

ARCHS = (80, 90)

SHARED_OF_PROGRAM = {80: 163 * 1024, 90: 227 * 1024}
SHARED_OF_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}
REGISTERS, THREADS = 65536, 2048  # of a multiprocessor

Job = tuple[str, str, int]
"""A module, the name of one of its cases, an architecture: what a process of the pool is told."""


@dataclass(frozen=True)
class Report:
    """What a compilation showed. `occupancy` is programs per multiprocessor; no `faults` means that it passes."""

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


KERNEL_MODULES = tuple(f"{__package__}.{name}_cases" for name in ("fused", "correlation", "pointwise", "step_size"))
"""The modules that list compile cases."""


@cache
def cases_of(module: str, arch: int) -> dict[str, CompileCase]:
    """A module's cases by name."""
    cases = list(importlib.import_module(module).compile_cases(arch))
    found = {case.name: case for case in cases}
    if len(found) != len(cases):
        twice = sorted({case.name for case in cases if found[case.name] is not case})
        raise ValueError(f"{module} names several cases alike: {', '.join(twice[:5])}.")
    return found


def check(module: str, name: str, arch: int) -> Report:
    """Compiles one case and reads the outcome."""
    case = cases_of(module, arch)[name]
    report = Report(module.rpartition(".")[2], name, arch, case.num_warps, case.num_stages)
    names = list(case.kernel.arg_names)
    signature = {argument: case.signature.get(argument, "constexpr") for argument in names}
    attributes = {(names.index(argument),): [["tt.divisibility", 16]] for argument in case.divisible}
    try:
        compiled = triton.compile(
            ASTSource(case.kernel, signature, dict(case.constexprs), attributes),
            target=GPUTarget("cuda", arch, 32),
            options={"num_warps": case.num_warps, "num_stages": case.num_stages},
        )
    except Exception as error:
        return replace(report, faults=[f"does not compile: {type(error).__name__}: {str(error).strip()[-300:]}"])
    log = assembler_log(compiled.asm["ptx"], arch)
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    registers = int(found(r"Used (\d+) registers", log))
    spilled = sum(int(found(rf"(\d+) bytes spill {way}", log)) for way in ("stores", "loads"))
    instructions = sorted(set(re.findall(r"\b(wgmma\.mma_async|mma\.sync)\b", compiled.asm["ptx"])))
    allocated = threads * -(-registers // 8) * 8
    occupancy = min(REGISTERS // allocated, SHARED_OF_PROCESSOR[arch] // (shared + 1024), THREADS // threads)
    faults = []
    if case.tensor_cores and ("wgmma.mma_async" if arch >= 90 else "mma.sync") not in instructions:
        faults.append("no tensor-core instructions" + (f" of sm_{arch}: {instructions}" if instructions else ""))
    if spilled:
        faults.append(f"spills {spilled} bytes")
    if shared > SHARED_OF_PROGRAM[arch]:
        faults.append(f"{shared} bytes of shared memory do not fit")
    if "serializ" in log:
        faults.append("ptxas serialises wgmma")
    return replace(
        report,
        registers=registers,
        spilled=spilled,
        shared=shared,
        occupancy=occupancy,
        instructions=instructions,
        faults=faults,
    )


def assembler_log(ptx: str, arch: int) -> str:
    """What ptxas -v says of a program."""
    target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", target, str(source), "-o", str(source.with_suffix(".cubin"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def found(pattern: str, text: str) -> str:
    """The first group of the pattern in the text; "0" if it is not there."""
    match = re.search(pattern, text)
    return match[1] if match else "0"


def jobs_of(archs: Iterable[int], only: str = "", quick: bool = False) -> list[Job]:
    """Every case whose module and name hold `only`; with `quick` one of each kernel, in bf16 if it has it."""
    jobs: dict[object, Job] = {}
    for arch in archs:
        for module in KERNEL_MODULES:
            cases = cases_of(module, arch).items()
            for name, case in sorted(cases, key=lambda item: quick and not in_bf16(item[1])):
                if only in f"{module} {name}":
                    jobs.setdefault((arch, id(case.kernel)) if quick else (arch, module, name), (module, name, arch))
    return list(jobs.values())


def in_bf16(case: CompileCase) -> bool:
    """Whether a case has operands in bf16."""
    return any("bf16" in kind for kind in case.signature.values())


def submitted(pool: ProcessPoolExecutor, jobs: list[Job]) -> list[Future[Report]]:
    """The jobs, given to processes that start without the interpreter: its choice falls when Triton is imported."""
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return [pool.submit(check, *job) for job in jobs]
    finally:
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted


def reports_of(jobs: list[Job], processes: int) -> Iterator[Report]:
    """The jobs' reports in order, from a pool of processes. A job that kills its process is named; the others go on."""
    context = multiprocessing.get_context("spawn")
    while jobs:
        done = 0
        with ProcessPoolExecutor(processes, context) as pool:
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
    """The report of a job in a process of its own, which it may kill."""
    module, name, arch = job
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return submitted(pool, [job])[0].result()
        except BrokenProcessPool:
            return Report(module.rpartition(".")[2], name, arch, faults=["compiling it kills the process"])


def table(reports: list[Report]) -> str:
    """The reports of one module and architecture in Markdown."""
    lines = [
        "| case | warps | stages | registers | shared KB | programs / SM | instructions | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in reports:
        cells = (r.name, r.warps, r.stages, r.registers, f"{r.shared / 1024:.0f}", r.occupancy)
        instructions = ", ".join(r.instructions) or "-"
        lines.append(f"| {' | '.join(map(str, cells))} | {instructions} | {'; '.join(r.faults) or 'ok'} |")
    return "\n".join(lines)


def document(reports: list[Report]) -> str:
    """The committed page."""
    failed = sum(bool(r.faults) for r in reports)
    parts = [
        "# What the kernels compile to",
        "Written by `python -m sdnet.bench.compile_check --out docs/kernels.md` with Triton "
        f"{triton.__version__}: {len(reports)} compilations, {failed} with faults. No GPU took part: this shows lean "
        "code, not speed. A fault is a kernel without tensor-core instructions where it multiplies matrices, a spilled "
        "register, shared memory that does not fit, or wgmma that ptxas serialises.",
    ]
    for module, arch in sorted({(r.module, r.arch) for r in reports}):
        parts.append(f"## {module}, sm_{arch}")
        parts.append(table([r for r in reports if (r.module, r.arch) == (module, arch)]))
    return "\n\n".join(parts) + "\n"


def main() -> int:
    """The command; 1 if a case has faults."""
    parser = argparse.ArgumentParser(prog="python -m sdnet.bench.compile_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHS), choices=ARCHS)
    parser.add_argument("--quick", action="store_true", help="one case of each kernel and architecture, in bf16")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose module and name hold this text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write .json or .md")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.out is not None and options.out.suffix not in (".json", ".md"):
        parser.error(f"--out {options.out} must end in .json or .md.")
    reports = []
    for report in reports_of(jobs_of(options.arch, options.only, options.quick), options.processes):
        reports.append(report)
        outcome = "; ".join(report.faults) or "ok"
        print(
            f"sm_{report.arch} {report.module} {report.name}: {report.registers} registers, "
            f"{report.shared / 1024:.0f} KB, {report.occupancy} per SM: {outcome}",
            flush=True,
        )
    failed = [report for report in reports if report.faults]
    print(f"Triton {triton.__version__}: {len(reports)} compilations, {len(failed)} with faults.")
    if options.out is not None:
        text = (
            json.dumps([asdict(r) for r in reports], indent=1) if options.out.suffix == ".json" else document(reports)
        )
        options.out.write_text(text)
    return 1 if failed else 0
