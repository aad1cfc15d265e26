"""What the children of test_isolation do: functions that another process can import."""

import os
import time
from collections.abc import Iterator

from sdnet.bench.isolation import trying
from sdnet.train.errors import UserError


def count(to: int) -> Iterator[tuple[int, int]]:
    """Numbers, each with the process that it comes from."""
    for number in range(to):
        yield number, os.getpid()


def fail(how: str) -> Iterator[str]:
    """One word, then the end."""
    trying("the first")
    yield "begun"
    trying(how)
    if how == "exit":
        os._exit(7)
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(600)
    if how == "sentence":
        raise UserError("No such model.")
    raise ValueError("no\nsuch luck")
