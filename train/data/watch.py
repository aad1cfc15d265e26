"""How far a long look at the data is, told to whoever listens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Listener = Callable[[str, int, int], None]
"""Takes what is done, how many images are done, and how many there are."""

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `tell` call a listener inside the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(task: str, done: int, total: int) -> None:
    """Tell the listener, if there is one, how far a task is.

    Args:
        task: What is done, such as "checking images".
        done: The number of images that are done.
        total: The number of images.
    """
    if listener := _listener.get():
        listener(task, done, total)
