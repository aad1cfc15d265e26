"""Reads the encoded images of coming batches while DALI works on the current one."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sdnet.train.data.folder import ImageSet
from sdnet.train.errors import DataError

READERS = 4  # threads that wait for the disk; they hardly use a core


class ReadAhead:
    """Call it with a step to get the batch of that step, a list of encoded images [bytes] uint8.

    DALI does not copy what it is given, so the batches that it may still work on are kept: `depth` batches that are
    queued and the one in work, before and after the current step.

    Args:
        images: The images to read.
        batches: The indices of the images of each step.
        depth: How many batches DALI asks for in advance.
    """

    def __init__(self, images: ImageSet, batches: Sequence[np.ndarray], depth: int) -> None:
        self._images, self._batches, self._depth = images, batches, depth
        self._executor = ThreadPoolExecutor(READERS, "sdnet-read")
        self._held: dict[int, Future[list[np.ndarray]]] = {}

    def __call__(self, step: int) -> list[np.ndarray]:
        """Return the batch of a step.

        Raises:
            StopIteration: The epoch has no such step.
            DataError: A file is missing or unreadable.
        """
        if step >= len(self._batches):
            raise StopIteration
        for coming in range(step, min(step + READERS, len(self._batches))):
            if coming not in self._held:
                self._held[coming] = self._executor.submit(self._read, coming)
        self._held.pop(step - 2 * self._depth - 2, None)
        return self._held[step].result()

    def first_broken(self, flaw: Callable[[bytes], str | None]) -> tuple[str, str] | None:
        """Return the name and the flaw of the first image in memory that `flaw` objects to; None if there is none."""
        for step, future in sorted(self._held.items()):
            for index, data in zip(self._batches[step], future.result(), strict=True):
                if reason := flaw(data.tobytes()):
                    return self._images.name(int(index)), reason
        return None

    def close(self) -> None:
        """Stop reading."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> list[np.ndarray]:
        return [np.frombuffer(self._read_one(int(index)), np.uint8) for index in self._batches[step]]

    def _read_one(self, index: int) -> bytes:
        try:
            return self._images.where(index).read()
        except DataError as error:
            raise DataError(str(error), self._images.name(index), "cannot be read") from error
