"""Writing one shard: decode, shrink and store the images. A shard appears complete or not at all."""

import hashlib
import json
import os
import signal
import stat
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO, RawIOBase
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from sdnet.files import write_text
from sdnet.train.data.archives import Member
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.formats import FORMATS, why_unusable
from sdnet.train.data.shard_index import INDEX_HEADER, index_line
from sdnet.train.data.shards import sample_key
from sdnet.train.data.span import Span
from sdnet.train.errors import DataError

Sources = Mapping[str, ImageSet]
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardPlan:
    """A shard to make.

    Attributes:
        out: The folder of the shards.
        split: "train" or "val".
        number: The number of the shard within its split.
        indices: The images of the split that go into it.
        size: The longest shorter side, in pixels; 0 for none.
        quality: The JPEG quality of images that are shrunk.
    """

    out: Path
    split: str
    number: int
    indices: list[int]
    size: int
    quality: int

    @property
    def tar(self) -> Path:
        """Return the path of the shard."""
        return self.out / f"{self.split}-{self.number:05}.tar"

    def record(self, records: Path) -> Path:
        """Return the path of the facts about the shard, which are written last: they stand for a finished shard."""
        return records / f"{self.tar.stem}.json"

    def is_done(self, records: Path) -> bool:
        """Return whether an earlier run has finished the shard."""
        return (
            self.tar.is_file()
            and self.tar.stat().st_size == (self.facts(records) or {}).get("bytes")
            and self.tar.with_suffix(".idx").is_file()
        )

    def facts(self, records: Path) -> dict[str, Any] | None:
        """Return what is recorded about the finished shard; None if there is no record or a damaged one."""
        try:
            facts = json.loads(self.record(records).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        whole = isinstance(facts, dict) and facts.keys() >= {"file", "pictures", "shrunk", "bytes", "sha256", "skipped"}
        return facts if whole else None


class Worker(NamedTuple):
    """What writing a shard needs besides its plan."""

    sets: Sources
    records: Path
    stopped: Callable[[], bool]

    def write(self, plan: ShardPlan) -> bool:
        """Call `write_shard` with these settings."""
        return write_shard(plan, self.sets[plan.split], self.records, self.stopped)


_workers: list[Worker] = []  # the one of this process, if it was started to be a worker


def begin_worker(sets: Sources, records: Path, stop: Any) -> None:
    """Set up a worker process; the event `stop` ends it, not a signal."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _workers.append(Worker(sets, records, stop.is_set))


def write_in_worker(plan: ShardPlan) -> bool:
    """Call `write_shard` in a worker process."""
    return _workers[0].write(plan)


def write_shard(plan: ShardPlan, images: ImageSet, records: Path, stopped: Callable[[], bool]) -> bool:
    """Write the shard, its index and its record; return False if it was stopped before and left nothing behind."""
    temporary = plan.tar.with_name(f".{plan.tar.name}.tmp")
    try:
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            written = _write_tar(plan, images, hashing, stopped)
            file.flush()
            os.fsync(file.fileno())
        if written is None:
            return False
        lines, facts = written
        write_text(plan.tar.with_suffix(".idx"), f"{INDEX_HEADER} {len(lines)}\n" + "".join(lines))
        os.replace(temporary, plan.tar)
        facts |= {"file": plan.tar.name, "bytes": plan.tar.stat().st_size, "sha256": hashing.digest.hexdigest()}
        write_text(plan.record(records), json.dumps(facts))
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _write_tar(
    plan: ShardPlan, images: ImageSet, out: "_Hashing", stopped: Callable[[], bool]
) -> tuple[list[str], dict[str, Any]] | None:
    lines: list[str] = []
    skipped: list[dict[str, str]] = []
    shrunk = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for index in plan.indices:
            if stopped():
                return None
            data, reason = _read(images.where(index))
            if reason:
                skipped.append({"file": images.files[index], "reason": reason})
                continue
            stored, suffix = shrink(data, plan.size, plan.quality)
            shrunk += stored is not data
            key = sample_key(images.classes[images.labels[index]], index)
            image = _add(tar, f"{key}.{suffix}", stored)
            label = _add(tar, f"{key}.cls", str(images.labels[index]).encode())
            lines.append(index_line(image, label))
    return lines, {"pictures": len(lines), "shrunk": shrunk, "skipped": skipped}


def _read(span: Span) -> tuple[bytes, str | None]:
    """Return the bytes of an image and what is wrong with it; follow no link and open nothing but a regular file."""
    try:
        if not stat.S_ISREG(os.lstat(span.path).st_mode):
            return b"", "is a link or a device, not a file"
        data = span.read()
    except (OSError, DataError) as error:
        return b"", f"cannot be read: {error}"
    return data, why_unusable(data)


def shrink(data: bytes, size: int, quality: int) -> tuple[bytes, str]:
    """Return an image with its shorter side at most `size`, and the suffix of its format.

    An image that is small enough keeps its bytes, as all do for `size` 0. A shrunk image is an RGB JPEG, made with
    Pillow's Lanczos filter; rotation flags are not applied.
    """
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        shorter = min(image.size)
        if not size or shorter <= size:
            return data, SUFFIXES[image.format or "JPEG"]
        width, height = (max(size, round(side * size / shorter)) for side in image.size)
        out = BytesIO()
        image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return out.getvalue(), "jpg"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> Member:
    """Append a member and return where its bytes lie."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
    return Member(name, tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, len(data))


class _Hashing(RawIOBase):
    """A file that computes a digest of what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)
