"""Fixtures for the tests of kernels: precision of products, poisoned memory, reads by descriptors."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture
def precision(request: pytest.FixtureRequest) -> Iterator[str]:
    """The precision of fp32 products for the time of a test."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = request.param
    yield request.param
    cudnn.conv.fp32_precision = before


@pytest.fixture
def exact() -> Iterator[None]:
    """Products of fp32 in fp32; those of the interpreter are in any case."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    if torch.cuda.is_available():
        cudnn.conv.fp32_precision = "ieee"
    yield
    cudnn.conv.fp32_precision = before


@pytest.fixture
def poisoned() -> Iterator[None]:
    """NaNs in memory that nobody has written yet."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def descriptor_reads(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Under the interpreter the rules choose as on sm_90: descriptors for batches of 64. What has been read by them."""
    from triton.runtime import interpreter

    from sdnet.kernels.triton_path import hardware

    reads: list[Any] = []
    handle: Any = interpreter.TensorDescHandle
    materialize = handle.materialize_pointers

    def noted(self: Any, offsets: Any) -> Any:
        reads.append(self)
        return materialize(self, offsets)

    monkeypatch.setattr(handle, "materialize_pointers", noted)
    monkeypatch.setattr(hardware, "arch_of", lambda _: 90)
    return reads
