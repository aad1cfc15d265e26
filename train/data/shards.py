"""Tar shards in the WebDataset layout: `train-*.tar` and `val-*.tar`, each with an index `.idx` beside it.

A sample is a picture and its label, `<key>.jpg` and `<key>.cls` (an integer in ASCII). The index says where they lie
(DALI's wds2idx format, v1.2), so pictures are read in any order, as from a folder.

`sdnet.train.prepare` writes such shards, with a manifest. There a key is `<class>/<number>`, so that labels need no
reading, and pictures are taken in the order of their numbers, that of their source: a folder and the shards made from
it give the same batches. Shards of other origin need no manifest, and an index that is missing is made by walking
through the tar.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

import numpy as np

from sdnet.train.data.archives import tar_members
from sdnet.train.data.folder import EXTENSIONS, ImageSet
from sdnet.train.data.span import Span
from sdnet.train.errors import UserError

MANIFEST = "manifest.json"
INDEX_HEADER = "v1.2"


@dataclass(frozen=True)
class TarSet(ImageSet):
    """Pictures inside tars: picture i is `places[i, 2]` bytes from `places[i, 1]` of `tars[places[i, 0]]`.

    `files` are names for messages and the fingerprint; `places` is [N, 3] int64.
    """

    tars: Sequence[Path] = ()
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))

    def where(self, index: int) -> Span:
        """Where the bytes of a picture lie."""
        tar, offset, size = self.places[index].tolist()
        return Span(self.tars[tar], offset, size)

    def paths(self) -> Iterable[Path]:
        """The files on disk whose change would change the pictures."""
        return self.tars

    def select(self, indices: Sequence[int]) -> Self:
        """Some of the pictures, in the order of `indices`; the classes stay."""
        return replace(super().select(indices), places=self.places[indices])


def holds_shards(root: Path) -> bool:
    """Whether `read_shards` is the one to read this folder."""
    return (root / MANIFEST).is_file() or any(root.glob("train-*.tar"))


def read_shards(root: Path) -> tuple[TarSet, TarSet]:
    """The training and validation set under `root`.

    Raises:
        UserError: shards are missing, changed, out of range or without labels, or the manifest is unreadable.
    """
    manifest = read_manifest(root)
    if manifest is not None:
        classes = tuple(manifest["classes"])
        listed = {split: [shard["file"] for shard in facts["shards"]] for split, facts in manifest["splits"].items()}
        sizes = {shard["file"]: shard["bytes"] for facts in manifest["splits"].values() for shard in facts["shards"]}
        _check_sizes(root, sizes)
        train, val = (_read_split(root, listed[split], classes) for split in ("train", "val"))
        return train, val
    if (root / ".prepare").is_dir():
        raise UserError(f"The shards in {root} are not finished: run the same sdnet.train.prepare command again.")
    train, val = (
        _read_split(root, sorted(path.name for path in root.glob(f"{split}-*.tar")), None) for split in ("train", "val")
    )
    count = max(max(train.labels), max(val.labels)) + 1
    classes = tuple(f"{label:0{len(str(count - 1))}}" for label in range(count))
    return replace(train, classes=classes), replace(val, classes=classes)


def read_manifest(root: Path) -> dict[str, Any] | None:
    """What sdnet.train.prepare wrote about its shards; None where there is no manifest.

    Raises:
        UserError: the manifest is broken or of another version.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"The manifest {path} is broken: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("version") != 1:
        raise UserError(f"The manifest {path} was not written by this version of sdnet.train.prepare.")
    return manifest


def sample_key(class_name: str, number: int) -> str:
    """The key of a sample: its class, without spaces or slashes as indices need it, and a number."""
    return f"{quote(class_name, safe='', errors='surrogateescape')}/{number:08}"


def index_line(picture: tuple[str, int, int], label: tuple[str, int, int]) -> str:
    """One line of an index from (member, offset, size) of the picture and of its label."""
    parts = (f"{name.rsplit('.', 1)[1]} {offset} {size} {name}" for name, offset, size in (picture, label))
    return " ".join(parts) + "\n"


def _check_sizes(root: Path, sizes: dict[str, int]) -> None:
    for file, size in sizes.items():
        path = root / file
        if not path.is_file():
            raise UserError(f"The shard {path} is missing.")
        if (found := path.stat().st_size) != size:
            raise UserError(f"The shard {path} has {found} bytes instead of the {size} that the manifest gives it.")


def _read_split(root: Path, names: Sequence[str], classes: tuple[str, ...] | None) -> TarSet:
    if not names:
        raise UserError(f"{root} has no shards of both splits: train-*.tar and val-*.tar.")
    number = {name: label for label, name in enumerate(classes or ())}
    files: list[str] = []
    labels: list[int] = []
    places: list[tuple[int, int, int]] = []
    for tar, name in enumerate(names):
        path = root / name
        end = path.stat().st_size
        for picture, label in _samples(path):
            member, offset, size = picture
            if offset < 0 or size < 0 or offset + size > end:
                raise UserError(f"The index of {path} points outside of it, at {member}.")
            if classes is None:
                labels.append(_read_label(path, label))
            elif (known := number.get(unquote(member.split("/")[0], errors="surrogateescape"))) is not None:
                labels.append(known)
            else:
                raise UserError(f"The shard {path} holds {member}, of a class that the manifest does not know.")
            files.append(f"{name}/{member}")
            places.append((tar, offset, size))
    if not files:
        raise UserError(f"The shards {names[0]} ... in {root} hold no pictures.")
    split = TarSet(
        root,
        classes or (),
        files,
        labels,
        tars=tuple(root / name for name in names),
        places=np.array(places, dtype=np.int64),
    )
    if classes is None:
        return split
    return split.select(sorted(range(len(files)), key=lambda place: files[place].rsplit("/", 1)[-1]))


def _samples(path: Path) -> Iterator[tuple[tuple[str, int, int], tuple[str, int, int]]]:
    """(member, offset, size) of every picture in a shard, and of its label."""
    index = path.with_suffix(".idx")
    try:
        samples = _indexed(index) if index.is_file() else _walked(path)
        for sample in samples:
            pictures = [part for part in sample if part[0].lower().endswith(EXTENSIONS)]
            marks = [part for part in sample if part[0].endswith(".cls")]
            if len(pictures) != 1 or len(marks) != 1:
                raise UserError(f"{path} holds a sample that is not one picture and one .cls: {sample[0][0]}.")
            yield pictures[0], marks[0]
    except (ValueError, IndexError) as error:
        raise UserError(f"The index {index} is broken: {error}.") from error


def _indexed(index: Path) -> Iterator[list[tuple[str, int, int]]]:
    header, *lines = index.read_text(errors="surrogateescape").splitlines()
    version, count = header.split()
    if version != INDEX_HEADER or int(count) != len(lines):
        raise ValueError(f"it should begin with {INDEX_HEADER} {len(lines)}")
    for line in lines:
        parts = line.split()
        yield [(parts[at + 3], int(parts[at + 1]), int(parts[at + 2])) for at in range(0, len(parts), 4)]


def _walked(path: Path) -> Iterator[list[tuple[str, int, int]]]:
    """Members with the same path up to the first dot of their base name, one after the other, are a sample."""
    key, sample = "", []
    for member in tar_members(path):
        folder, base = os.path.split(member.name)
        this = os.path.join(folder, base.split(".", 1)[0])
        if sample and this != key:
            yield sample
            sample = []
        key = this
        sample.append(tuple(member))
    if sample:
        yield sample


def _read_label(path: Path, label: tuple[str, int, int]) -> int:
    text = Span(path, label[1], label[2]).read()
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**20:
        raise UserError(f"The label {label[0]} in {path} is no class number: {text[:20]!r}.")
    return value
