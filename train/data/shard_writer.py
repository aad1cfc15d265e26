"""Writing one shard: decode, shrink, store; whole or not at all."""

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

from sdnet.train.data.check import FORMATS, why_broken
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.shards import INDEX_HEADER, index_line, sample_key
from sdnet.train.data.span import Span
from sdnet.train.errors import DataError
from sdnet.train.files import write_atomically

Sources = Mapping[str, ImageSet]
SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "BMP": "bmp", "PPM": "ppm", "TIFF": "tif", "WEBP": "webp"}


@dataclass(frozen=True)
class ShardPlan:
    """A shard to make in `out`: pictures `indices` of `split`, shorter sides at most `size` (0: as they are)."""

    out: Path
    split: str
    number: int
    indices: list[int]
    size: int
    quality: int

    @property
    def tar(self) -> Path:
        """The shard."""
        return self.out / f"{self.split}-{self.number:05}.tar"

    def record(self, records: Path) -> Path:
        """What is known about the shard; written last, so it stands for a finished shard."""
        return records / f"{self.tar.stem}.json"

    def is_done(self, records: Path) -> bool:
        """Whether an earlier run has finished it."""
        record = self.record(records)
        return (
            record.is_file()
            and self.tar.is_file()
            and self.tar.stat().st_size == json.loads(record.read_text())["bytes"]
            and self.tar.with_suffix(".idx").is_file()
        )


class Worker(NamedTuple):
    """What writing a shard needs to know besides its plan."""

    sets: Sources
    records: Path
    stopped: Callable[[], bool]

    def write(self, plan: ShardPlan) -> bool:
        """`write_shard` with all of this."""
        return write_shard(plan, self.sets[plan.split], self.records, self.stopped)


_workers: list[Worker] = []  # the one of this process, if it was started to be a worker


def begin_worker(sets: Sources, records: Path, stop: Any) -> None:
    """Make a worker process ready; it stops when the event `stop` is set, not by signals."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _workers.append(Worker(sets, records, stop.is_set))


def write_in_worker(plan: ShardPlan) -> bool:
    """`write_shard` in a worker process."""
    return _workers[0].write(plan)


def write_shard(plan: ShardPlan, images: ImageSet, records: Path, stopped: Callable[[], bool]) -> bool:
    """Make the shard, its index and its record; False if it was stopped before and left nothing behind."""
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
        index = f"{INDEX_HEADER} {len(lines)}\n" + "".join(lines)
        write_atomically(plan.tar.with_suffix(".idx"), lambda path: path.write_text(index))
        os.replace(temporary, plan.tar)
        facts |= {"file": plan.tar.name, "bytes": plan.tar.stat().st_size, "sha256": hashing.digest.hexdigest()}
        write_atomically(plan.record(records), lambda path: path.write_text(json.dumps(facts)))
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
            picture = _add(tar, f"{key}.{suffix}", stored)
            label = _add(tar, f"{key}.cls", str(images.labels[index]).encode())
            lines.append(index_line(picture, label))
    return lines, {"pictures": len(lines), "shrunk": shrunk, "skipped": skipped}


def _read(span: Span) -> tuple[bytes, str | None]:
    """The bytes of a picture, and what is wrong with it; no link is followed and nothing but a file is opened."""
    try:
        if not stat.S_ISREG(os.lstat(span.path).st_mode):
            return b"", "is a link or a device, not a file"
        data = span.read()
    except (OSError, DataError) as error:
        return b"", f"cannot be read: {error}"
    return data, why_broken(data)


def shrink(data: bytes, size: int, quality: int) -> tuple[bytes, str]:
    """The picture with its shorter side at most `size`, and the suffix of its format; unchanged if it is (or size 0).

    A shrunk picture is an RGB JPEG, made with Lanczos' filter as Pillow does it; rotation flags are not applied.
    """
    with Image.open(BytesIO(data), formats=FORMATS) as picture:
        shorter = min(picture.size)
        if not size or shorter <= size or picture.mode.startswith("I"):  # 16 bit: Pillow would clip it
            return data, SUFFIXES[picture.format or "JPEG"]
        width, height = (max(size, round(side * size / shorter)) for side in picture.size)
        out = BytesIO()
        picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS).save(out, "JPEG", quality=quality)
    return out.getvalue(), "jpg"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> tuple[str, int, int]:
    """Append a member; its name, and the offset and size of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))
    return name, tar.offset - -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE, len(data)


class _Hashing(RawIOBase):
    """A file to write to that digests what passes."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)
