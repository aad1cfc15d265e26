"""The lock of the tests that need much of a GPU's memory, between real processes."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from . import gpu_memory

CHILD = """
import runpy, sys, time
with runpy.run_path(sys.argv[1])["memory_for_one"]():
    print(time.monotonic(), flush=True)
    time.sleep(float(sys.argv[2]))
    print(time.monotonic(), flush=True)
"""


def process(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """Start a process that holds the lock for so many seconds, and prints when it got it and when it gave it back."""
    command = [sys.executable, "-c", CHILD, gpu_memory.__file__, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"TMPDIR": str(folder)})


def test_processes_hold_the_lock_one_after_another(tmp_path: Path) -> None:
    processes = [process(tmp_path, 0.3) for _ in range(3)]
    times = sorted(tuple(map(float, each.communicate(timeout=60)[0].split())) for each in processes)
    assert [each.returncode for each in processes] == [0, 0, 0]
    assert all(end <= start for (_, end), (start, _) in pairwise(times))


def test_a_process_that_dies_gives_the_lock_back(tmp_path: Path) -> None:
    with process(tmp_path, 600) as first, process(tmp_path, 0) as second:
        assert first.stdout is not None
        first.stdout.readline()  # one of the two has it: the first, or the second and then the first
        first.kill()
        assert len(second.communicate(timeout=60)[0].split()) == 2
        assert second.returncode == 0
