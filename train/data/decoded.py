"""The pixels of a set of small image files, decoded once and kept in the user's cache folder."""

import contextlib
import hashlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np

from sdnet.files import write_atomically
from sdnet.train.data.check import cache_folder, place_of, stamp_of
from sdnet.train.data.folder import ImageSet

DIGEST_BYTES = 32


def decode_once(images: ImageSet, decode: Callable[[ImageSet], np.ndarray]) -> np.ndarray:
    """Return the pixels of a set, from the cache if its files have not changed since.

    The name of the cache file has the names, sizes and times of the image files in it; its content begins with a
    checksum. A set has one cache file, as large as its pixels.

    Args:
        images: The set.
        decode: Decodes it.
    """
    place = place_of(images)
    cache = cache_folder() / f"pixels-{place}-{stamp_of(images)[:24]}"
    if (known := _read(cache)) is not None and len(known) == len(images):
        return known
    pixels = decode(images)
    content = BytesIO()
    np.save(content, pixels, allow_pickle=False)
    data = hashlib.sha256(content.getbuffer()).digest() + content.getvalue()
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next run the decoding
        cache.parent.mkdir(parents=True, exist_ok=True)
        for older in cache.parent.glob(f"pixels-{place}-*"):
            older.unlink()
        write_atomically(cache, lambda temporary: temporary.write_bytes(data))
    return pixels


def _read(cache: Path) -> np.ndarray | None:
    """Return what a cache file holds; None if there is none or it is damaged."""
    try:
        data = cache.read_bytes()
        if hashlib.sha256(memoryview(data)[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
            return None
        return np.load(BytesIO(data[DIGEST_BYTES:]), allow_pickle=False)
    except (OSError, ValueError):
        return None
