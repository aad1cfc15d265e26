"""Work in a child process, so that a kernel that crashes, hangs or breaks the GPU's context ends that process alone.

After an illegal memory access every further CUDA call of a process fails. Measurements on a GPU therefore run in a
child process. `survivors` starts a new one when it is lost, and leaves out the item that the child announced last.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch

from sdnet.train.errors import UserError

R = TypeVar("R")

PATIENCE = 300.0
"""Seconds of silence after which a child counts as hanging. Compiling a whole network takes minutes of silence."""

PARENT: Connection | None = None
"""In a child, the connection to its parent."""

ANNOUNCED = ""
"""The last announcement of this process."""


class WorkerError(Exception):
    """Work ended early, by an exception or with its process.

    Attributes:
        announced: The argument of the work's last call of `announce`, "" if there was none.
    """

    def __init__(self, reason: str, announced: str) -> None:
        super().__init__(reason)
        self.announced = announced


class Loss(NamedTuple):
    """The items that were left out because the work ended early, and why it did."""

    items: list[Any]
    reason: str


class Worker:
    """Runs work in this process or in a child process, which is started when it is first needed.

    Args:
        isolated: use a child process.
        patience: seconds of silence after which the child is killed.
    """

    def __init__(self, isolated: bool, patience: float = PATIENCE) -> None:
        self.isolated, self.patience = isolated, patience
        self.child: BaseProcess | None = None
        self.connection: Connection | None = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, work: Callable[..., Iterator[R]], *arguments: Any) -> Iterator[R]:
        """Yield what `work(*arguments)` yields.

        In a child process, `work` must be a function of a module, and arguments and results must pickle.

        Raises:
            UserError: The work raised it. WorkerError: The work raised another exception, or the child crashed or hung.
            The next call starts a new one.
        """
        if not self.isolated:
            announce("")
            try:
                yield from work(*arguments)
            except (UserError, WorkerError):
                raise
            except Exception as error:
                raise WorkerError(one_line(error), ANNOUNCED) from error
            return
        announced, finished = "", False
        try:
            connection = self._connection()
            connection.send((work, arguments))
            while not finished:
                if not connection.poll(self.patience):
                    raise WorkerError(f"it was silent for {self.patience:.0f} seconds", announced)
                kind, value = connection.recv()
                if kind == "announced":
                    announced = value
                elif kind == "yielded":
                    yield value
                elif kind == "raised":
                    raise value if isinstance(value, UserError) else WorkerError(value, announced)
                finished = kind == "finished"
        except (EOFError, OSError):
            raise WorkerError(f"its process ended {self._status()}", announced) from None
        finally:
            if not finished:
                self.close(grace=0)

    def close(self, grace: float = 5.0) -> None:
        """End the child: an idle one ends when the connection closes, any other is killed after `grace` seconds."""
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


def survivors(
    worker: Worker, work: Callable[..., Iterator[R]], items: Sequence[Any], *arguments: Any
) -> Iterator[R | Loss]:
    """Yield what `work(items, *arguments)` yields; if it ends early, run it again without the item to blame.

    The item to blame is the one whose `str` was announced last. If it is none of them, all items are left out. A
    repeated run may yield results again that an earlier one has yielded.

    Args:
        worker: where the work runs.
        work: a generator function of the items and the other arguments.
        items: what is measured.
        arguments: the other arguments of `work`.
    """
    left = list(items)
    while left:
        try:
            yield from worker.run(work, left, *arguments)
            return
        except WorkerError as error:
            lost = [item for item in left if str(item) == error.announced] or left
            print(f"Lost {'; '.join(map(str, lost))}: {error}", flush=True)
            yield Loss(lost, str(error))
            left = [item for item in left if item not in lost]


def prepare() -> None:
    """Set what every process that measures needs: cuDNN chooses its algorithms by timing them."""
    torch.backends.cudnn.benchmark = True


def serve(parent: Connection, pid: int) -> None:
    """Run as the child: do the work that arrives, until it raises or the parent process `pid` is gone."""
    global PARENT
    PARENT = parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=exit_without, args=(pid,), daemon=True).start()
    prepare()
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
            parent.send(("raised", error if isinstance(error, UserError) else one_line(error)))
            return


def exit_without(pid: int) -> None:
    """End this process when its parent process `pid` is gone, even while it is busy."""
    while os.getppid() == pid:
        time.sleep(1)
    os._exit(1)


def announce(name: str) -> None:
    """Note what is about to run, "" for nothing in particular, and tell the parent process if there is one."""
    global ANNOUNCED
    ANNOUNCED = name
    if PARENT is not None:
        PARENT.send(("announced", name))


def announced(name: str, call: Callable[[], R]) -> Callable[[], R]:
    """Return the call, preceded by an announcement of `name`."""

    def announced_call() -> R:
        announce(name)
        return call()

    return announced_call


def one_line(error: BaseException) -> str:
    """Return an exception as one line of text."""
    return f"it raised {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def wait_for(device: torch.device) -> None:
    """Wait for the device; raise the error of a broken context, from which this process cannot recover."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
