"""The stages of `gpu-check` end in time, keep their results, and report their outcomes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sdnet.bench import __main__ as front
from sdnet.bench import gpu_check
from sdnet.bench.gpu_check import Stage

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
    *first, last = known
    spent = sum(stage.limit + gpu_check.GRACE for stage in first)
    assert spent + gpu_check.REPORT <= gpu_check.SECONDS <= 570
    assert last.limit >= gpu_check.LEAST
    for stage in known:
        assert not stage.spare or stage.limit - stage.spare >= 30
    train = next(stage for stage in known if stage.name == "train")
    assert train.within(100)[-2:] == ["--budget", "50"]
    assert train.within(20)[-2:] == ["--budget", "0"]
    tests = known[0]
    assert tests.within(20) == tests.command
    assert {Path(word).name for word in tests.command if word.endswith(".py")} >= {"test_gpu.py", "test_correlation.py"}


def test_the_commands_of_the_stages_have_known_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in gpu_check.stages(tmp_path):
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
    assert "must be one of tests, kernels, train" in capsys.readouterr().err


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
