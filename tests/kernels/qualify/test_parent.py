"""The parent of a qualification, over real processes: what it keeps of children that end, hang, or are killed.

The children of these tests follow a script, so that they need not import PyTorch; those of `test_child.py` are real.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.key import Flags, machine_of
from sdnet.kernels.qualify.parent import Outcome
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, Store, Verdict

from .conftest import CALL, CPU

HERE = Path(__file__).parent
FLAGS = Flags.now()
MACHINE = machine_of(CPU)


def command(script: dict[int, str], machine: dict[str, Any] | None = None) -> list[str]:
    return [sys.executable, "-S", str(HERE / "scripted_child.py"), json.dumps(machine or MACHINE), json.dumps(script)]


def qualify(script: dict[int, str], store: Store, lines: list[str] | None = None, **options: Any) -> Outcome:
    calls = [CALL._replace(atoms=atoms) for atoms in script]
    said = [] if lines is None else lines
    return parent.qualify(calls, "cpu", flags=FLAGS, store=store, say=said.append, command=command(script), **options)


def reasons(outcome: Outcome) -> dict[int, str]:
    keys = {CALL._replace(atoms=atoms).key(FLAGS): atoms for atoms in range(20)}
    return {keys[key]: verdict.reason for key, verdict in outcome.table.items()}


def test_verdicts_are_kept_one_by_one_and_not_found_out_again(tmp_path: Path) -> None:
    lines: list[str] = []
    outcome = qualify({1: "torch", 2: "torch"}, Store(tmp_path), lines)
    assert outcome.notes == ()
    assert lines[0] == "Qualifying 2 of 2 on Triton's interpreter ..."
    assert [line.split(" ")[0] for line in lines[1:]] == ["[1/2]", "[2/2]"]
    again = qualify({1: "killed", 2: "killed"}, Store(tmp_path), lines := [])
    assert again.table == outcome.table
    assert lines == []
    more = qualify({1: "killed", 2: "killed", 3: "torch"}, Store(tmp_path), lines := [])
    assert lines[0] == "Qualifying 1 of 3 on Triton's interpreter ..."
    assert set(reasons(more)) == {1, 2, 3}
    fresh = qualify({1: "torch", 2: "torch"}, Store(tmp_path), fresh=True)
    assert fresh.table != outcome.table


@pytest.mark.parametrize(
    ("action", "reason"),
    [
        ("killed", "PyTorch computes it, because fused ended its process by signal 9 (SIGKILL)"),
        ("exits", "PyTorch computes it, because fused ended its process with status 1 (the driver is too old)"),
        ("hangs", "PyTorch computes it, because fused took more than 1 seconds"),
        ("broken", "PyTorch computes it, because fused broke the GPU's context (AcceleratorError: an illegal memory"),
    ],
)
def test_an_item_that_ends_its_child_is_pytorch_s_and_the_others_go_on(
    action: str, reason: str, tmp_path: Path
) -> None:
    outcome = qualify({1: "torch", 2: action, 3: "torch"}, Store(tmp_path), silence=1)
    found = reasons(outcome)
    assert found[2].startswith(reason)
    first, third = (found[atoms].removeprefix("scripted ") for atoms in (1, 3))
    assert first != third  # another process
    assert Store(tmp_path).load(MACHINE)[CALL._replace(atoms=2).key(FLAGS)].path == TORCH
    assert outcome.notes == ()


def test_a_budget_of_nothing_starts_no_child_and_says_so(tmp_path: Path) -> None:
    outcome = qualify({1: "torch"}, Store(tmp_path), budget=0)
    assert outcome == Outcome(None, {}, ("The budget of 0 seconds was spent before the machine was known.",))


def test_a_child_that_starts_slowly_is_the_budget_s_fault(tmp_path: Path) -> None:
    slow = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    outcome = parent.qualify([CALL], "cpu", flags=FLAGS, store=Store(tmp_path), say=print, budget=0.3, command=slow)
    assert outcome == Outcome(None, {}, ("The budget of 0.3 seconds was spent before the machine was known.",))


def test_what_the_budget_does_not_reach_runs_on_pytorch_and_comes_first_the_next_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    outcome = qualify({1: "torch", 2: "hangs", 3: "torch"}, Store(tmp_path), budget=2)
    assert time.monotonic() - begin < 10
    assert reasons(outcome)[2].startswith("PyTorch computes it, because the budget of 2 seconds was spent")
    assert outcome.notes == ("The budget of 2 seconds was spent before 2 of 3 verdicts.",)
    assert len(Store(tmp_path).load(MACHINE)) == 1
    again = qualify({1: "killed", 2: "torch", 3: "torch"}, Store(tmp_path), lines := [])
    assert lines[0] == "Qualifying 2 of 3 on Triton's interpreter ..."
    assert again.notes == ()


def test_found_out_again_what_the_budget_does_not_reach_keeps_its_verdict(tmp_path: Path) -> None:
    before = qualify({1: "torch", 2: "torch"}, Store(tmp_path))
    again = qualify({1: "torch", 2: "hangs"}, Store(tmp_path), fresh=True, budget=2)
    first, second = (CALL._replace(atoms=atoms).key(FLAGS) for atoms in (1, 2))
    assert again.table[first] != before.table[first]
    assert again.table[second] == before.table[second]
    assert again.notes == ("The budget of 2 seconds was spent before 1 of 2 verdicts; 1 of these is kept as before.",)


def test_a_child_that_cannot_start_is_said_and_nothing_is_stored(tmp_path: Path) -> None:
    program = "import json, sys; print(json.dumps({'event': 'failed', 'reason': 'AcceleratorError: busy'}))"
    for child, reason in (
        (["-c", program], "AcceleratorError: busy"),
        (
            ["-c", "raise ImportError('no triton')"],
            "the child ended its process with status 1 (ImportError: no",
        ),
    ):
        outcome = parent.qualify(
            [CALL], "cpu", flags=FLAGS, store=Store(tmp_path), command=[sys.executable, "-S", *child], say=print
        )
        assert outcome.machine is None
        assert outcome.table == {}
        assert outcome.notes[0].startswith(f"The kernels could not be qualified: {reason}")
    assert not (tmp_path / "verdicts").exists()


PARENT = """
import sys
from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.key import Call
from sdnet.kernels.qualify.verdicts import Store
calls = [Call.decoded(values) for values in {calls}]
parent.qualify(calls, "cpu", store=Store({folder!r}), command={command})
"""


def test_a_killed_qualification_goes_on_where_it_was(tmp_path: Path) -> None:
    script = {1: "torch", 2: "hangs", 3: "torch"}
    calls = [CALL._replace(atoms=atoms).encoded() for atoms in script]
    program = PARENT.format(calls=calls, folder=str(tmp_path), command=command(script))
    running = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline().startswith("Qualifying 3 of 3")
    assert running.stdout.readline().startswith("[1/3]")
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert len(Store(tmp_path).load(MACHINE)) == 1
    running.stdout.read()  # until the child has ended too, as its input was closed
    running.stdout.close()
    lines: list[str] = []
    qualify({1: "torch", 2: "torch", 3: "torch"}, Store(tmp_path), lines)
    assert lines[0] == "Qualifying 2 of 3 on Triton's interpreter ..."
    assert len(Store(tmp_path).load(MACHINE)) == 3


def test_a_child_gets_no_variables_of_ranks_and_this_very_package(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK",
             "SLURM_PROCID", "SDNET_IMPL", "SDNET_TRITON_PATH", "ACCELERATE_MIXED_PRECISION"]  # fmt: skip
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    found = parent.environment()
    assert not set(names) & set(found)
    assert found["CUDA_VISIBLE_DEVICES"] == "3"
    package = Path(found["PYTHONPATH"].split(os.pathsep)[0], "sdnet", "kernels", "qualify", "parent.py")
    assert package.samefile(parent.__file__)


def test_the_parent_makes_no_cuda_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("the parent used the GPU"))
    qualify({1: "torch"}, Store(tmp_path))


def test_other_flags_are_other_items(tmp_path: Path) -> None:
    store = Store(tmp_path)
    qualify({1: "torch"}, store)
    lines: list[str] = []
    other = FLAGS._replace(benchmark=not FLAGS.benchmark)
    parent.qualify(
        [CALL._replace(atoms=1)], "cpu", flags=other, store=store, say=lines.append, command=command({1: "torch"})
    )
    assert lines[0] == "Qualifying 1 of 1 on Triton's interpreter ..."


def test_known_verdicts_are_returned_without_a_child(tmp_path: Path) -> None:
    store, key = Store(tmp_path), CALL.key(FLAGS)
    assert parent.known([CALL], MACHINE, FLAGS, store).table == {}
    store.add(MACHINE, {key: Verdict(PLAIN, "a reason"), "another": Verdict(TORCH, "a reason")})
    assert list(parent.known([CALL], MACHINE, FLAGS, store).table) == [key]
