"""Launches on a GPU that is not there: what kept kernels are given, and how many kernels are compiled."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("launches_on_a_stub.py")


@cache
def results() -> Any:
    """Return what `launches_on_a_stub` prints, in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(PROGRAM.parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["stem", "cudnn", "descriptors", "pointers"])
def test_a_kept_kernel_gets_the_grid_and_the_arguments_that_triton_would_give_it(case: str) -> None:
    kept, searched = results()["both ways"][case]
    assert len(kept) == (8 if case == "cudnn" else 10)
    assert kept == searched


def test_a_kernel_is_kept_for_aligned_and_for_other_addresses() -> None:
    assert results()["misaligned"] == [1, 1, 0, 0]


def test_the_kernels_of_a_training_step_are_compiled_once() -> None:
    assert results()["224"] == {"launches": 179, "compilations": 68}
    assert results()["224 again"]["compilations"] == 0
    assert results()["32"] == {"launches": 169, "compilations": 35}  # those of stride 1 and 2 but for sizes are there


def test_a_partial_last_batch_compiles_nothing() -> None:
    for image_size in ("224", "32"):
        assert [step["compilations"] for step in results()[f"{image_size} partial"]] == [0] * len(
            results()[f"{image_size} partial"]
        )
