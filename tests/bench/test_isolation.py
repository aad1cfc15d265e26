"""A child that raises, crashes or hangs is replaced, and the item that it announced last is left out."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from sdnet.bench.isolation import Loss, Worker, WorkerError, survivors
from sdnet.train.errors import UserError


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions that children can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return import_module("isolated_work")


def test_a_lost_child_is_named_and_replaced(work: ModuleType) -> None:
    with Worker(isolated=True) as worker:
        first = list(worker.run(work.count, 3))
        assert [number for number, _ in first] == [0, 1, 2]
        assert {pid for _, pid in first} == {pid for _, pid in worker.run(work.count, 2)} != {os.getpid()}
        for how, reason in (
            ("raise", "it raised ValueError: first line$"),
            ("exit", "status 7"),
            ("crash", "signal 6"),
        ):
            results = worker.run(work.fail, how)
            assert next(results) == "started"
            with pytest.raises(WorkerError, match=reason) as error:
                next(results)
            assert error.value.announced == how
        with pytest.raises(UserError, match="No such model"):
            list(worker.run(work.fail, "sentence"))
        assert [number for number, _ in worker.run(work.count, 1)] == [0]


def test_a_silent_child_is_killed(work: ModuleType) -> None:
    with Worker(isolated=True, patience=100) as worker:
        results = worker.run(work.fail, "hang")
        assert next(results) == "started"
        worker.patience = 0.1
        with pytest.raises(WorkerError, match="silent for 0 seconds") as error:
            next(results)
        assert error.value.announced == "hang"
        assert worker.child is None


def test_without_isolation_exceptions_count_as_losses(work: ModuleType) -> None:
    with Worker(isolated=False) as worker:
        assert list(worker.run(work.count, 1)) == [(0, os.getpid())]
        with pytest.raises(WorkerError, match=r"it raised ValueError: first line$") as error:
            list(worker.run(work.fail, "raise"))
        assert error.value.announced == "raise"
        with pytest.raises(UserError, match="No such model"):
            list(worker.run(work.fail, "sentence"))


def test_survivors_are_measured_without_the_item_that_crashes(work: ModuleType) -> None:
    with Worker(isolated=True) as worker:
        found = list(survivors(worker, work.square, [1, 2, 3], 2, True))
    assert found == [1, Loss([2], "its process ended by signal 6"), 1, 9]


def test_a_crash_without_an_announced_item_leaves_out_all(work: ModuleType) -> None:
    with Worker(isolated=True) as worker:
        found = list(survivors(worker, work.square, [1, 2, 3], 2, False))
    assert found == [1, Loss([1, 2, 3], "its process ended by signal 6")]
