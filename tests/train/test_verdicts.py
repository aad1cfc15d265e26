"""Which verdicts a run uses: found out, known, stored in its checkpoint, or none. The children are scripted."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.kernels.qualify import job, parent
from sdnet.kernels.qualify.key import Call, Flags, Update, machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, Store, Table, Verdict
from sdnet.train import verdicts
from sdnet.train.checkpoint import Checkpoint
from sdnet.train.errors import UserError
from sdnet.train.job import Job
from sdnet.train.recipes import CIFAR_RECIPES
from sdnet.train.run_folder import RunFolder
from sdnet.train.verdicts import Verdicts

CPU = torch.device("cpu")
MACHINE = machine_of(CPU)


@pytest.fixture
def request_of_run(tmp_path: Path) -> Job:
    recipe = replace(CIFAR_RECIPES["cifar_sdnet18"](), mixed_precision="no", batch=128, impl="auto")
    return Job(recipe, tmp_path, RunFolder(tmp_path / "run"))


@pytest.fixture
def on_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine with a GPU whose qualification is scripted: every item gets the path "plain"; what was asked for."""
    asked: list[dict[str, Any]] = []

    def qualify(items: Sequence[Call | Update], device: str, *, flags: Flags, **options: Any) -> Outcome:
        asked.append({"items": list(items), "device": device, "flags": flags, **options})
        return Outcome(MACHINE, {item.key(flags): Verdict(PLAIN, "a reason") for item in items})

    monkeypatch.setattr(parent, "qualify", qualify)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(verdicts, "obstacle_of", lambda *_: None)
    monkeypatch.setattr(verdicts, "machine_of", lambda _: MACHINE)
    monkeypatch.setattr(job, "STATE", job.State(Store(tmp_path / "cache")))
    monkeypatch.setenv("SDNET_CACHE", str(tmp_path / "cache"))
    for name in ("SDNET_IMPL", "SDNET_TRITON_PATH", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return asked


def found(request: Job) -> Verdicts:
    result = Verdicts()
    result.find(request)
    return result


def test_a_run_on_a_gpu_qualifies_its_layers_with_its_own_flags(
    request_of_run: Job, on_gpu: list[dict[str, Any]]
) -> None:
    result = found(request_of_run)
    (asked,) = on_gpu
    calls = [item for item in asked["items"] if isinstance(item, Call)]
    assert {call.batch for call in calls} == {128}
    assert isinstance(asked["items"][-1], Update)
    assert asked["flags"].benchmark == request_of_run.recipe.cudnn_benchmark
    assert (asked["device"], asked["fresh"], asked["budget"]) == ("cuda:0", False, 600.0)
    assert result.notes[-1].startswith("Kernels on Triton's interpreter: 0 of 1 kinds of CSC layers run on fused")
    assert job.STATE.of_job
    assert set(job.STATE.tables[next(iter(job.STATE.tables))]) == set(result.table)


def test_always_finds_out_again_and_never_takes_what_is_known(
    request_of_run: Job, on_gpu: list[dict[str, Any]]
) -> None:
    found(replace(request_of_run, qualify="always", qualify_seconds=30.0))
    assert on_gpu[0]["fresh"]
    assert on_gpu[0]["budget"] == 30.0
    known = found(request_of_run).table
    Store().add(MACHINE, known)
    on_gpu.clear()
    assert found(replace(request_of_run, qualify="never")).table == known
    assert on_gpu == []


@pytest.mark.parametrize(
    ("changed", "variable", "reason"),
    [
        ({"impl": "torch"}, None, "--impl torch decides which kernels run"),
        ({}, "SDNET_IMPL", "the environment variable SDNET_IMPL decides which kernels run"),
        ({}, "SDNET_TRITON_PATH", "the environment variable SDNET_TRITON_PATH decides which kernels run"),
    ],
)
def test_where_the_user_has_decided_nothing_is_qualified(
    changed: dict[str, Any],
    variable: str | None,
    reason: str,
    request_of_run: Job,
    on_gpu: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if variable:
        monkeypatch.setenv(variable, "cudnn")
    request = replace(request_of_run, recipe=replace(request_of_run.recipe, **changed))
    assert found(request).table == {}
    assert on_gpu == []
    with pytest.raises(UserError, match=f"--qualify always cannot be done: {reason}"):
        found(replace(request, qualify="always"))


def test_without_a_gpu_nothing_is_qualified(request_of_run: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("SDNET_IMPL", "SDNET_TRITON_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert found(request_of_run).notes == ()
    with pytest.raises(UserError, match="--qualify always cannot be done: torch finds no GPU"):
        found(replace(request_of_run, qualify="always"))


def store(request: Job, machine: dict[str, Any], table: Table) -> Job:
    """Write a checkpoint with verdicts, and return the request to go on from it."""
    part = Verdicts()
    part.machine, part.table = machine, table
    request.run.path.mkdir()
    Checkpoint("", {"verdicts": part.state_dict()}, [{}]).save(request.run.checkpoint_file)
    return replace(request, resume=True)


def test_a_resumed_run_uses_the_table_of_its_checkpoint(request_of_run: Job, on_gpu: list[dict[str, Any]]) -> None:
    table = {key: Verdict(TORCH, "from the checkpoint") for key in found(request_of_run).table}
    on_gpu.clear()
    result = found(store(request_of_run, MACHINE, table))
    assert on_gpu == []
    assert result.table == table
    assert not any("Changed" in note for note in result.notes)
    result.load_state_dict(json.loads(json.dumps(result.state_dict())))
    assert result.table == table


@pytest.mark.parametrize("why", ["another machine", "always"])
def test_a_changed_table_is_announced(why: str, request_of_run: Job, on_gpu: list[dict[str, Any]]) -> None:
    before = found(request_of_run).table
    table = {key: Verdict(TORCH, "from the checkpoint") for key in before}
    machine = MACHINE | {"driver": "another"} if why == "another machine" else MACHINE
    on_gpu.clear()
    request = store(request_of_run, machine, table)
    result = found(replace(request, qualify="always") if why == "always" else request)
    assert len(on_gpu) == 1
    assert result.table.keys() == before.keys()
    changed = [note for note in result.notes if note.startswith("Changed on resume: ")]
    assert len(changed) == len(before)
    assert changed[0].endswith("runs on cuDNN with pointwise Triton kernels, not on PyTorch as before.")


def test_a_table_with_the_tiles_of_another_version_is_left_out(
    request_of_run: Job, on_gpu: list[dict[str, Any]]
) -> None:
    table = {key: Verdict('["fused", {"block": 64}, {}, {}]', "older") for key in found(request_of_run).table}
    on_gpu.clear()
    result = found(store(request_of_run, MACHINE, table))
    assert len(on_gpu) == 1
    assert {verdict.path for verdict in result.table.values()} == {PLAIN}
    stored = Verdicts()
    stored.machine, stored.table = MACHINE, table
    result.load_state_dict(stored.state_dict())
    assert {verdict.path for verdict in result.table.values()} == {PLAIN}


def test_a_checkpoint_without_verdicts_is_no_hindrance(request_of_run: Job, on_gpu: list[dict[str, Any]]) -> None:
    request_of_run.run.path.mkdir()
    Checkpoint("", {}, [{}]).save(request_of_run.run.checkpoint_file)
    assert found(replace(request_of_run, resume=True)).table
    request_of_run.run.checkpoint_file.write_bytes(b"damaged")
    assert found(replace(request_of_run, resume=True)).table  # the trainer says what is wrong with it


def test_ranks_without_a_rendezvous_use_no_verdicts(
    request_of_run: Job, on_gpu: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    result = found(request_of_run)
    assert on_gpu == []
    assert result.table == {}
    assert result.notes[0].startswith("The launcher does not set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT")
    assert job.STATE.of_job


def test_two_processes_exchange_verdicts_before_they_make_a_group(tmp_path: Path) -> None:
    """The store of the verdicts and that of the process group share an address, as a launcher gives one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SDNET_")} | launched
    program = Path(__file__).with_name("verdict_ranks.py")
    processes = [
        subprocess.Popen([sys.executable, program, str(tmp_path)], env=environment | {"RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["table"] == second["table"]
    assert first["table"]
    assert [first["qualified"], second["qualified"]] == [1, 0]
    assert first["of_job"]
    assert second["of_job"]
    assert first["sum"] == second["sum"] == 3
