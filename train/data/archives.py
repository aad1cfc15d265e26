"""Reading archives where they lie: nothing is unpacked to disk, and nothing hostile in them is followed."""

import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from sdnet.train.errors import UserError

MOST_BYTES = 2**30  # of one member that is read into memory


class Member(NamedTuple):
    """A regular file inside an uncompressed tar: its bytes are `size` bytes from `offset` of the tar."""

    name: str
    offset: int
    size: int


def tar_members(path: Path, offset: int = 0, size: int | None = None) -> Iterator[Member]:
    """The regular files of the uncompressed tar `path`, or of a tar of `size` bytes that lies at `offset` in it.

    Raises:
        UserError: it is no tar or breaks off, or a member is neither file nor folder or has an absolute or `..` path.
    """
    end = offset + size if size is not None else os.path.getsize(path)
    try:
        with path.open("rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in _checked(tar, path):
                    if info.offset_data + info.size > end:
                        raise UserError(f"The archive {path} breaks off in its member {info.name}.")
                    yield Member(info.name, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"The archive {path} cannot be read: {error}.") from error


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """The contents of those regular files of a tar, compressed or not, whose names are `wanted`.

    Raises:
        UserError: as `tar_members`, or a wanted member has more than 1 GiB.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r:*") as tar:
            for info in _checked(tar, path):
                if not wanted(info.name):
                    continue
                if info.size > MOST_BYTES:
                    raise UserError(f"The member {info.name} of {path} has {info.size} bytes, too many to be read.")
                file = tar.extractfile(info)
                contents[info.name] = file.read() if file else b""
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"The archive {path} cannot be read: {error}.") from error
    return contents


def _checked(tar: tarfile.TarFile, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive without a hostile member."""
    for info in tar:
        name = PurePosixPath(info.name)
        if name.is_absolute() or ".." in name.parts:
            raise UserError(f"The archive {path} is refused: its member {info.name} points outside of it.")
        if info.isreg() and not info.issparse():
            yield info
        elif not info.isdir():
            raise UserError(f"The archive {path} is refused: its member {info.name} is a link or a device, not a file.")
