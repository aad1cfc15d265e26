"""Kernels compile lean for GPUs that are not there: a sample of what the command `compile_check` does for all."""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from sdnet.bench.compile_check import check as compile_check
from sdnet.bench.compile_check import correlation_cases, fused_cases
from sdnet.bench.compile_check.check import Job, Report, jobs_of, reports_of
from sdnet.bench.compile_check.sass import unguarded_refills

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux alone")


def name_of(job: Job) -> str:
    module, name, arch = job
    return f"sm_{arch} {module.rpartition('.')[2]} {name}"


def test_one_case_of_each_kernel_is_lean() -> None:
    jobs = jobs_of([90], quick=True) + jobs_of([80], "correlation", quick=True)
    jobs += jobs_of([90], "candidate_cases codes_gradient 256->256 3x3/1 @ 14x14 bf16 descriptors 256.1.1x128x64")
    jobs += jobs_of([100], "synthesis 32 channels")  # a nested sum in it did not compile for this architecture
    reports = list(reports_of(jobs, processes=2))
    assert [(report.name, report.arch) for report in reports] == [(name, arch) for _, name, arch in jobs]
    assert {name_of(job): report.faults for job, report in zip(jobs, reports, strict=True) if report.faults} == {}
    multiplying = [report for report in reports if report.instructions]
    assert {80, 90, 100} == {report.arch for report in multiplying}
    assert all(report.registers > 0 and report.occupancy > 0 for report in reports)


def test_every_case_has_what_its_kernel_takes() -> None:
    for arch in (80, 90, 100):
        for module in compile_check.KERNEL_MODULES:
            for case in compile_check.cases_of(module, arch).values():
                assert set(case.arguments) == set(case.kernel.arg_names), case.name


def test_recorded_launches_cover_each_form_and_every_kernel_of_the_loop() -> None:
    names = {90: {"few", "pointers", "descriptors"}, 80: {"few", "pointers"}}
    for arch, forms in names.items():
        for module in (fused_cases.__name__, correlation_cases.__name__):
            cases = compile_check.cases_of(module, arch).values()
            assert {case.tile.form for case in cases if case.tile is not None} == forms
    kernels = {case.kernel.__name__ for case in compile_check.cases_of(fused_cases.__name__, 90).values()}
    assert kernels == {"proximal_step_kernel", "codes_gradient_kernel", "synthesis_kernel"}


INTEGERS = """
import triton
from sdnet.bench.compile_check.compile_case import CompileCase

@triton.jit
def kernel(x_ptr, one, odd, even, long, B: triton.language.constexpr):
    pass

sizes = {"one": 1, "odd": 7, "even": 32, "long": 2**31}
source = CompileCase.of("", kernel, {"x_ptr": "*bf16"}, sizes, {"B": 4}).source(90)
print(source.signature, source.constants, [place for (place,), known in source.attrs.items() if known])
"""


def test_integers_are_specialised_as_at_a_launch() -> None:
    """In a process of its own, for the interpreter has no such thing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # Triton reads the source of a kernel
        file.write(INTEGERS)
        file.flush()
        output = subprocess.run(
            [sys.executable, file.name], env=environment, capture_output=True, text=True, check=True
        ).stdout
    signature = {"x_ptr": "*bf16", "one": "constexpr", "odd": "i32", "even": "i32", "long": "i64", "B": "constexpr"}
    assert output.strip() == f"{signature} { ({(1,): 1, (5,): 4}) } {[0, 3, 4]}"


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

class Fatal:
    arg_names = ["x_ptr", "B"]

    @property
    def signature(self):
        os._exit(1)

def compile_cases(arch):
    yield CompileCase.of("copy", copy, {"x_ptr": "*bf16"}, {}, {"B": 64}, tensor_cores=False)
    yield CompileCase.of("no product", copy, {"x_ptr": "*bf16"}, {}, {"B": 64})
    yield CompileCase.of("wrong", wrong, {"x_ptr": "*bf16"}, {}, {"B": 64})
    yield CompileCase.of("fatal", Fatal(), {"x_ptr": "*bf16"}, {}, {"B": 64})
    yield CompileCase.of("after", copy, {"x_ptr": "*bf16"}, {}, {"B": 32}, tensor_cores=False)
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
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["triton"] == triton.__version__
    [found] = written["reports"]
    assert (found["module"], found["arch"], found["faults"]) == ("pointwise_cases", 90, [])
    with pytest.raises(SystemExit):
        run("found.txt")
    assert "must end in .json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "damaged.json"], "damaged.json, which holds no reports of a compile check."),
        (["--out", "damaged.json/found.json"], "The folder damaged.json cannot be written to"),
        (["--processes", "0"], "0 is not an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_compiled(
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("damaged.json").write_text('{"triton"')
    monkeypatch.setattr(compile_check, "jobs_of", lambda *_: [("module", "name", 90)])
    monkeypatch.setattr(compile_check, "reports_of", lambda *_: pytest.fail("something is compiled"))
    monkeypatch.setattr(sys, "argv", ["compile_check", *arguments])
    with pytest.raises(SystemExit):
        compile_check.main()
    assert sentence in capsys.readouterr().err


def test_a_filter_that_no_case_meets_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["compile_check", "--arch", "89", "--only", "no such case"])
    with pytest.raises(SystemExit):
        compile_check.main()
    assert "--only no such case is in the module and name of no case" in capsys.readouterr().err


def test_the_summary_has_a_line_for_each_module_and_architecture() -> None:
    report = Report("module", "a case", 90, 4, 3, 128, 0, 96 * 1024, 2, ["wgmma.mma_async"])
    reports = [report, replace(report, registers=90, faults=["spills 8 bytes"]), replace(report, arch=80)]
    assert compile_check.summary(reports).splitlines() == [
        "module, sm_80: 1 compilations, 0 with faults, at most 128 registers and 96 KB.",
        "module, sm_90: 2 compilations, 1 with faults, at most 128 registers and 96 KB.",
        f"Triton {triton.__version__}: 3 compilations, 1 with faults.",
    ]


LOOP = """
.L_x_0:
        /*0010*/                   UTMALDG.4D [UR8], [UR4] ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0040*/                   {barrier}
        /*0050*/              @!P0 BRA `(.L_x_0) ;
        /*0060*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0070*/                   STS.128 [R3], R4 ;
        /*0080*/                   EXIT ;
"""


def test_a_refill_without_a_barrier_after_the_wait_is_found_through_the_branch() -> None:
    barrier, other = "BAR.SYNC.DEFER_BLOCKING 0x0 ;", "NOP ;"
    assert unguarded_refills(LOOP.format(barrier=barrier)) == []
    assert unguarded_refills(LOOP.format(barrier=other)) == ["UTMALDG.4D [UR8], [UR4]"]
    without_loop = LOOP.format(barrier=other).replace("BRA", "NOP")
    assert unguarded_refills(without_loop) == []
    assert unguarded_refills(without_loop.replace(barrier, other)) == ["STS.128 [R3], R4"]


def test_reports_of_unchanged_sources_are_taken_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    arguments = ["compile_check", "--arch", "90", "--only", "mask minus=1 bf16", "--processes", "1", "--out", str(file)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert compile_check.main() == 0
    written = json.loads(file.read_text())
    [found] = written["reports"]
    found["registers"] = 7
    file.write_text(json.dumps(written))
    assert compile_check.main() == 0
    assert "7 registers" in capsys.readouterr().out
    written["reports"][0]["source"] = "of another kernel"
    file.write_text(json.dumps(written))
    assert compile_check.main() == 0
    assert json.loads(file.read_text())["reports"][0]["registers"] not in (0, 7)


@pytest.mark.parametrize("file", sorted(Path("bench/results").glob("compile_*.json")), ids=lambda file: file.stem)
def test_the_committed_reports_are_without_fault(file: Path) -> None:
    written = json.loads(file.read_text())
    assert file.name == f"compile_triton-{written['triton']}.json"
    assert {80, 90} <= {report["arch"] for report in written["reports"]} <= set(compile_check.ARCHS)
    assert [report["name"] for report in written["reports"] if report["faults"]] == []
