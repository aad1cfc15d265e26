"""A child that raises, crashes or hangs is noticed, and what it was about is known."""

import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from sdnet.bench.isolation import LostError, Workshop
from sdnet.train.errors import UserError


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The functions that children can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return import_module("isolated_work")


@pytest.mark.slow
def test_a_child_works_until_it_is_lost_and_another_takes_over(work: ModuleType) -> None:
    with Workshop(apart=True) as workshop:
        first = list(workshop.run(work.count, 3))
        assert [number for number, _ in first] == [0, 1, 2]
        assert {pid for _, pid in first} == {pid for _, pid in workshop.run(work.count, 2)} != {os.getpid()}
        for how, reason in (("raise", "it raised ValueError: no"), ("exit", "status 7"), ("crash", "signal 6")):
            heard = workshop.run(work.fail, how)
            assert next(heard) == "begun"
            with pytest.raises(LostError, match=reason) as lost:
                next(heard)
            assert lost.value.tried == how
        with pytest.raises(UserError, match="No such model"):
            list(workshop.run(work.fail, "sentence"))
        assert [number for number, _ in workshop.run(work.count, 1)] == [0]


def test_a_child_that_says_nothing_is_ended(work: ModuleType) -> None:
    with Workshop(apart=True, patience=100) as workshop:
        heard = workshop.run(work.fail, "hang")
        assert next(heard) == "begun"
        workshop.patience = 0.1
        with pytest.raises(LostError, match="said nothing for 0 seconds") as lost:
            next(heard)
        assert lost.value.tried == "hang"
        assert workshop.child is None


def test_without_a_child_errors_are_what_they_are(work: ModuleType) -> None:
    with Workshop(apart=False) as workshop:
        assert list(workshop.run(work.count, 1)) == [(0, os.getpid())]
        with pytest.raises(ValueError, match="no"):
            list(workshop.run(work.fail, "raise"))
