"""Finding images that would break a run, before it starts.

`"header"` looks at the first and the last bytes of each image: a JPEG or PNG that begins and ends as it should is taken
for complete, anything else is decoded. `"full"` decodes every image. Both decode with Pillow, and both refuse the kinds
of images that DALI would decode otherwise (see `sdnet.train.data.formats`). The result is kept in the user's cache
folder for as long as names, sizes and times of the files stay the same. It is written every few seconds, so a check
that was interrupted goes on where it stopped.
"""

import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sdnet.files import write_text
from sdnet.train.data.folder import ImageSet
from sdnet.train.data.formats import HEAD, TAIL, looks_whole, why_unusable
from sdnet.train.data.names import printable
from sdnet.train.data.span import Span
from sdnet.train.data.watch import tell
from sdnet.train.errors import DataError, UserError
from sdnet.train.job import Verify

CHUNK = 1000  # images that a thread takes at a time
KEEP_SECONDS = 5.0  # between two writes of what has been found so far
RULES = 2  # counts the changes of what is accepted: a result of other rules is not used


class BadImage(NamedTuple):
    """An image that cannot be used: its position in the set, its path for messages, and the reason."""

    position: int
    name: str
    reason: str


def check_images(images: ImageSet, verify: Verify, threads: int) -> list[BadImage]:
    """Return the images of a set that are empty, truncated, unreadable, of an unsupported kind, or not images."""
    stamp, cache = stamp_of(images), cache_folder() / f"check-{place_of(images)}-{images.digest()[:8]}.json"
    bad, done = _recall(cache, stamp, verify)
    if done >= len(images):
        return bad

    def check(start: int) -> list[BadImage]:
        chunk = range(start, min(start + CHUNK, len(images)))
        verdicts = ((index, inspect(images.where(index), verify)) for index in chunk)
        return [BadImage(index, images.name(index), reason) for index, reason in verdicts if reason]

    executor = ThreadPoolExecutor(threads)
    try:
        kept = time.monotonic()
        for start, found in zip(starts := range(done, len(images), CHUNK), executor.map(check, starts), strict=True):
            done = min(start + CHUNK, len(images))
            tell("checking images", done, len(images))
            bad += found
            if done == len(images) or time.monotonic() - kept >= KEEP_SECONDS:
                _remember(cache, stamp, verify, bad, done)
                kept = time.monotonic()
    finally:
        executor.shutdown(cancel_futures=True)
    return bad


def inspect(span: Span, verify: Verify = "full") -> str | None:
    """Return why an image cannot be used; None if it can."""
    try:
        if not stat.S_ISREG(os.stat(span.path).st_mode):
            return "is not a regular file"
        head, tail = span.ends(HEAD, TAIL)
        if not head:
            return "is empty"
        if verify == "header" and looks_whole(head, tail):
            return None
        return why_unusable(span.read())
    except OSError as error:
        missing = error.errno in (errno.ENOENT, errno.ELOOP) and span.path.is_symlink()
        return "is a link whose target is missing" if missing else f"cannot be read: {error.strerror}"
    except DataError:
        return "is truncated: the file or archive ends within it"


def refuse(root: Path, bad: Sequence[tuple[str, str]], most: int = 10) -> None:
    """Raise a UserError that lists (name, reason) of what cannot be used, if there is anything."""
    if bad:
        listed = [f"  {name} {reason}" for name, reason in bad[:most]]
        listed += [f"  and {len(bad) - most} more"] if len(bad) > most else []
        raise UserError(
            f"{len(bad)} of the files in {printable(root)} cannot be used; repair them, or leave them out with "
            "--bad-files skip:\n" + "\n".join(listed)
        )


def stamp_of(images: ImageSet) -> str:
    """Return a text that changes when a file is added, removed, renamed, or written to, and with `RULES`."""
    stamp = hashlib.sha256(f"{RULES} {images.digest()}".encode())
    for path in images.paths():
        try:
            facts = os.stat(path)
            stamp.update(f"{facts.st_size} {facts.st_mtime_ns} {facts.st_mode}\n".encode())
        except OSError as error:
            stamp.update(f"{error.strerror}\n".encode())
    return stamp.hexdigest()


def cache_folder() -> Path:
    """Return the user's folder for what can be found out again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sdnet"


def place_of(images: ImageSet) -> str:
    """Return a word that stands for the place of a set in names of files."""
    return hashlib.sha256(os.fsencode(images.place().resolve())).hexdigest()[:24]


def _recall(cache: Path, stamp: str, verify: Verify) -> tuple[list[BadImage], int]:
    """Return what an earlier check found, and how many images it had looked at; it may have been interrupted.

    Nothing, if it was less thorough or something has changed since.
    """
    try:
        stored = json.loads(cache.read_text())
        if stored["stamp"] == stamp and verify in ("header", stored["verify"]):
            return [BadImage(*image) for image in stored["bad"]], int(stored["done"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or not one of ours: check again
    return [], 0


def _remember(cache: Path, stamp: str, verify: Verify, bad: Sequence[BadImage], done: int) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps({"stamp": stamp, "verify": verify, "bad": bad, "done": done}))
    except OSError:
        pass  # a cache that cannot be written costs the next run a check
