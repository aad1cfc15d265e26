"""The samples of one shard, from its index or from the tar itself.

The index is a text beside the tar (`.idx`, DALI's wds2idx format, v1.2): a line for each sample, with type, offset,
size and name of each of its members. It is used if it accounts for every byte of the tar: one member after the other,
each with the name and size that the index gives. Otherwise the tar is read from member to member.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from sdnet.train.data.archives import Listing, Lost, Member, list_tar, why_incomplete
from sdnet.train.data.formats import EXTENSIONS
from sdnet.train.data.names import printable

INDEX_HEADER = "v1.2"
Sample = tuple[Member, Member]  # an image and its label

_BLOCK, _NAME = 512, 100  # bytes of a tar's header, and of the name in it
_SIZE = slice(124, 135)  # the size in a header, in octal digits


def read_samples(path: Path) -> tuple[list[Sample], list[Lost]]:
    """Return the samples of a shard in their order, and what of it is lost.

    Raises:
        UserError: The shard cannot be read.
    """
    if not path.is_file():
        missing = "is a link whose target is missing" if path.is_symlink() else "is not a regular file"
        return [], [Lost(printable(path), missing)]
    index = path.with_suffix(".idx")
    indexed: list[list[Member]] = []
    flaw = None
    if index.is_file():
        try:
            indexed = _read_index(index)
        except (OSError, ValueError) as error:
            flaw = f"is broken: {error}"
        if flaw is None and _accounts_for(path, indexed):
            return _samples(indexed, path)
    listing = list_tar(path)
    samples, lost = _samples(_grouped(listing), path)
    lost = [*listing.lost, *lost]
    if flaw is None and index.is_file() and _samples(indexed, path)[0] != samples:
        flaw = "does not fit its tar"
    if flaw is not None:
        lost.append(Lost(printable(index), f"{flaw}; it is not used: make it again, or remove it"))
    return samples, lost


def index_line(image: Member, label: Member) -> str:
    """Return the line of an index for one sample."""
    parts = (f"{name.rsplit('.', 1)[1]} {offset} {size} {name}" for name, offset, size in (image, label))
    return " ".join(parts) + "\n"


def _read_index(index: Path) -> list[list[Member]]:
    """Return the members of each sample as the index gives them.

    Raises:
        OSError: The index cannot be read.
        ValueError: It is no index.
    """
    text = index.read_text(encoding="utf-8-sig", errors="surrogateescape")
    header, *lines = text.removesuffix("\n").split("\n")
    if header.split() != [INDEX_HEADER, str(len(lines))]:
        raise ValueError(f"it should begin with {INDEX_HEADER} {len(lines)}")
    rows = [line.split() for line in lines]
    if short := next((row for row in rows if len(row) % 4), None):
        raise ValueError(f"a line has {len(short)} fields, not four for each member")
    return [[Member(row[at + 3], int(row[at + 1]), int(row[at + 2])) for at in range(0, len(row), 4)] for row in rows]


def _accounts_for(path: Path, samples: list[list[Member]]) -> bool:
    """Return whether the members of an index are all that the tar holds, each where the index says."""
    members = sorted((member for sample in samples for member in sample), key=lambda member: member.offset)
    if not members or len({member.name for member in members}) != len(members):
        return False
    if members[-1].offset + members[-1].size > path.stat().st_size:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
        position = 0
        for name, offset, size in members:
            if offset != position + _BLOCK:
                return False
            header = tar[position:offset]
            encoded = name.encode(errors="surrogateescape")
            if len(encoded) > _NAME or header[:_NAME].rstrip(b"\0") != encoded or header[_SIZE] != b"%011o" % size:
                return False
            position = offset + -(-size // _BLOCK) * _BLOCK
        return _ends_well(file, position)


def _ends_well(file: BinaryIO, position: int) -> bool:
    return why_incomplete(file, 0, position, os.fstat(file.fileno()).st_size) is None


def _grouped(listing: Listing) -> Iterator[list[Member]]:
    """Yield the members of each sample: those with one path up to the first dot of their name, one after the other."""
    key, sample = "", []
    for member in listing.members:
        folder, base = os.path.split(member.name)
        this = os.path.join(folder, base.split(".", 1)[0])
        if sample and this != key:
            yield sample
            sample = []
        key = this
        sample.append(member)
    if sample:
        yield sample


def _samples(groups: Iterable[list[Member]], path: Path) -> tuple[list[Sample], list[Lost]]:
    """Return the samples that are one image and one label, and the others as lost."""
    samples: list[Sample] = []
    lost: list[Lost] = []
    for group in groups:
        images = [member for member in group if member.name.lower().endswith(EXTENSIONS)]
        labels = [member for member in group if member.name.endswith(".cls")]
        if len(images) == 1 and len(labels) == 1:
            samples.append((images[0], labels[0]))
        elif group:
            name = f"{printable(path)}/{printable(group[0].name)}"
            lost.append(Lost(name, "belongs to a sample that is not one image and one .cls"))
    return samples, lost
