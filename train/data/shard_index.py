"""The samples of one shard, from its index or from the tar itself.

The index is a text beside the tar (`.idx`, DALI's wds2idx format, v1.2): a line for each sample, with type, offset,
size and name of each of its members. It is used if it accounts for every byte of the tar: one member after the other,
each with the name and size that the index gives. Otherwise the tar is read from member to member.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdnet.train.data.archives import Lost, Member, list_tar, why_incomplete
from sdnet.train.data.formats import EXTENSIONS
from sdnet.train.data.names import printable

INDEX_HEADER = "v1.2"

_BLOCK, _NAME = 512, 100  # bytes of a tar's header, and of the name in it
_SIZE = slice(124, 135)  # the size in a header, in octal digits


class Samples(NamedTuple):
    """The samples of a shard as columns, which hundred thousands of objects would be slower than.

    Attributes:
        images: The N names of the images.
        labels: The N names of the labels.
        places: [N, 4] int64: offset and size of the image, then of the label.
        lost: What of the shard is lost.
    """

    images: list[str]
    labels: list[str]
    places: np.ndarray
    lost: list[Lost]


class _Groups(NamedTuple):
    """M members in the order of their samples: names, places [M, 2] (offset, size), and members of each sample."""

    names: list[str]
    places: np.ndarray
    counts: list[int]


def read_samples(path: Path) -> Samples:
    """Return the samples of a shard in their order.

    Raises:
        UserError: The shard cannot be read.
    """
    if not path.is_file():
        missing = "is a link whose target is missing" if path.is_symlink() else "is not a regular file"
        return Samples([], [], np.empty((0, 4), np.int64), [Lost(printable(path), missing)])
    index = path.with_suffix(".idx")
    indexed, flaw = None, None
    if index.is_file():
        try:
            groups = _read_index(index)
            indexed = _samples(groups, path)
            if _accounts_for(path, groups):
                return indexed
        except (OSError, ValueError) as error:
            flaw = f"is broken: {error}"
    listing = list_tar(path)
    samples = _samples(_grouped(listing.members), path)
    lost = [*listing.lost, *samples.lost]
    if indexed and (indexed.images != samples.images or not np.array_equal(indexed.places, samples.places)):
        flaw = "does not fit its tar"
    if flaw:
        lost.append(Lost(printable(index), f"{flaw}; it is not used: make it again, or remove it"))
    return samples._replace(lost=lost)


def index_line(image: Member, label: Member) -> str:
    """Return the line of an index for one sample."""
    parts = (f"{name.rsplit('.', 1)[1]} {offset} {size} {name}" for name, offset, size in (image, label))
    return " ".join(parts) + "\n"


def _read_index(index: Path) -> _Groups:
    """Return the members of each sample as the index gives them.

    Raises:
        OSError: The index cannot be read.
        ValueError: It is no index.
    """
    text = index.read_text(encoding="utf-8-sig", errors="surrogateescape")
    header, *lines = text.removesuffix("\n").split("\n")
    if header.split() != [INDEX_HEADER, str(len(lines))]:
        raise ValueError(f"it should begin with {INDEX_HEADER} {len(lines)}")
    lengths = [line.count(" ") + 1 for line in lines]
    if odd := next((length for length in lengths if length % 4), None):
        raise ValueError(f"a line has {odd} fields, not four for each member")
    fields = " ".join(lines).split(" ")
    names, counts = fields[3::4], [length // 4 for length in lengths]
    sample = np.repeat(np.arange(len(counts)), counts)
    for at in np.flatnonzero(sample[1:] == sample[:-1]).tolist():
        one, other = names[at], names[at + 1]
        if one.rpartition(".")[0] != other.rpartition(".")[0] and _key(one) != _key(other):
            raise ValueError(f"a line joins {printable(one)} and {printable(other)}, which are of two samples")
    places = np.array([fields[1::4], fields[2::4]], np.int64).T.reshape(-1, 2)
    return _Groups(names, places, counts)


def _accounts_for(path: Path, groups: _Groups) -> bool:
    """Return whether the members of an index are all that the tar holds, each where the index says."""
    names = [name.encode(errors="surrogateescape") for name in groups.names]
    if not names or len(set(names)) != len(names) or max(map(len, names)) > _NAME:
        return False
    order = np.argsort(groups.places[:, 0], kind="stable")
    offsets, sizes = groups.places[order].T
    ends = offsets + -(-sizes // _BLOCK) * _BLOCK
    if offsets[0] != _BLOCK or (offsets[1:] != ends[:-1] + _BLOCK).any() or ends[-1] > path.stat().st_size:
        return False
    expected = np.frombuffer(b"".join(name.ljust(_NAME, b"\0") for name in names), np.uint8).reshape(-1, _NAME)
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as tar:
            begins = (offsets - _BLOCK).tolist()
            found = b"".join([tar[begin : begin + _SIZE.stop] for begin in begins])
        headers = np.frombuffer(found, np.uint8).reshape(-1, _SIZE.stop)
        digits = headers[:, _SIZE].astype(np.int64) - ord("0")
        octal = 8 ** np.arange(digits.shape[1] - 1, -1, -1)
        fits = (headers[:, :_NAME] == expected[order]).all() and (digits @ octal == sizes).all()
        return bool(fits) and why_incomplete(file, 0, int(ends[-1]), os.fstat(file.fileno()).st_size) is None


def _key(name: str) -> str:
    """Return what the members of one sample have in common: their path up to the first dot of the name."""
    folder, base = os.path.split(name)
    return os.path.join(folder, base.split(".", 1)[0])


def _grouped(members: Sequence[Member]) -> _Groups:
    """Group members with one path up to the first dot of their name that follow each other into a sample."""
    key, counts = None, []
    for member in members:
        this = _key(member.name)
        if this == key:
            counts[-1] += 1
        else:
            counts.append(1)
        key = this
    places = np.array([member[1:] for member in members], np.int64).reshape(-1, 2)
    return _Groups([member.name for member in members], places, counts)


def _samples(groups: _Groups, path: Path) -> Samples:
    """Return the samples that are one image and one label, and the others as lost."""
    names, begin = groups.names, 0
    is_image = [name.lower().endswith(EXTENSIONS) for name in names]
    is_label = [name.lower().endswith(".cls") for name in names]
    images: list[int] = []
    labels: list[int] = []
    lost: list[Lost] = []
    for count in groups.counts:
        end = begin + count
        if sum(is_image[begin:end]) == sum(is_label[begin:end]) == 1:
            images.append(is_image.index(True, begin))
            labels.append(is_label.index(True, begin))
        else:
            name = f"{printable(path)}/{printable(names[begin])}"
            lost.append(Lost(name, "belongs to a sample that is not one image and one .cls"))
        begin = end
    places = np.concatenate([groups.places[images], groups.places[labels]], 1)
    return Samples([names[at] for at in images], [names[at] for at in labels], places, lost)
