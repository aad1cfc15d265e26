"""Fixtures for the tests of the qualification: calls, a machine, and a process state of its own."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sdnet.kernels.qualify import job, quarantine
from sdnet.kernels.qualify.key import Call, machine_of
from sdnet.kernels.qualify.verdicts import Store

CALL = Call(6, 8, (1, 1), (1, 1), (0, 0), (4, 4), 2, "float32", channels_last=True)
"""A small call: a 1x1 dictionary on images of 4 x 4 pixels."""

CPU = torch.device("cpu")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[job.State]:
    """What a fresh process knows, with tables in a folder of its own."""
    fresh = job.State(Store(tmp_path))
    monkeypatch.setattr(job, "STATE", fresh)
    monkeypatch.setattr(quarantine, "KEYS", {})
    job.say_that_none_is_there.cache_clear()
    yield fresh
    quarantine.OBSTACLES.clear()


@pytest.fixture
def machine() -> dict[str, object]:
    """The facts of this machine."""
    return machine_of(CPU)
