"""Settings of every test.

Tests run in any order, many in one process, so each must leave its process as it found it.

Without a GPU the Triton kernels run under Triton's interpreter, which has to be selected before Triton is imported.
With a GPU they are compiled, and the tests marked `gpu` run; set TRITON_INTERPRET=1 to interpret them there too.
"""

import importlib
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Kernels are interpreted or compiled as the variable says when they are imported. Some tests change it, so they are
# imported before the first test.
if importlib.util.find_spec("triton"):
    for module in ("loop", "step_sizes"):
        importlib.import_module(f"sdnet.kernels.triton_path.{module}")

# A program started by nohup or in the background of a script ignores these, and so would the programs of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Variables that pytest and torch.compile set themselves.
FREE = ("PYTEST_", "TORCHINDUCTOR_", "_TORCHINDUCTOR_")


def switches() -> dict[str, Any]:
    """Return the settings that hold for the whole process, and so for the next test."""
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
    """Fail a test that leaves a changed setting of the process behind."""
    before = switches()
    yield
    assert switches() == before


def pytest_itemcollected(item: pytest.Item) -> None:
    """Refuse a test whose name holds an address: it differs between the processes of pytest-xdist."""
    if " at 0x" in item.nodeid:
        raise pytest.UsageError(f"{item.nodeid} holds an address; give its parameters ids.")
