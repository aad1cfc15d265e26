"""Workers take the tests in any order, many in one process: each must leave its process as it found it."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Pytest's own, and where torch.compile notes its cache and its addresses.
FREE = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_")


def switches() -> dict[str, Any]:
    """What holds for a whole process, and so for its next test."""
    accelerate: Any = sys.modules.get("accelerate.state")
    cudnn: Any = torch.backends.cudnn
    return {
        "environment": {name: value for name, value in os.environ.items() if not name.startswith(FREE)},
        "working directory": os.getcwd(),
        "an accelerator": bool(accelerate and accelerate.AcceleratorState._shared_state),
        "default dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "precision of convolutions": cudnn.conv.fp32_precision,
        "cuDNN's benchmark": cudnn.benchmark,
    }


@pytest.fixture(autouse=True)
def process_left_as_found() -> Iterator[None]:
    before = switches()
    yield
    assert switches() == before
