"""Kernels compile lean for GPUs that are not there: a sample of what the command `compile_check` does for all."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sdnet.bench.compile_check import check as compile_check
from sdnet.bench.compile_check.check import Job, Report, jobs_of, reports_of
from sdnet.bench.compile_check.compile_case import CompileCase

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux alone")


def name_of(job: Job) -> str:
    module, name, arch = job
    return f"sm_{arch} {module.rpartition('.')[2]} {name}"


def test_one_case_of_each_kernel_is_lean() -> None:
    jobs = jobs_of([90], quick=True) + jobs_of([80], "correlation", quick=True)
    reports = list(reports_of(jobs, processes=2))
    assert [(report.name, report.arch) for report in reports] == [(name, arch) for _, name, arch in jobs]
    assert {name_of(job): report.faults for job, report in zip(jobs, reports, strict=True) if report.faults} == {}
    multiplying = [report for report in reports if report.instructions]
    assert {80, 90} == {report.arch for report in multiplying}
    assert all(report.registers > 0 and report.occupancy > 0 for report in reports)


def test_every_case_names_what_its_kernel_takes() -> None:
    for arch in compile_check.ARCHS:
        for module in compile_check.KERNEL_MODULES:
            for case in compile_check.cases_of(module, arch).values():
                given = set(case.signature) | set(case.constexprs)
                assert given == set(case.kernel.arg_names), case.name
                assert set(case.divisible) <= set(case.signature), case.name


def test_integers_are_specialised_as_at_a_launch() -> None:
    case = CompileCase.of("", None, {"x_ptr": "*bf16"}, {"one": 1, "odd": 7, "even": 32, "long": 2**31}, {"B": 4})
    assert case.signature == {"x_ptr": "*bf16", "odd": "i32", "even": "i32", "long": "i64"}
    assert case.constexprs == {"B": 4, "one": 1}
    assert case.divisible == ("x_ptr", "even", "long")


FAULTY = """
import os
import triton
import triton.language as tl
from sdnet.bench.compile_check.compile_case import CompileCase

@triton.jit
def copy(x_ptr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, B), tl.load(x_ptr + tl.arange(0, B)) + 1)

@triton.jit
def wrong(x_ptr, B: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, B), nothing)

class Fatal(dict):
    def get(self, *_):
        os._exit(1)

def compile_cases(arch):
    yield CompileCase("copy", copy, {"x_ptr": "*bf16"}, {"B": 64}, ("x_ptr",), tensor_cores=False)
    yield CompileCase("no product", copy, {"x_ptr": "*bf16"}, {"B": 64}, ("x_ptr",))
    yield CompileCase("wrong", wrong, {"x_ptr": "*bf16"}, {"B": 64}, ("x_ptr",))
    yield CompileCase("fatal", copy, Fatal(x_ptr="*bf16"), {"B": 64}, ("x_ptr",))
    yield CompileCase("after", copy, {"x_ptr": "*bf16"}, {"B": 32}, ("x_ptr",), tensor_cores=False)
"""


def test_faults_are_named_and_a_dying_process_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    jobs = [("faulty", name, 90) for name in ("copy", "no product", "wrong", "fatal", "after")]
    reports = {report.name: report for report in reports_of(jobs, processes=1)}
    assert reports["copy"].faults == []
    assert reports["copy"].registers > 0
    assert reports["no product"].faults == ["no tensor-core instructions"]
    assert re.match("does not compile: .*nothing", reports["wrong"].faults[0], re.DOTALL)
    assert reports["fatal"].faults == ["compiling it kills the process"]
    assert reports["after"].faults == []


def test_command_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: str) -> int:
        arguments = ["--arch", "90", "--only", "mask minus=0 bf16", "--processes", "1", "--out", str(tmp_path / out)]
        monkeypatch.setattr(sys, "argv", ["compile_check", *arguments])
        return compile_check.main()

    assert run("found.json") == 0
    [found] = json.loads((tmp_path / "found.json").read_text())
    assert (found["module"], found["arch"], found["faults"]) == ("pointwise_cases", 90, [])
    with pytest.raises(SystemExit):
        run("found.txt")
    assert "must end in .json or .md" in capsys.readouterr().err


def test_page_shows_each_report() -> None:
    report = Report("module", "a case", 90, 4, 3, 128, 0, 96 * 1024, 2, ["wgmma.mma_async"])
    page = compile_check.document([report, replace(report, faults=["spills 8 bytes"])])
    assert "2 compilations, 1 with faults" in page
    assert "## module, sm_90" in page
    assert "| a case | 4 | 3 | 128 | 96 | 2 | wgmma.mma_async | ok |" in page
    assert "| spills 8 bytes |" in page
