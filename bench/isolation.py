"""Work in a process of its own: a kernel that breaks the GPU's context, crashes or hangs costs that process alone.

After an illegal access every further call of a process fails, whoever makes it. So what is measured on a GPU runs in a
child, which is started anew when it is lost, and what it said last tells what to leave out then.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from sdnet.bench import environment
from sdnet.train.errors import UserError

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds without a word after which a child counts as hanging. A compiler of whole networks is silent for minutes."""

PARENT: Connection | None = None
"""In a child, the way to its parent."""


class LostError(Exception):
    """A child ended before its work did. `tried` is what it last said that it was about to try, "" for nothing."""

    def __init__(self, reason: str, tried: str) -> None:
        super().__init__(reason)
        self.tried = tried


class Workshop:
    """Where work is done: in this process, or `apart` in a child, which is started when first needed.

    Args:
        apart: whether to use a child.
        patience: seconds without a word after which the child is ended.
    """

    def __init__(self, apart: bool, patience: float = PATIENCE) -> None:
        self.apart, self.patience = apart, patience
        self.child: BaseProcess | None = None
        self.connection: Connection | None = None

    def __enter__(self) -> "Workshop":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, work: Callable[..., Iterator[T]], *arguments: Any) -> Iterator[T]:
        """What `work(*arguments)` yields, as it comes. Apart, `work` is a function of a module, and all is pickled.

        Raises:
            UserError: the work raised it.
            LostError: the child raised something else, crashed or hung. The next call starts another.
        """
        if not self.apart:
            yield from work(*arguments)
            return
        tried, finished = "", False
        try:
            connection = self._connection()
            connection.send((work, arguments))
            while not finished:
                if not connection.poll(self.patience):
                    raise LostError(f"it said nothing for {self.patience:.0f} seconds", tried)
                kind, value = connection.recv()
                if kind == "trying":
                    tried = value
                elif kind == "yielded":
                    yield value
                elif kind == "raised":
                    raise value if isinstance(value, UserError) else LostError(value, tried)
                finished = kind == "finished"
        except (EOFError, OSError):
            raise LostError(f"its process ended {self._status()}", tried) from None
        finally:
            if not finished:
                self.close(grace=0)

    def close(self, grace: float = 5.0) -> None:
        """End the child: one that waits for work ends by itself, when it is told that there is no more."""
        if self.connection is not None:
            self.connection.close()
        if self.child is not None:
            self.child.join(grace)
            self.child.kill()
            self.child.join()
        self.child = self.connection = None

    def _connection(self) -> Connection:
        if self.connection is None:
            # A fork would inherit a CUDA context that does not work there.
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.child = context.Process(target=serve, args=(theirs, os.getpid()))
            self.child.start()
            theirs.close()
        return self.connection

    def _status(self) -> str:
        assert self.child is not None
        self.child.join(10)
        code = self.child.exitcode or 0
        return f"by signal {-code}" if code < 0 else f"with status {code}"


def serve(parent: Connection, pid: int) -> None:
    """The child: do what comes, until something is raised or the parent is gone."""
    global PARENT
    PARENT = parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=end_with, args=(pid,), daemon=True).start()
    environment.prepare()
    while True:
        try:
            work, arguments = parent.recv()
        except EOFError:
            return
        try:
            for value in work(*arguments):
                parent.send(("yielded", value))
            parent.send(("finished", None))
        except Exception as error:
            parent.send(("raised", error if isinstance(error, UserError) else told(error)))
            return


def end_with(pid: int) -> None:
    """End this process when its parent has been killed, even while it is busy."""
    while os.getppid() == pid:
        time.sleep(1)
    os._exit(1)


def trying(name: str) -> None:
    """Say what is tried now, "" for nothing in particular: if the child is lost, this was it. In a parent nothing."""
    if PARENT is not None:
        PARENT.send(("trying", name))


def naming(name: str, call: Callable[[], T]) -> Callable[[], T]:
    """The call, saying each time that it is tried."""

    def named() -> T:
        trying(name)
        return call()

    return named


def told(error: BaseException) -> str:
    """An exception in one line."""
    return f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def check_context(device: torch.device) -> None:
    """Waits for the device; raises what it has failed with, from which there is no recovery in this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
