"""Ctrl-C and SIGTERM, noted for a program that stops at its next safe point."""

import signal
from types import FrameType, TracebackType


class Interrupt:
    """Note the first SIGINT or SIGTERM while this context manager is open; a second one has its usual effect.

    Attributes:
        signal: The number of the signal, 0 before one came.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        self._former = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._former = {}
