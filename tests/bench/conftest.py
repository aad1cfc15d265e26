"""A fixture for benchmarks, which set options of a process that their tests share with other tests."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from torch.backends import cudnn


@pytest.fixture(autouse=True)
def benchmark_process() -> Iterator[None]:
    """Turn Triton's interpreter off, and restore what a benchmark sets for its process.

    `monkeypatch` is not used, so that it is undone first and finds the environment as it left it.
    """
    benchmark = cudnn.benchmark
    with mock.patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield
    cudnn.benchmark = benchmark
