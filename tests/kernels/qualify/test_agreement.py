"""One table for all processes of a job: ranks that are alike, that differ or are late, and two over gloo."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from sdnet.kernels.qualify import agreement
from sdnet.kernels.qualify.agreement import agreed
from sdnet.kernels.qualify.key import machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import TORCH, Verdict

MACHINE = machine_of(torch.device("cpu"))
TABLE = {"a": Verdict(TORCH, "a reason", date="2026-11-29T08:00:00+00:00")}
OUTCOME = Outcome(MACHINE, TABLE, ("A note.",))


def outcomes(machines: list[dict[str, Any]], qualify: Callable[[], Outcome], budget: float = 5.0) -> list[Outcome]:
    """Return what each rank gets; the ranks are threads of this process."""
    store, found = HashStore(), dict[int, Outcome]()

    def rank(number: int) -> None:
        found[number] = agreed(store, number, len(machines), qualify, lambda: machines[number], budget)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(machines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(machines))]


def test_ranks_that_are_alike_use_the_table_of_rank_0() -> None:
    found = outcomes([MACHINE] * 3, lambda: OUTCOME)
    assert found == [OUTCOME, OUTCOME._replace(notes=()), OUTCOME._replace(notes=())]


@pytest.mark.parametrize("fact", ["gpu", "driver", "kernels"])
def test_if_a_rank_differs_no_rank_uses_a_table(fact: str) -> None:
    found = outcomes([MACHINE, MACHINE, MACHINE | {fact: "another"}], lambda: OUTCOME)
    assert [outcome.table for outcome in found] == [{}, {}, {}]
    sentence = f"Rank 2 does not share the verdicts of rank 0 ({fact}: {MACHINE[fact]} and another): all ranks run"
    assert all(outcome.notes[-1].startswith(sentence) for outcome in found)


def test_a_rank_that_waits_too_long_goes_on_and_no_rank_uses_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "GRACE", 0.3)
    begun = threading.Event()

    def slow() -> Outcome:
        begun.wait(1.0)  # nobody sets it
        return OUTCOME

    first, second = outcomes([MACHINE, MACHINE], slow, budget=0.1)
    assert first.table == second.table == {}
    assert first.notes[-1].startswith("Rank 1 does not share the verdicts of rank 0 (it did not wait long enough)")
    assert second.notes[-1].startswith("Rank 1 waited 0 seconds for the verdicts of rank 0")


def test_an_error_of_rank_0_does_not_leave_the_others_waiting() -> None:
    def fail() -> Outcome:
        raise KeyboardInterrupt

    store = HashStore()
    with pytest.raises(KeyboardInterrupt):
        agreed(store, 0, 2, fail, lambda: MACHINE, 5.0)
    outcome = agreed(store, 1, 2, fail, lambda: MACHINE, 5.0)
    assert outcome.table == {}
    assert outcome.notes == ("Rank 0 could not qualify the kernels (KeyboardInterrupt).",)


def test_two_real_ranks_over_gloo(tmp_path: Path) -> None:
    """In the first agreement both have the same machine, in the second rank 1 has another one."""
    program = Path(__file__).with_name("agreeing_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(tmp_path), str(rank)], env=os.environ | {"TRITON_INTERPRET": "1"}
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["alike"] == second["alike"] == {"path": "torch", "reason": "scripted", "update": True}
    assert first["different"] == second["different"]
    assert first["different"]["path"] == "plain"
    assert first["different"]["update"] is False
    assert "Rank 1 does not share the verdicts of rank 0 (driver: " in first["different"]["reason"]
    assert first["qualified"] == 1  # by rank 0 alone
    assert second["qualified"] == 0
