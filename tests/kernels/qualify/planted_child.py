"""The real child process with planted candidates: a call's number of atoms says what its fused candidate does.

The clock is a stand-in: times depend on the candidate and on the number of atoms. Where the fused candidate is to be
right or wrong, the kernels run under Triton's interpreter; elsewhere the torch path takes their place.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sdnet.kernels.qualify import child, compare
from sdnet.kernels.qualify.candidates import Candidate
from sdnet.kernels.qualify.verdicts import PLAIN, TORCH, Trial
from sdnet.kernels.triton_path.tiles import Shape

QUICK, WRONG, SLOW, BARELY, RAISES, CRASHES, HANGS = range(3, 10)

TIMES = {QUICK: (2.0, 1.9), WRONG: (1.0, 1.0), SLOW: (4.0, 4.0), BARELY: (2.9, 2.9)}
"""Milliseconds of the fused candidate, launched and replayed; PyTorch takes 3 of each."""

results_of, candidates_of = compare.results_of, child.candidates_of


def planted(path: str, inputs: compare.Inputs, keep_residuals: bool = False) -> compare.Results:
    atoms = inputs.weight.shape[0]
    if not path.startswith('["fused"'):
        return results_of(path, inputs, keep_residuals)
    if atoms == CRASHES:
        os.kill(os.getpid(), signal.SIGSEGV)
    if atoms == HANGS:
        sys.stdin.read()
    if atoms == RAISES:
        raise RuntimeError("PassManager::run failed")
    found = results_of(path if atoms in (QUICK, WRONG) else TORCH, inputs, keep_residuals)
    if atoms == WRONG:
        found["d_weight"] = found["d_weight"] * 1.5
    return found


def race(trials: Sequence[Trial], calls: dict[str, Any], seconds: float, device: torch.device) -> list[Trial]:
    del seconds, device
    timed = []
    for trial in trials:
        (call, *_) = calls[trial.path]
        atoms = call().shape[0]
        launched, replayed = TIMES.get(atoms, (3.0, 3.0)) if trial.path.startswith("[") else (3.0, 3.0)
        timed.append(replace(trial, launched_ms=launched, replayed_ms=replayed))
    return timed


def operator_call(inputs: compare.Inputs, path: str) -> Any:
    del path
    return lambda: inputs.weight


def few_candidates(shape: Shape, all_tiles: bool, processors: int, may_pad: bool) -> list[Candidate]:
    found = candidates_of(shape, all_tiles, processors, may_pad=False)
    return [candidate for candidate in found if candidate.path in (TORCH, PLAIN) or candidate.is_ours]


if __name__ == "__main__":
    compare.results_of, child.race, child.operator_call = planted, race, operator_call  # pyright: ignore
    child.candidates_of = few_candidates
    sys.exit(child.main())
