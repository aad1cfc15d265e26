"""A lock between processes, for tests that need much of a GPU's memory. It needs neither a GPU nor PyTorch."""

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_for_one() -> Iterator[None]:
    """Within, no other process is here: tests beside each other would ask for more memory than a GPU has."""
    with Path(tempfile.gettempdir(), f"sdnet-gpu-tests-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
