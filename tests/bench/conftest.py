"""A benchmark owns its process, refuses the interpreter and sets switches; its tests share a process with others."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from torch.backends import cudnn


@pytest.fixture(autouse=True)
def as_if_alone() -> Iterator[None]:
    """No interpreter, and what a benchmark sets for itself ends with its test.

    Without `monkeypatch`, which is then made later and undone before: it must find the environment as it left it.
    """
    benchmark = cudnn.benchmark
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield
    cudnn.benchmark = benchmark
