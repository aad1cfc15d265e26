"""Signals that ask a program to stop, noted for its next safe point."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; schedulers and `kill`; a terminal that closes; Slurm's `--signal=USR1`."""

PATIENCE = 2.0
"""Seconds after which Ctrl-C means a second press, and not one press that a launcher passed on as well."""

LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed.run")
"""How the words of a launcher's command begin."""


class Interrupt:
    """Note the first of `SIGNALS` while this context manager is open.

    Later ones change nothing: schedulers and launchers often send a signal several times. Only a second Ctrl-C, at
    least `PATIENCE` seconds later, has its usual effect. A signal that the process ignores, such as SIGHUP under nohup,
    stays ignored.

    Attributes:
        signal: The number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._since = 0.0
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signal:
            self.signal, self._since = number, now
        elif number == signal.SIGINT and now - self._since >= PATIENCE:
            raise KeyboardInterrupt


def end_with_launcher() -> None:
    """Let this process receive SIGTERM when the launcher that has started it ends, on Linux.

    `accelerate launch` passes no signal on to a single process, and a killed torchrun leaves its processes behind:
    without this call the training would go on alone, and hold the GPU and the run folder. Where another program has
    started this process, nothing changes.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    try:
        command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return
    if any(os.path.basename(word).startswith(LAUNCHERS) for word in command[:4]):
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the call
            signal.raise_signal(signal.SIGTERM)
