"""Read archives in place, without unpacking them to disk, and refuse links and paths that leave them."""

import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from sdnet.train.data.names import printable
from sdnet.train.errors import UserError

MOST_BYTES = 2**30  # of one member that is read into memory
_CHUNK = 2**20  # bytes that the search for the next member reads at a time


class Member(NamedTuple):
    """A regular file inside an uncompressed tar: its bytes are `size` bytes from `offset` of the tar."""

    name: str
    offset: int
    size: int


class Lost(NamedTuple):
    """Something that should hold images and cannot be read: its name and the reason."""

    name: str
    reason: str


class Listing(NamedTuple):
    """The regular files of a tar in their order, and what of the tar is lost."""

    members: list[Member]
    lost: list[Lost]


def list_tar(path: Path, offset: int = 0, size: int | None = None) -> Listing:
    """List the regular files of an uncompressed tar.

    Of a member that is stored twice the later copy counts, as it does when the tar is unpacked. A tar that is damaged
    is read on from the next member that is whole; what is missing is listed in `lost`. A member that the archive breaks
    off in is listed as a member with its full size, so reading it fails.

    Args:
        path: The tar, or a file that holds it.
        offset: Where the tar begins in the file.
        size: The size of the tar in bytes; up to the end of the file if None.

    Raises:
        UserError: The file is not a tar, or a member is neither file nor folder or has an absolute or `..` path.
    """
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            end = length if size is None else min(offset + size, length)
            return _list(file, path, offset, end)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"The archive {printable(path)} cannot be read: {error}.") from error


def why_incomplete(file: BinaryIO, begin: int, position: int, end: int) -> str | None:
    """Return what is wrong with the end of a tar whose last member ends at `position`; None if nothing is.

    A tar ends with zeros: at least one block of 512 bytes, at most what fills the last record of 10240 bytes. More
    zeros are a hole in which members are lost.

    Args:
        file: The file that holds the tar.
        begin: Where the tar begins.
        position: Where its last member ends.
        end: Where the tar ends.
    """
    if position >= end:
        return f"breaks off at byte {end - begin}, without the mark of its end: what followed is lost"
    if _skip_zeros(file, position, end) is not None:
        return _damaged(position - begin, end - begin)
    two_blocks = position - begin + 2 * tarfile.BLOCKSIZE
    if end - begin > -(-two_blocks // tarfile.RECORDSIZE) * tarfile.RECORDSIZE:
        return f"holds nothing but zeros from byte {position - begin} on: what lay there is lost"
    return None


def _damaged(begin: int, end: int) -> str:
    return f"is damaged from byte {begin} to byte {end}: what lay there is lost"


def read_members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the contents of those regular files of a tar, compressed or not, whose names are `wanted`.

    A compressed archive is read to its end, so that its checksum is compared.

    Raises:
        UserError: As `list_tar`; the archive is damaged, or a wanted member is stored twice or has more than 1 GiB.
    """
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode="r:*") as tar:
            for info in tar:
                if not _is_file(info, path) or not wanted(info.name):
                    continue
                if info.size > MOST_BYTES:
                    raise UserError(
                        f"The member {printable(info.name)} of {printable(path)} has {info.size} bytes, "
                        f"more than the {MOST_BYTES} that are read."
                    )
                if info.name in contents:
                    raise UserError(f"The archive {printable(path)} holds {printable(info.name)} twice.")
                file = tar.extractfile(info)
                contents[info.name] = file.read() if file else b""
            if any(block.strip(b"\0") for block in iter(lambda: _read(tar, _CHUNK), b"")):
                raise UserError(f"The archive {printable(path)} is damaged: more follows after its end.")
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = next(iter(str(error).splitlines()), "it is damaged").rstrip(":.")
        raise UserError(f"The archive {printable(path)} cannot be read: {reason}.") from error
    return contents


def _read(tar: tarfile.TarFile, count: int) -> bytes:
    assert tar.fileobj is not None
    return tar.fileobj.read(count)


def _list(file: BinaryIO, path: Path, begin: int, end: int) -> Listing:
    members: dict[str, Member] = {}
    lost: list[Lost] = []
    here = printable(path)
    position = begin  # where the member after the last one should begin
    file.seek(begin)
    first = file.read(tarfile.BLOCKSIZE)
    if not first:
        raise tarfile.ReadError("it is empty")
    if first.strip(b"\0"):
        tarfile.TarInfo.frombuf(first, tarfile.ENCODING, "surrogateescape")  # raises what the caller reports
    start = _next_header(file, begin, end)
    while start is not None:
        if start > position:
            lost.append(Lost(here, _damaged(position - begin, start - begin)))
        file.seek(start)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while position < end and (info := tar.next()) is not None:
                if info.offset >= end:
                    break
                position = info.offset_data + (-(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE)
                if not _is_file(info, path):
                    continue
                name = str(PurePosixPath(info.name))
                if members.pop(name, None) is not None:
                    lost.append(Lost(f"{here}/{printable(name)}", "is replaced by a later copy in the same archive"))
                members[name] = Member(info.name, info.offset_data, info.size)
        if position <= start:  # a header that nothing follows
            lost.append(Lost(here, _damaged(start - begin, start - begin + tarfile.BLOCKSIZE)))
            position = start + tarfile.BLOCKSIZE
        start = _next_header(file, position, end) if position < end else None
    if reason := why_incomplete(file, begin, position, end):
        lost.append(Lost(here, reason))
    return Listing(list(members.values()), lost)


def _is_file(info: tarfile.TarInfo, path: Path) -> bool:
    """Return whether a member is a regular file, not a folder; refuse anything hostile."""
    name = PurePosixPath(info.name)
    if name.is_absolute() or ".." in name.parts:
        reason = "points outside of it"
    elif info.isdir():
        return False
    elif info.isreg() and not info.issparse():
        return True
    else:
        reason = "is a link or a device, not a file"
    raise UserError(f"The archive {printable(path)} is refused: its member {printable(info.name)} {reason}.")


def _chunks(file: BinaryIO, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield (offset, bytes) from `begin` to `end`."""
    for at in range(begin, end, _CHUNK):
        yield at, os.pread(file.fileno(), min(_CHUNK, end - at), at)


def _skip_zeros(file: BinaryIO, begin: int, end: int) -> int | None:
    """Return where the first byte that is not zero lies; None if there is none."""
    for at, chunk in _chunks(file, begin, end):
        if rest := chunk.lstrip(b"\0"):
            return at + len(chunk) - len(rest)
    return None


def _next_header(file: BinaryIO, begin: int, end: int) -> int | None:
    """Return where the first valid header of a member lies from `begin` on, in steps of a block; None if none does."""
    for at, chunk in _chunks(file, begin, end):
        zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        for offset in range(zeros - zeros % tarfile.BLOCKSIZE, len(chunk), tarfile.BLOCKSIZE):
            try:
                tarfile.TarInfo.frombuf(chunk[offset : offset + tarfile.BLOCKSIZE], tarfile.ENCODING, "surrogateescape")
            except tarfile.HeaderError:
                continue
            return at + offset
    return None
