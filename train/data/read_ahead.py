"""Feeds DALI the encoded pictures of batch after batch, reading those that come next meanwhile."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sdnet.train.data.check import why_broken
from sdnet.train.data.folder import ImageSet

READERS = 4  # threads that wait for the disk; they hardly use a core


class ReadAhead:
    """Call it with a step to get the batch of that step, a list of encoded pictures [bytes] uint8.

    DALI does not copy what it is given, so the batches that it may still work on are held: `depth` queued ones and
    that in work, on either side.

    Args:
        images: where the bytes are.
        batches: indices of the pictures of each step.
        depth: how many batches DALI asks for in advance.
    """

    def __init__(self, images: ImageSet, batches: Sequence[np.ndarray], depth: int) -> None:
        self._images, self._batches, self._depth = images, batches, depth
        self._executor = ThreadPoolExecutor(READERS, "sdnet-read")
        self._held: dict[int, Future[list[np.ndarray]]] = {}

    def __call__(self, step: int) -> list[np.ndarray]:
        """The batch of a step.

        Raises:
            StopIteration: the epoch has no such step.
            DataError: a file is missing or unreadable.
        """
        if step >= len(self._batches):
            raise StopIteration
        for coming in range(step, min(step + READERS, len(self._batches))):
            if coming not in self._held:
                self._held[coming] = self._executor.submit(self._read, coming)
        self._held.pop(step - 2 * self._depth - 2, None)
        return self._held[step].result()

    def broken(self) -> list[tuple[str, str]]:
        """Name and flaw of every picture in hand that Pillow cannot decode."""
        found: list[tuple[str, str]] = []
        for step, future in sorted(self._held.items()):
            for sample, data in enumerate(future.result()):
                if reason := why_broken(data.tobytes()):
                    found.append((self.name(step, sample), reason))
        return found

    def name(self, step: int, sample: int) -> str:
        """The picture that is `sample` of the batch of a step."""
        return str(self._images.root / self._images.files[int(self._batches[step][sample])])

    def close(self) -> None:
        """Stop reading."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> list[np.ndarray]:
        return [np.frombuffer(self._images.where(index).read(), np.uint8) for index in self._batches[step]]
