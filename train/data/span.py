"""The bytes of one picture, in a file of its own or inside a tar."""

import os
from pathlib import Path
from typing import NamedTuple

from sdnet.train.errors import DataError


class Span(NamedTuple):
    """`size` bytes from `offset` of the file `path`; the whole file if `size` is None."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """All of the bytes.

        Raises:
            DataError: the file is missing, unreadable or too short.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                data = os.pread(file.fileno(), size, self.offset)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}.") from error
        if len(data) != size:
            raise DataError(f"{self.path} has become shorter: {size} bytes from {self.offset} are not there.")
        return data

    def ends(self, count: int) -> tuple[bytes, bytes]:
        """The first and the last `count` bytes, fewer if there are not so many; raises an OSError."""
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            count = min(count, size)
            return os.pread(file.fileno(), count, self.offset), os.pread(
                file.fileno(), count, self.offset + size - count
            )
