"""The ledger checks its schema and writes complete lines."""

import argparse
import json
import os
import sys
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.bench.common_options import open_ledger, without_folders
from sdnet.bench.ledger import RESULTS, Ledger, Row, append, read
from sdnet.train.environment import describe_environment
from sdnet.train.errors import UserError

TIMES = {"p20": 1.0, "p50": 2.0, "p80": 3.0, "samples": 5}


def make_ledger(folder: Path) -> Ledger:
    facts = describe_environment(torch.device("cpu")) | {"command": "python -m sdnet.bench kernels"}
    return Ledger(folder, "kernels", facts)


def test_a_row_is_read_back_unchanged(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path)
    row = ledger.add("torch", "forward", {"batch": 2}, time_ms=TIMES, dtype="fp32", metrics={"gb_s": 1.5})
    ((path, found),) = read(tmp_path)
    assert (path, found) == (ledger.path, row)
    assert path.name.startswith("kernels_")
    assert found.environment["packages"]["torch"] == torch.__version__


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


@pytest.mark.parametrize("line", ["", "{", "[]", "\udcff", '{"theme": "kernels"}'])
def test_a_broken_line_is_named(tmp_path: Path, line: str) -> None:
    ledger = make_ledger(tmp_path)
    ledger.add("torch", "forward", {}, time_ms=TIMES)
    with ledger.path.open("ab") as file:
        file.write(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(UserError, match=r"jsonl, line 2, is not a row of the ledger"):
        list(read(tmp_path))


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


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no folder"):
        list(read(tmp_path / "results"))


def test_a_folder_that_cannot_be_made_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to: Not a directory"):
        make_ledger(tmp_path / "file" / "results").prepare()


def test_a_full_disk_leaves_the_earlier_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines.jsonl"
    append(path, "first\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:3]))
    with pytest.raises(UserError, match="the disk is full"):
        append(path, "second\n")
    assert path.read_text() == "first\n"


def test_rows_without_time_say_why(tmp_path: Path) -> None:
    row = make_ledger(tmp_path).add("fused", "forward", {}, status="unsupported", reason="no GPU")
    assert Row.from_line(row.to_line()) == row


def test_commands_are_recorded_with_the_variables_that_decide_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("SDNET_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SDNET_IMPL", "torch")
    monkeypatch.setenv("SDNET_CACHE", "/data/verdicts")
    monkeypatch.setattr(sys, "argv", ["sdnet.bench", "train"])
    _, ledger = open_ledger(argparse.Namespace(device="cpu", out=tmp_path, label=""), "train")
    command = "SDNET_CACHE=/.../verdicts SDNET_IMPL=torch python -m sdnet.bench train"
    assert ledger.environment["command"] == command


def test_commands_are_recorded_without_the_folders_of_this_machine() -> None:
    assert without_folders("/data/imagenet") == "/.../imagenet"
    assert without_folders("cifar=/data/cifar10") == "cifar=/.../cifar10"
    kept = ["--out", "runs/bench", "a=b"]
    assert [without_folders(argument) for argument in kept] == kept


def test_the_committed_ledger_can_be_read_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {row.theme for _, row in read(RESULTS)} >= {"kernels", "train", "load", "profile"}
