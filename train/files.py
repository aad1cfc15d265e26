"""Writing files that are either whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a reader or a crash never meets half of it; if this fails, the old file stays.

    Args:
        path: The file.
        write: Called with the path of a temporary file beside it, which is then renamed.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
