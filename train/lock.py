"""The lock on a folder: two programs that write into one folder would destroy both runs."""

import contextlib
import fcntl
import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path

from sdnet.train.errors import UserError

NAME = "run.lock"


class RunLock:
    """Held from `acquire` to `release`, or within a `with` block after `acquire`.

    The lock is one of the operating system on the file `run.lock`, so it ends with the process that holds it, however
    that process ends. The file says who holds it; one that a killed process left behind is taken over.

    Args:
        folder: The run folder. `acquire` makes it; `release` removes it again if nothing was written into it.
        title: What messages call the folder.
    """

    def __init__(self, folder: Path, title: str = "The run folder") -> None:
        self.folder, self.file, self._title = folder, folder / NAME, title
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: Another process holds it, or the folder cannot be written.
        """
        try:
            missing = [place for place in (self.folder, *self.folder.parents) if not place.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self._made = missing
            while self._descriptor is None:
                self._descriptor = self._try()
        except OSError as error:
            self.release()
            raise UserError(f"{self._title} {self.folder} cannot be locked: {error.strerror}.") from error
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)

    def release(self) -> None:
        """Give the lock back; without effect if it is not held."""
        if self._descriptor is not None:
            self.file.unlink(missing_ok=True)  # while it is held, so that nobody else's file is removed
            os.close(self._descriptor)
            self._descriptor = None
        with contextlib.suppress(OSError):  # not empty: there is a run
            for place in self._made:
                place.rmdir()
        self._made = []

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _try(self) -> int | None:
        """Return an open and locked file; None if it was removed meanwhile.

        Raises:
            UserError: Another process has locked it.
        """
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.file.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.file)):
                return descriptor
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
            os.close(descriptor)
            raise UserError(
                f"{self._title} {self.folder} is in use by {_describe(holder)}; wait until it has ended, or stop it "
                "with SIGTERM."
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None


def _describe(holder: str) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
