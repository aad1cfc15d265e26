"""Benchmarks refuse to run under Triton's interpreter, which the kernels' tests ask for in the same process."""

import pytest


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
