"""The real child process, with planted candidates and a stand-in clock; Triton's interpreter is its device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdnet.kernels.qualify import parent
from sdnet.kernels.qualify.child import Job
from sdnet.kernels.qualify.key import Flags, Update, machine_of
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, Store

from .conftest import CALL, CPU

PLANTED = [sys.executable, str(Path(__file__).with_name("planted_child.py"))]
QUICK, WRONG, SLOW, BARELY, RAISES, CRASHES, HANGS = range(3, 10)
FLAGS = Flags.now()


def test_planted_candidates_get_the_verdicts_they_deserve(tmp_path: Path) -> None:
    calls = [CALL._replace(atoms=atoms) for atoms in (CRASHES, QUICK, WRONG, SLOW, BARELY, RAISES)]
    lines: list[str] = []
    outcome = parent.qualify(
        calls, "cpu", flags=FLAGS, store=Store(tmp_path), all_tiles=False, say=lines.append, command=PLANTED
    )
    found = {call.atoms: outcome.table[call.key(FLAGS)] for call in calls}
    assert found[CRASHES].path == TORCH
    assert found[CRASHES].reason == "PyTorch computes it, because fused ended its process by signal 11 (SIGSEGV)"
    assert found[QUICK].path.startswith('["fused"')
    assert found[QUICK].reason.startswith("fused was right and 1.50 times as fast as ")
    trials = {atoms: {trial.name: trial for trial in verdict.trials} for atoms, verdict in found.items()}
    assert trials[QUICK]["fused"].errors["d_weight"] < 1e-4
    assert (trials[QUICK]["fused"].launched_ms, trials[QUICK]["fused"].replayed_ms) == (2.0, 1.9)
    for atoms in (WRONG, SLOW, BARELY, RAISES):
        assert found[atoms].path in (TORCH, PLAIN)
    assert trials[WRONG]["fused"].fault.startswith("d_weight is off by 0.5, allowed is")
    assert trials[RAISES]["fused"].fault == "RuntimeError: PassManager::run failed"
    assert not trials[SLOW]["fused"].fault
    assert lines[0] == "Qualifying 6 of 6 on Triton's interpreter ..."
    assert "Qualifying 5 of 6 on Triton's interpreter ..." in lines
    assert outcome.machine == machine_of(CPU)


def test_a_child_ends_with_its_parent_even_while_it_is_busy() -> None:
    job = Job("cpu", FLAGS, (CALL._replace(atoms=HANGS), Update(())), all_tiles=False)
    with subprocess.Popen(PLANTED, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(job.encoded()) + "\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["facts"] == machine_of(CPU)
        child.stdin.write("[0]\n")
        child.stdin.flush()
        assert json.loads(child.stdout.readline())["event"] == "started"
        child.stdin.close()
        assert child.wait(timeout=60) == 1


def test_a_job_survives_json() -> None:
    job = Job(
        "cuda:1", FLAGS, (CALL, Update(((3, 8, (1, 1), (1, 1), (0, 0), (4, 4), True, False),))), False, 0.1, 9.0, 4.0
    )
    assert Job.decoded(json.loads(json.dumps(job.encoded()))) == job


@pytest.mark.slow
def test_the_whole_child_judges_a_call_and_an_update_by_its_own_clock(tmp_path: Path) -> None:
    update = Update(((3, 8, (1, 1), (1, 1), (0, 0), (4, 4), True, False),))
    outcome = parent.qualify(
        [CALL, update], "cpu", flags=FLAGS, store=Store(tmp_path), all_tiles=False, seconds=0.01, say=print
    )
    for key in (CALL.key(FLAGS), update.key(FLAGS)):
        verdict = outcome.table[key]
        assert verdict.path == TORCH  # the interpreter is slow
        assert not any(trial.fault for trial in verdict.trials)
        assert all(trial.launched_ms for trial in verdict.trials)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs compiled kernels, not interpreted ones")
def test_on_a_gpu_every_candidate_of_a_layer_is_right_and_timed(tmp_path: Path) -> None:
    call = CALL._replace(channels=64, atoms=64, kernel_size=(3, 3), padding=(1, 1), image_size=(28, 28), batch=64)
    half = call._replace(dtype="bfloat16")
    update = Update(((64, 64, (3, 3), (1, 1), (1, 1), (28, 28), True, False),))
    stem = half._replace(channels=3, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3))
    items = [half, half._replace(channels_last=False), call, stem, update]
    outcome = parent.qualify(items, "cuda", flags=FLAGS, store=Store(tmp_path), all_tiles=False, say=print)
    assert outcome.notes == ()
    for item in items:
        for trial in outcome.table[item.key(FLAGS)].trials:
            assert not trial.fault, trial.fault
            assert trial.launched_ms
            assert trial.replayed_ms or isinstance(item, Update)
    assert "padded" in [trial.name for trial in outcome.table[stem.key(FLAGS)].trials]
