"""`margins` measures step size times largest eigenvalue after every optimizer step, and writes rows as it goes."""

from pathlib import Path

import pytest

from sdnet.bench import __main__ as front
from sdnet.bench.ledger import read


def test_a_row_holds_the_margins_of_its_steps(tmp_path: Path) -> None:
    arguments = ["--task", "dictionary", "--adam-lr", "1e-3", "--seed", "0", "--steps", "3", "--every", "2"]
    assert front.main(["margins", *arguments, "--out", str(tmp_path)]) == 0
    first, second = (row for _, row in read(tmp_path))
    assert [(row.settings["first_step"], row.settings["last_step"]) for row in (first, second)] == [(1, 2), (3, 3)]
    for row, steps in ((first, 2), (second, 1)):
        margins = row.settings["largest_margin_by_step"]
        assert len(margins) == len(row.settings["loss_by_step"]) == steps
        assert margins == pytest.approx([0.9] * steps, abs=0.05)
        assert row.metrics["largest_margin"] == pytest.approx(max(margins), abs=1e-4)
        assert row.metrics["steps_above_1"] == row.metrics["steps_above_4/3"] == 0
        assert row.time_ms is not None
        assert row.time_ms["samples"] == steps
        assert row.time_ms["p50"] < row.metrics["step_ms"]


def test_networks_need_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert front.main(["margins", "--task", "sdnet18", "--out", str(tmp_path)]) == 2
    assert "--data is missing: sdnet18 learns from pictures." in capsys.readouterr().err


def test_missing_pictures_are_named_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing"
    assert front.main(["margins", "--data", str(missing), "--out", str(tmp_path), "--device", "cpu"]) == 2
    assert f"The data folder {missing} does not exist." in capsys.readouterr().err
    assert not list(tmp_path.glob("*.jsonl"))
