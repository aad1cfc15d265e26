"""Finding images that would break a run, before it starts.

`"header"` looks at the first and the last bytes of each image: a JPEG or PNG that begins and ends as it should is taken
for complete, anything else is decoded. `"full"` decodes every image. Both decode with Pillow, and both refuse the kinds
of images that DALI would decode otherwise (see `sdnet.train.data.formats`). The result is kept in the user's cache
folder for as long as names, sizes and times of the files stay the same.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from sdnet.train.data.folder import ImageSet
from sdnet.train.data.formats import HEAD, TAIL, looks_whole, why_unusable
from sdnet.train.data.names import printable
from sdnet.train.data.span import Span
from sdnet.train.data.watch import tell
from sdnet.train.errors import DataError, UserError
from sdnet.train.files import write_atomically
from sdnet.train.job import Verify

CHUNK = 1000  # images that a thread takes at a time
RULES = 2  # counts the changes of what is accepted: a result of other rules is not used


class BadImage(NamedTuple):
    """An image that cannot be used: its position in the set, its path for messages, and the reason."""

    position: int
    name: str
    reason: str


def check_images(images: ImageSet, verify: Verify, threads: int) -> list[BadImage]:
    """Return the images of a set that are empty, truncated, unreadable, of an unsupported kind, or not images."""
    stamp, cache = _stamp(images), _cache_file(images)
    if (known := _recall(cache, stamp, verify)) is not None:
        return known

    def check(start: int) -> list[BadImage]:
        chunk = range(start, min(start + CHUNK, len(images)))
        verdicts = ((index, inspect(images.where(index), verify)) for index in chunk)
        return [BadImage(index, images.name(index), reason) for index, reason in verdicts if reason]

    with ThreadPoolExecutor(threads) as executor:
        bad: list[BadImage] = []
        for chunk, found in enumerate(executor.map(check, range(0, len(images), CHUNK))):
            tell("checking images", min((chunk + 1) * CHUNK, len(images)), len(images))
            bad += found
    _remember(cache, stamp, verify, bad)
    return bad


def inspect(span: Span, verify: Verify = "full") -> str | None:
    """Return why an image cannot be used; None if nothing speaks against it."""
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
        return "is a link whose target is missing" if span.path.is_symlink() else f"cannot be read: {error.strerror}"
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


def _stamp(images: ImageSet) -> str:
    """Return a text that changes when a file is added, removed, renamed, or written to, and with `RULES`."""
    stamp = hashlib.sha256(f"{RULES} {images.digest()}".encode())
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


def _recall(cache: Path, stamp: str, verify: Verify) -> list[BadImage] | None:
    """Return what an earlier check found, if it was as thorough and nothing has changed since."""
    try:
        stored = json.loads(cache.read_text())
        if stored["stamp"] == stamp and verify in ("header", stored["verify"]):
            return [BadImage(*image) for image in stored["bad"]]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no cache, or not one of ours: check again
    return None


def _remember(cache: Path, stamp: str, verify: Verify, bad: Sequence[BadImage]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"stamp": stamp, "verify": verify, "bad": bad})
        write_atomically(cache, lambda temporary: temporary.write_text(text))
    except OSError:
        pass  # a cache that cannot be written costs the next run a check
