"""The stages of `gpu-check` end in time, keep their results, and report their outcomes."""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import gpu_calls, gpu_check, measure_training
from sdnet.bench.gpu_parts import NEEDED, Stage, numbers_of
from sdnet.bench.ledger import read
from sdnet.kernels.qualify import __main__ as qualify

from ..triton_interpreter.numerics import needs_interpreter

PASSES = ["timeit", "-n", "1", "-r", "1", "pass"]
FAILS = ["timeit", "-n", "1", "-r", "1", "raise SystemExit('planted failure')"]


def hanging(note: Path, ignores_sigint: bool) -> list[str]:
    """Return a command that starts a process, writes its number into a file, and waits."""
    lines = [
        "import pathlib, signal, subprocess, sys, time",
        "signal.signal(signal.SIGINT, signal.SIG_IGN)" if ignores_sigint else "pass",
        "other = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])",
        f"pathlib.Path({str(note)!r}).write_text(str(other.pid))",
        "time.sleep(600)",
    ]
    return ["timeit", "-n", "1", "-r", "1", *lines]


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that only `gpu_check` itself sees, not its stages."""
    facts = gpu_check.describe_environment(torch.device("cpu"))
    monkeypatch.setattr(gpu_check, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(gpu_check, "describe_environment", lambda _: facts)


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.usefixtures("fake_gpu")
def test_all_stages_run_and_report_their_outcomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def recorded(stage: Stage, out: Path, limit: float) -> dict[str, object]:
        summary = out / "summary.json"
        seen.append(list(json.loads(summary.read_text())["stages"]) if summary.exists() else [])
        return run_stage(stage, out, limit)

    run_stage = gpu_check.run_stage
    monkeypatch.setattr(gpu_check, "run_stage", recorded)
    planted = [Stage("good", PASSES, 30), Stage("bad", FAILS, 30), Stage("late", PASSES, 40)]
    monkeypatch.setattr(gpu_check, "stages", lambda _: planted)
    status = front.main(["gpu-check", "--out", str(tmp_path), "--seconds", "60"])
    assert status == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["environment"]["packages"]["torch"] == torch.__version__
    assert {name: result["outcome"] for name, result in summary["stages"].items()} == {
        "good": "passed",
        "bad": "failed with status 1",
        "late": "skipped, no time left",
    }
    assert seen == [[], ["good"], ["good", "bad"]]
    assert (tmp_path / "report.md").read_text().startswith("# Measured")
    assert "planted failure" in capsys.readouterr().out


@pytest.mark.parametrize("ignores_sigint", [False, True])
def test_a_hanging_stage_is_ended_with_its_child_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignores_sigint: bool
) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    note = tmp_path / "pid"
    begin = time.perf_counter()
    result = gpu_check.run_stage(Stage("hangs", hanging(note, ignores_sigint), 3), tmp_path, 3)
    assert result["outcome"] == "ended by its time limit"
    assert time.perf_counter() - begin < 10
    pid = int(note.read_text())
    for _ in range(50):
        if not alive(pid):
            break
        time.sleep(0.1)
    else:
        os.kill(pid, signal.SIGKILL)
        pytest.fail("a child process of the stage still runs")


def test_stages_fit_into_their_time_and_get_budgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = gpu_check.stages(tmp_path)
    spent = sum(stage.limit + gpu_check.GRACE for stage in known[:NEEDED])
    assert spent + gpu_check.REPORT <= gpu_check.SECONDS <= 890
    for stage in known:
        assert not stage.spare or stage.limit - stage.spare >= 25
    train = next(stage for stage in known if stage.name == "train")
    assert train.within(100)[-2:] == ["--budget", "50"]
    assert train.within(20)[-2:] == ["--budget", "0"]
    tests = next(stage for stage in known if stage.name == "tests")
    assert tests.within(20) == tests.command
    assert {Path(word).name for word in tests.command if word.endswith(".py")} >= {"test_gpu.py", "test_correlation.py"}


def test_the_stages_come_in_the_order_of_business(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sanitizers, tests, verdicts, training with these verdicts, Nsight Compute; the dry run prints it."""
    assert front.main(["gpu-check", "--out", str(tmp_path / "none"), "--dry-run"]) == 0
    printed = capsys.readouterr().out.splitlines()
    order = ["memcheck", "racecheck", "tests", *["qualify"] * 4, "train", "ncu", "tiles", "kernels", "train_more"]
    assert [line.split()[1].split("_sdnet")[0].rstrip(",") for line in printed] == order
    assert not (tmp_path / "none").exists()
    assert front.main(["gpu-check", "--out", "my folder", "--stage", "train", "--dry-run"]) == 0
    assert "my folder" in shlex.split(capsys.readouterr().out), "a printed command can be pasted into a shell"
    qualified = [line for line in printed if line.split()[1].startswith("qualify")]
    assert [("sdnet18_all" in line, "--image-size 32 --batch 512" in line) for line in qualified] == [
        (True, False),
        (False, False),
        (True, True),
        (False, True),
    ]
    assert ": PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer " in printed[0], "else tensors lie in larger blocks"


def test_networks_are_trained_as_they_were_qualified(tmp_path: Path) -> None:
    """A verdict is one for a type, a memory format, an image size and a batch."""
    qualified: set[tuple[object, ...]] = set()
    for stage in gpu_check.stages(tmp_path):
        if stage.command[0] == "sdnet.kernels.qualify":
            found = qualify.options_of(stage.command[1:])
            qualified |= {(found.model, found.image_size, found.batch, dtype, found.layout) for dtype in found.dtype}
        elif stage.command[:2] == ["sdnet.bench", "train"]:
            parser = argparse.ArgumentParser()
            measure_training.add_arguments(parser)
            options = parser.parse_args(stage.command[2:])
            (size,), (batch,) = options.image_size, options.batch
            for item in measure_training.chosen(options, torch.device("cuda"), batch, size):
                trained = (item.model, size, batch, item.dtype, item.layout)
                assert trained in qualified or not item.model.startswith("sdnet"), stage.name


@pytest.mark.usefixtures("fake_gpu")
def test_every_stage_leaves_a_row_and_a_missing_tool_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = ("no-such-tool", "--tool")
    reads = ["timeit", "-n", "1", "-r", "1", "import os; assert os.environ['SET'] + os.environ['ADDED'] == '1a=b'"]
    planted = [
        Stage("memcheck", PASSES, 30, tool=tool),
        Stage("good", reads, 30, tool=("env", "SET=1"), variables=("ADDED=a=b",)),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda _: planted)
    (tmp_path / "memcheck.log").write_text("========= ERROR SUMMARY: 3 errors\n")  # of an earlier check
    assert front.main(["gpu-check", "--out", str(tmp_path)]) == 1
    rows = {row.provider: row for _, row in read(tmp_path)}
    assert not rows["memcheck"].metrics
    assert (rows["memcheck"].status, rows["memcheck"].reason) == ("skipped", "skipped, no-such-tool is not installed")
    assert (rows["good"].theme, rows["good"].status) == ("gpu", "ok")
    assert "| good | passed |" in (tmp_path / "report.md").read_text()


def test_numbers_are_read_from_what_the_tools_print(tmp_path: Path) -> None:
    assert numbers_of("memcheck", tmp_path, "========= ERROR SUMMARY: 3 errors\n") == {"errors": 3}
    racecheck = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
    assert numbers_of("racecheck", tmp_path, racecheck) == {"errors": 0}
    assert numbers_of("memcheck", tmp_path, "killed") == {}
    suite = '<testsuites><testsuite tests="9" failures="2" errors="0" skipped="1"/></testsuites>'
    (tmp_path / "tests.xml").write_text(suite)
    assert numbers_of("tests", tmp_path, "") == {"tests": 9, "failures": 2, "errors": 0, "skipped": 1}
    (tmp_path / "tests.xml").write_text(suite[:30])  # pytest was killed
    assert numbers_of("tests", tmp_path, "") == {}
    log = (
        '==PROF== Connected\n"ID","Kernel Name","Grid Size","Metric Name","Metric Unit","Metric Value"\n'
        '"0","synthesis_kernel(void *)","(64, 1, 1)","lts__t_bytes.sum","byte","1,000"\n'
        '"1","synthesis_kernel(void *)","(64, 1, 1)","lts__t_bytes.sum","byte","3000"\n'
        '"2","synthesis_kernel(void *)","(8, 2, 1)","lts__t_bytes.sum","byte","500"\n'
    )
    assert numbers_of("ncu", tmp_path, log) == {
        "synthesis_kernel (64,1,1) lts__t_bytes.sum [byte]": 2000,
        "synthesis_kernel (8,2,1) lts__t_bytes.sum [byte]": 500,
    }


BLOCKED = ("accelerate", "rich", "tyro", "nvidia.dali", "PIL", "safetensors", "tensorboard", "matplotlib", "pandas")


def test_the_stages_need_none_of_the_packages_for_training() -> None:
    """A GPU machine may have PyTorch, Triton, einops, NumPy and pytest alone."""
    modules = ["bench.gpu_check", "bench.gpu_calls", "bench.measure_training", "bench.measure_kernels"]
    modules += ["kernels.qualify.__main__", "kernels.qualify.child", "models"]
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))\n" + "\n".join(
        f"import sdnet.{module}" for module in modules
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_interpreter
def test_the_calls_of_the_sanitizer_run_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, on small layers: the program that compute-sanitizer watches ends with finite gradients."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as it was when Triton was imported
    monkeypatch.setattr(gpu_calls, "SMALL", (("3->8 3x3/2 @ 4", "", "fused"), ("16@2", "", "cudnn")))
    monkeypatch.setattr(gpu_calls, "UPDATED", ("3->8 3x3/2 @ 4", "9@2"))
    assert gpu_calls.main(["--device", "cpu", "--batch", "2", "--layer", "9@2"]) == 0
    assert gpu_calls.main(["--device", "cpu", "--batch", "2"]) == 0
    assert str(gpu_calls.parsed("64->128 3x3/2 @ 56")) == "64->128 3x3/2 @ 56x56"
    with pytest.raises(argparse.ArgumentTypeError, match="64x56 is no layer"):
        gpu_calls.parsed("64x56")


def test_the_commands_of_the_stages_have_known_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in gpu_check.stages(tmp_path):
        if stage.command[0] == "sdnet.kernels.qualify":
            found = qualify.options_of(stage.within(stage.limit)[1:])
            assert (found.budget, found.cache) == (stage.limit - stage.spare, tmp_path / "verdicts")
        if stage.command[0] == "sdnet.bench":
            module = front.module_of(stage.command[1])
            monkeypatch.setattr(module, "run", lambda options: int(options.budget))
            assert front.main(stage.within(stage.limit)[1:]) == stage.limit - stage.spare


@pytest.mark.usefixtures("fake_gpu")
def test_a_broken_ledger_prevents_the_report_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kernels.jsonl").write_text("{")
    monkeypatch.setattr(gpu_check, "stages", lambda _: [Stage("good", PASSES, 30)])
    assert front.main(["gpu-check", "--out", str(tmp_path)]) == 0
    assert "No report: UserError" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["stages"]["good"]["outcome"] == "passed"


@pytest.mark.usefixtures("fake_gpu")
def test_unknown_stages_get_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["gpu-check", "--out", str(tmp_path), "--stage", "profile"]) == 2
    assert "must be one of memcheck, racecheck, tests" in capsys.readouterr().err


def test_an_interruption_ends_the_stage(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import sys, pathlib; from sdnet.bench.gpu_check import Stage, run_stage; "
        "run_stage(Stage('hangs', sys.argv[2:], 60), pathlib.Path(sys.argv[1]), 60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *hanging(note, False)])
    for _ in range(300):
        if note.is_file() and note.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(20)
    pid = int(note.read_text())
    for _ in range(50):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("a child process of the stage still runs")
