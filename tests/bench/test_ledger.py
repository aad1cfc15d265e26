"""The ledger keeps its schema, and keeps lines whole."""

import json
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.bench import environment
from sdnet.bench.environment import describe, portable
from sdnet.bench.ledger import Ledger, Row, append, read
from sdnet.train.errors import UserError

TIMES = {"p20": 1.0, "p50": 2.0, "p80": 3.0, "samples": 5}


def make_ledger(folder: Path) -> Ledger:
    return Ledger(folder, "kernels", describe(torch.device("cpu")))


def test_a_row_survives_the_file(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    row = ledger.add("torch", "forward", {"batch": 2}, time_ms=TIMES, dtype="fp32", metrics={"gb_s": 1.5})
    ((path, found),) = read(tmp_path)
    assert (path, found) == (ledger.path, row)
    assert path.name.startswith("kernels_")
    facts = found.environment
    assert facts["command"].startswith("python -m sdnet.bench")
    assert facts["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"theme": "speed"}, "theme is 'speed'"),
        ({"status": "fine"}, "status is 'fine'"),
        ({"provider": ""}, "must not be empty"),
        ({"environment": {"device": "x"}}, "environment lacks device_type, driver"),
        ({"time_ms": None}, "positive and in order"),
        ({"time_ms": {"p20": 2.0, "p50": 1.0, "p80": 3.0}}, "positive and in order"),
        ({"time_ms": {"p20": 1.0, "p50": 1.0, "p80": float("nan")}}, "positive and in order"),
        ({"metrics": {"gb_s": "fast"}}, "metrics must be numbers"),
        ({"status": "refused", "reason": "wrong"}, "has a reason and no time"),
        ({"status": "refused", "time_ms": None}, "has a reason and no time"),
        ({"schema": 99}, "schema is 99"),
    ],
)
def test_broken_rows_are_not_written(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    row = make_ledger(tmp_path).add("torch", "forward", {}, time_ms=TIMES)
    with pytest.raises(ValueError, match=sentence):
        replace(row, **change).check()


@pytest.mark.parametrize("line", ["", "{", "[]", '{"theme": "kernels"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    ledger = make_ledger(tmp_path)
    ledger.add("torch", "forward", {}, time_ms=TIMES)
    append(ledger.path, line + "\n")
    with pytest.raises(UserError, match=r"jsonl, line 2, is no row of the ledger"):
        list(read(tmp_path))


def test_a_copy_without_a_checkout_is_told_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe(torch.device("cpu"))["commit"] != "abc123"
    monkeypatch.setenv("SDNET_COMMIT", "abc123")
    monkeypatch.setattr(environment, "git", lambda *_: None)
    facts = describe(torch.device("cpu"))
    assert (facts["commit"], facts["dirty"]) == ("abc123", None)


def write_many(path: Path, name: str) -> None:
    for _ in range(200):
        append(path, json.dumps(name * 2000) + "\n")


def test_writers_at_the_same_time_leave_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    writers = [get_context("fork").Process(target=write_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(lines) == ["a" * 2000] * 200 + ["b" * 2000] * 200


def test_rows_without_time_say_why(tmp_path: Path) -> None:
    row = make_ledger(tmp_path).add("triton", "forward", {}, status="unsupported", reason="no GPU")
    assert Row.from_line(row.to_line()) == row


def test_commands_are_noted_without_the_folders_of_this_machine() -> None:
    assert portable("/data/imagenet") == "/.../imagenet"
    assert portable("cifar=/data/cifar10") == "cifar=/.../cifar10"
    assert [portable(argument) for argument in ("--out", "runs/bench", "a=b")] == ["--out", "runs/bench", "a=b"]
