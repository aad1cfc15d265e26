"""Writing files that are either whole or absent."""

import contextlib
import os
import shutil
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from sdnet.kernels import checks


def checked_path(path: Any, name: str = "path", of: str = "a file") -> Path:
    """Return a path; raise a ValueError that names the argument if it is none."""
    if not isinstance(path, (str, PathLike)) or path == "":
        raise ValueError(f"{name} is {checks.shown(path)}; it must be the path of {of}.")
    return Path(path)


def checked_file(path: Any) -> Path:
    """Return the path of a file that can be written.

    Raises:
        ValueError: `path` is no path, or a folder.
        FileNotFoundError: the folder of the file does not exist.
    """
    file = checked_path(path)
    if os.path.isdir(file):
        raise ValueError(f"path is '{file}', a folder; it must be the path of a file.")
    if not os.path.isdir(file.parent):
        raise FileNotFoundError(f"There is no folder '{file.parent}' for the file '{file.name}'.")
    return file


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that no reader and no crash finds half of it; if this fails, the old file stays.

    Args:
        path: the file.
        write: called with the path of a temporary file beside it, which is then renamed.
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
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def link_atomically(source: Path, path: Path) -> None:
    """Give a file a second name, which replaces whatever has it; where a file system has no links, copy the file."""

    def link(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)

    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # after a kill; a link would not replace it
    write_atomically(path, link)


def remove_unfinished(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, so that a file that was renamed survives a loss of power."""
    with contextlib.suppress(OSError):  # some network file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
