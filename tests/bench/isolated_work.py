"""The work of the children in test_isolation: functions that another process can import."""

import os
import time
from collections.abc import Iterator, Sequence

from sdnet.bench.isolation import announce
from sdnet.train.errors import UserError


def count(to: int) -> Iterator[tuple[int, int]]:
    """Yield numbers, each with the process that it comes from."""
    for number in range(to):
        yield number, os.getpid()


def fail(how: str) -> Iterator[str]:
    """Yield one word, then end in the given way."""
    announce("the first")
    yield "started"
    announce(how)
    if how == "exit":
        os._exit(7)
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(600)
    if how == "sentence":
        raise UserError("No such model.")
    raise ValueError("first line\nsecond line")


def square(items: Sequence[int], fatal: int, announced: bool) -> Iterator[int]:
    """Yield the squares of the items; the fatal one aborts the process."""
    for item in items:
        announce(str(item) if announced else "")
        if item == fatal:
            os.abort()
        yield item**2
