"""Tar shards in the WebDataset layout: `train-*.tar` and `val-*.tar`, each with an index `.idx` beside it.

A sample is an image and its label, `<key>.jpg` and `<key>.cls` (an integer in ASCII). The index says where they lie
(see `sdnet.train.data.shard_index`), so images are read in any order, as from a folder.

`sdnet.train.prepare` writes such shards, with a manifest. There a key is `<class>/<number>`, so that labels need not be
read, and images are taken in the order of their numbers, that of their source: a folder and the shards made from it
give the same batches. Shards of other origin need no manifest; their labels must count from 0 without a gap.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from sdnet.train.data.archives import Lost
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.names import printable
from sdnet.train.data.shard_index import read_samples
from sdnet.train.data.span import Span
from sdnet.train.errors import DataError, UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class TarSet(ImageSet):
    """Images inside tars; `files` are names for messages and the fingerprint.

    Attributes:
        tars: The tars.
        places: [N, 3] int64; image i is `places[i, 2]` bytes from `places[i, 1]` of `tars[places[i, 0]]`.
    """

    tars: Sequence[Path] = ()
    places: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))

    def place(self) -> Path:
        """Return the first tar: both splits have one folder."""
        return self.tars[0]

    def where(self, index: int) -> Span:
        """Return where the bytes of an image lie."""
        tar, offset, size = self.places[index].tolist()
        return Span(self.tars[tar], offset, size)

    def paths(self) -> Iterable[Path]:
        """Return the files on disk whose change would change the images."""
        return self.tars

    def select(self, indices: Sequence[int]) -> Self:
        """Return some of the images, in the order of `indices`; the classes stay."""
        return replace(super().select(indices), places=self.places[indices])


def holds_shards(root: Path) -> bool:
    """Return whether `read_shards` is the function that reads this folder."""
    return (root / MANIFEST).is_file() or any(any(root.glob(f"{split}-*.tar")) for split in ("train", "val"))


def read_shards(root: Path) -> tuple[TarSet, TarSet]:
    """Return the training and validation set under `root`.

    Raises:
        UserError: Shards are missing or changed; the labels of the training set have gaps, or the validation set has
            others; or the manifest is unreadable.
    """
    manifest = read_manifest(root)
    if manifest is not None:
        classes = tuple(manifest["classes"])
        listed = {
            split: {shard["file"]: shard["pictures"] for shard in facts["shards"]}
            for split, facts in manifest["splits"].items()
        }
        sizes = {shard["file"]: shard["bytes"] for facts in manifest["splits"].values() for shard in facts["shards"]}
        _check_sizes(root, sizes)
        train, val = (_read_split(root, listed[split], classes) for split in ("train", "val"))
        return train, val
    if (root / ".prepare").is_dir():
        raise UserError(
            f"The shards in {printable(root)} are not finished: run the same sdnet.train.prepare command again."
        )
    train, val = (
        _read_split(root, dict.fromkeys(sorted(path.name for path in root.glob(f"{split}-*.tar"))), None)
        for split in ("train", "val")
    )
    classes = _classes(root, set(train.labels), set(val.labels), [*train.lost, *val.lost])
    return replace(train, classes=classes), replace(val, classes=classes)


def _classes(root: Path, train: set[int], val: set[int], lost: Sequence[Lost]) -> tuple[str, ...]:
    """Return the names of the classes of shards without a manifest: their numbers.

    Raises:
        UserError: The labels of the training shards do not count from 0 without a gap, or the validation shards have
            others.
    """
    here, count = printable(root), max(train) + 1
    cause = f" ({lost[0].name} {lost[0].reason})" if lost else ""
    if missing := sorted(set(range(count)) - train)[:1]:
        raise UserError(
            f"The labels of the training shards in {here} run from {min(train)} to {count - 1} without {missing[0]}: "
            f"they must count from 0 without a gap, or the network would have classes without images{cause}."
        )
    if extra := sorted(val - train)[:1]:
        raise UserError(
            f"The validation shards in {here} have the label {extra[0]}, which the training shards do not have{cause}."
        )
    return tuple(f"{label:0{len(str(count - 1))}}" for label in range(count))


def read_manifest(root: Path) -> dict[str, Any] | None:
    """Return what sdnet.train.prepare wrote about its shards; None where there is no manifest.

    Raises:
        UserError: The manifest is broken or of another version.
    """
    path = root / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"The manifest {printable(path)} is broken: {error}.") from error
    if not isinstance(manifest, dict) or manifest.get("version") != 1:
        raise UserError(f"The manifest {printable(path)} was not written by this version of sdnet.train.prepare.")
    if flaw := _flaw(manifest):
        raise UserError(f"The manifest {printable(path)} is broken: {flaw}.")
    return manifest


def _flaw(manifest: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a manifest; None if it has the form that sdnet.train.prepare writes.

    A shard is named by its file name alone, so that a manifest cannot lead to files elsewhere.
    """
    classes, splits = manifest.get("classes"), manifest.get("splits")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        return "its classes are not a list of names"
    if len(set(classes)) != len(classes):
        return "it names a class twice"
    if not isinstance(splits, dict) or not {"train", "val"} <= splits.keys():
        return "it lacks the splits train and val"
    for split in splits.values():
        shards = split.get("shards") if isinstance(split, dict) else None
        if not isinstance(shards, list):
            return "a split has no list of shards"
        for shard in shards:
            file = shard.get("file") if isinstance(shard, dict) else None
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".tar"):
                return f"{printable(str(file))} is not the name of a tar beside it"
            if not all(isinstance(shard.get(count), int) for count in ("pictures", "bytes")):
                return f"it does not give the images and bytes of {printable(file)}"
    return None


def sample_key(class_name: str, number: int) -> str:
    """Return the key of a sample: its class, without spaces or slashes as indices need it, and a number."""
    return f"{quote_class(class_name)}/{number:08}"


def quote_class(class_name: str) -> str:
    """Return a class as it stands in the key of a sample."""
    return quote(class_name, safe="", errors="surrogateescape")


def _check_sizes(root: Path, sizes: dict[str, int]) -> None:
    for file, size in sizes.items():
        path = root / file
        if not path.is_file():
            raise UserError(f"The shard {printable(path)} is missing.")
        if (found := path.stat().st_size) != size:
            raise UserError(
                f"The shard {printable(path)} has {found} bytes instead of the {size} that the manifest gives it."
            )


def _read_split(root: Path, counts: Mapping[str, int | None], classes: tuple[str, ...] | None) -> TarSet:
    """Return the images of the shards that `counts` names; it gives the number of images of each, if it is known."""
    if not counts:
        raise UserError(f"{printable(root)} has no shards of both splits: train-*.tar and val-*.tar.")
    number = {quote_class(name): label for label, name in enumerate(classes or ())}
    files: list[str] = []
    labels: list[int] = []
    places: list[np.ndarray] = []
    lost: list[Lost] = []
    for tar, (name, count) in enumerate(counts.items()):
        path = root / name
        samples = read_samples(path)
        lost += samples.lost
        if count is not None and len(samples.images) != count:
            reason = f"holds {len(samples.images)} images instead of the {count} that the manifest gives it"
            lost.append(Lost(printable(path), reason))
        if classes is None:
            spans = samples.places[:, 2:].tolist()
            labels += [_read_label(path, *label) for label in zip(samples.labels, spans, strict=True)]
        else:
            known = [number.get(image.split("/", 1)[0]) for image in samples.images]
            if None in known:
                stranger = printable(samples.images[known.index(None)])
                raise UserError(f"The shard {printable(path)} holds {stranger}, a class that the manifest lacks.")
            labels += [label for label in known if label is not None]
        files += [f"{name}/{image}" for image in samples.images]
        places.append(np.insert(samples.places[:, :2], 0, tar, 1))
    if not files:
        cause = f": {lost[0].name} {lost[0].reason}" if lost else ""
        raise UserError(f"The shards {printable(next(iter(counts)))} ... in {printable(root)} hold no images{cause}.")
    split = TarSet(
        root,
        classes or (),
        files,
        labels,
        lost=lost,
        tars=tuple(root / name for name in counts),
        places=np.concatenate(places),
    )
    if classes is None:
        return split
    return split.select(sorted(range(len(files)), key=lambda place: files[place].rsplit("/", 1)[-1]))


def _read_label(path: Path, name: str, place: list[int]) -> int:
    try:
        text = Span(path, *place).read().strip()
    except DataError as error:
        raise UserError(f"The label {printable(name)} in {printable(path)} cannot be read: {error}") from error
    if not text.isdigit() or len(text) > 9 or int(text) >= 2**20:
        raise UserError(f"The label {printable(name)} in {printable(path)} is no class number: {text[:20]!r}.")
    return int(text)
