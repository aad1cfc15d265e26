"""The bytes of one image, in a file of its own or inside a tar."""

import os
from pathlib import Path
from typing import NamedTuple

from sdnet.train.data.names import printable
from sdnet.train.errors import DataError


class Span(NamedTuple):
    """`size` bytes from `offset` of the file `path`; the whole file if `size` is None."""

    path: Path
    offset: int = 0
    size: int | None = None

    def read(self) -> bytes:
        """Return all of the bytes.

        Raises:
            DataError: The file is missing, unreadable or too short.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                data = os.pread(file.fileno(), size, self.offset)
        except OSError as error:
            raise DataError(f"{printable(self.path)} cannot be read: {error.strerror}.") from error
        if len(data) != size:
            raise DataError(f"{printable(self.path)} has become shorter: {size} bytes from {self.offset} are missing.")
        return data

    def ends(self, head: int, tail: int) -> tuple[bytes, bytes]:
        """Return the first `head` and the last `tail` bytes, fewer if there are not so many.

        Raises:
            OSError: The file is missing or unreadable.
        """
        with open(self.path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size if self.size is None else self.size
            return os.pread(file.fileno(), min(head, size), self.offset), os.pread(
                file.fileno(), min(tail, size), self.offset + max(0, size - tail)
            )
