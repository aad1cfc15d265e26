"""Finding pictures that would break a run, before it starts.

`"header"` looks at the first and the last bytes of each picture: a JPEG or PNG that begins and ends as it should is
taken for whole, anything else is decoded. `"full"` decodes every picture. Both decode with Pillow. What was found is
kept in the user's cache folder for as long as names, sizes and times of the files stay the same.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from sdnet.train.data.folder import ImageSet
from sdnet.train.data.span import Span
from sdnet.train.errors import DataError, UserError
from sdnet.train.files import write_atomically
from sdnet.train.job import Verify

# What Pillow may take a picture for: formats that DALI decodes too.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")
CHUNK = 1000  # pictures that a thread takes at a time


class BadPicture(NamedTuple):
    """A picture that cannot be used, by its place in the set and by its path, and why."""

    place: int
    name: str
    reason: str


def check_pictures(images: ImageSet, verify: Verify, threads: int) -> list[BadPicture]:
    """The pictures of a set that are empty, truncated, no pictures or unreadable."""
    stamp, cache = _stamp(images), _cache_file(images)
    if (known := _recall(cache, stamp, verify)) is not None:
        return known

    def check(start: int) -> list[BadPicture]:
        chunk = range(start, min(start + CHUNK, len(images)))
        verdicts = ((index, inspect(images.where(index), verify)) for index in chunk)
        return [
            BadPicture(index, str(images.root / images.files[index]), reason) for index, reason in verdicts if reason
        ]

    with ThreadPoolExecutor(threads) as executor:
        bad = list(chain.from_iterable(executor.map(check, range(0, len(images), CHUNK))))
    _remember(cache, stamp, verify, bad)
    return bad


def inspect(span: Span, verify: Verify = "full") -> str | None:
    """Why a picture cannot be used; None if nothing speaks against it."""
    try:
        if not stat.S_ISREG(os.stat(span.path).st_mode):
            return "is not a regular file"
        head, tail = span.ends(12)
        if not head:
            return "is empty"
        if verify == "header" and _looks_whole(head, tail):
            return None
        return why_broken(span.read())
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except DataError as error:
        return str(error)


def why_broken(data: bytes) -> str | None:
    """Why these bytes do not decode to a picture; None if they do."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as picture:
            picture.load()
    except UnidentifiedImageError:
        return "is not a picture" if data else "is empty"
    except Image.DecompressionBombError:
        return "has too many pixels"
    except Exception as error:  # Pillow raises of every kind on broken files
        return "is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}"
    return None


def refuse(root: Path, bad: Sequence[BadPicture], most: int = 10) -> None:
    """Raise a UserError that lists bad pictures, if there are any."""
    if bad:
        listed = [f"  {picture.name} {picture.reason}" for picture in bad[:most]]
        listed += [f"  and {len(bad) - most} more"] if len(bad) > most else []
        raise UserError(
            f"{len(bad)} of the pictures in {root} cannot be used; repair them, or leave them out with "
            "--bad-files skip:\n" + "\n".join(listed)
        )


def _looks_whole(head: bytes, tail: bytes) -> bool:
    jpeg = head.startswith(b"\xff\xd8\xff") and tail.endswith(b"\xff\xd9")
    png = head.startswith(b"\x89PNG\r\n\x1a\n") and tail == b"\0\0\0\0IEND\xaeB`\x82"
    return jpeg or png


def _stamp(images: ImageSet) -> str:
    """Changes when a file is added, removed, renamed, or written to."""
    stamp = hashlib.sha256(images.digest().encode())
    for path in images.paths():
        try:
            facts = os.stat(path)
            stamp.update(f"{facts.st_size} {facts.st_mtime_ns} {facts.st_mode}\n".encode())
        except OSError as error:
            stamp.update(f"{error.strerror}\n".encode())
    return stamp.hexdigest()


def _cache_file(images: ImageSet) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdnet"
    place = hashlib.sha256(os.fsencode(images.root.resolve())).hexdigest()[:24]
    return folder / f"check-{place}-{images.digest()[:8]}.json"


def _recall(cache: Path, stamp: str, verify: Verify) -> list[BadPicture] | None:
    """What an earlier check found, if it was as thorough and nothing has changed since."""
    try:
        stored = json.loads(cache.read_text())
        if stored["stamp"] == stamp and verify in ("header", stored["verify"]):
            return [BadPicture(*picture) for picture in stored["bad"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or not one of ours: check again
    return None


def _remember(cache: Path, stamp: str, verify: Verify, bad: Sequence[BadPicture]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"stamp": stamp, "verify": verify, "bad": bad})
        write_atomically(cache, lambda temporary: temporary.write_text(text))
    except OSError:
        pass  # a cache that cannot be written costs the next run a check
