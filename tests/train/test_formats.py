"""Kinds of image files: each is decoded as Pillow converts it, by DALI too, or it is refused before the run."""

import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from sdnet.train.data.check import inspect
from sdnet.train.data.formats import EXTENSIONS, why_unusable
from sdnet.train.data.pipeline import decode
from sdnet.train.data.span import Span
from sdnet.train.demo_data import photographs_folder
from sdnet.train.job import Verify

Make = Callable[[], bytes]


def photograph() -> Image.Image:
    with Image.open(photographs_folder() / "chelsea.png") as image:
        return image.convert("RGB").resize((90, 60))


RGB = photograph()
GRAY = RGB.convert("L")
COLOURS, GRAYS = np.asarray(RGB), np.asarray(GRAY)


def encoded(image: Image.Image, **how: Any) -> Make:
    def make() -> bytes:
        out = BytesIO()
        image.save(out, **how)
        return out.getvalue()

    return make


def in_mode(mode: str, **how: Any) -> Make:
    return encoded(RGB.convert(mode), **how)


def with_alpha(**how: Any) -> Make:
    return encoded(Image.merge("RGBA", (*RGB.split(), GRAY.rotate(180))), **how)


def png(depth: int, colour: int, rows: np.ndarray) -> Make:
    """A PNG of these big-endian rows, [H, bytes]."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 90, 60, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return lambda: b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def interlaced() -> bytes:
    """An 8-bit RGB PNG in the seven passes of Adam7."""
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    parts = [COLOURS[top::down, left::right] for top, down, left, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts for row in part)
    plain = png(8, 2, np.zeros((0, 0), np.uint8))()
    header = plain[16:28] + b"\1"  # of width, height, depth, colour and filters, then interlaced
    body = zlib.compress(rows)
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return plain[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def netpbm(magic: str, most: int, values: np.ndarray) -> Make:
    """A PGM or PPM of values in [0, 255], scaled to a maximum of `most`."""
    scaled = (values.astype(float) * most / 255).round().astype(np.uint8 if most < 256 else ">u2")
    text = " ".join(map(str, scaled.ravel())).encode()
    body = text if magic in ("P2", "P3") else scaled.tobytes()
    return lambda: f"{magic}\n90 60\n{most}\n".encode() + body


def tiff(bits: int, photometric: int, data: bytes, samples: int = 1, **others: int) -> Make:
    """An uncompressed little-endian TIFF of one strip; `others` are further tags, named t and their number."""
    tags = {256: 90, 257: 60, 258: bits, 259: 1, 262: photometric, 273: 0, 277: samples, 278: 60, 279: len(data)}
    tags |= {int(name[1:]): value for name, value in others.items()}
    begin = 8 + 2 + 12 * len(tags) + 4
    depths = struct.pack("<" + "H" * samples, *[bits] * samples)
    tags[273] = begin + len(depths)
    entries = b""
    for tag, value in sorted(tags.items()):
        kind, count = (3, samples) if tag == 258 else (4, 1)
        entries += struct.pack("<HHII", tag, kind, count, begin if tag == 258 and samples > 2 else value)
    return lambda: b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + depths + data


def bmp(bits: int, compression: int, rows: np.ndarray, masks: bytes = b"") -> Make:
    """A BMP of these rows, [H, bytes], from top to bottom."""
    lines = b"".join(row.tobytes() + bytes(-len(row.tobytes()) % 4) for row in rows[::-1])
    begin = 54 + len(masks)
    head = struct.pack("<IiiHHIIiiII", 40, 90, 60, 1, bits, compression, len(lines), 0, 0, 0, 0)
    return lambda: b"BM" + struct.pack("<IHHI", begin + len(lines), 0, 0, begin) + head + masks + lines


def lab() -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(RGB, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


DEEP = COLOURS.astype(">u2") * 257
BGRX = np.concatenate([COLOURS[..., ::-1], np.full((60, 90, 1), 7, np.uint8)], -1)
FOUR = np.concatenate([COLOURS, GRAYS[..., None]], -1)
FIVE_BITS = ((COLOURS >> 3).astype("<u2") * np.array([1024, 32, 1], "<u2")).sum(-1, dtype="<u2")

ACCEPTED = {
    "JPEG": encoded(RGB, format="JPEG", quality=95),
    "JPEG, not subsampled": encoded(RGB, format="JPEG", quality=95, subsampling=0),
    "JPEG, gray": encoded(GRAY, format="JPEG", quality=95),
    "JPEG, CMYK": in_mode("CMYK", format="JPEG", quality=95),
    "JPEG, progressive": encoded(RGB, format="JPEG", quality=95, progressive=True),
    "PNG": encoded(RGB, format="PNG"),
    "PNG, interlaced": interlaced,
    "PNG, gray": encoded(GRAY, format="PNG"),
    "PNG, 1 bit": in_mode("1", format="PNG"),
    "PNG, 4-bit gray": png(4, 0, (GRAYS[:, ::2] & 0xF0) | (GRAYS[:, 1::2] >> 4)),
    "PNG, palette": in_mode("P", format="PNG"),
    "PNG, palette of 4": encoded(RGB.quantize(4), format="PNG"),
    "PNG, gray and alpha": in_mode("LA", format="PNG"),
    "PNG, alpha": with_alpha(format="PNG"),
    "PNG, 16-bit RGB": png(16, 2, DEEP.reshape(60, -1)),
    "PNG, 16-bit RGB, lower bytes": png(16, 2, (DEEP - DEEP % 256 + np.arange(270).reshape(90, 3) % 256).astype(">u2")),
    "PNG, 16-bit alpha": png(16, 6, (FOUR.astype(">u2") * 257).reshape(60, -1)),
    "BMP": encoded(RGB, format="BMP"),
    "BMP, gray": encoded(GRAY, format="BMP"),
    "BMP, 1 bit": in_mode("1", format="BMP"),
    "BMP, palette of 16": encoded(RGB.quantize(16), format="BMP"),
    "BMP, 32 bits": bmp(32, 0, BGRX),
    "BMP, 32 bits in fields": bmp(32, 3, BGRX, struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)),
    "WebP": encoded(RGB, format="WEBP", quality=90),
    "WebP, lossless with alpha": with_alpha(format="WEBP", lossless=True, exact=True),
    "PPM": netpbm("P6", 255, COLOURS),
    "PGM": netpbm("P5", 255, GRAYS),
    "PBM": in_mode("1", format="PPM"),
    "TIFF": encoded(RGB, format="TIFF"),
    "TIFF, gray": encoded(GRAY, format="TIFF"),
    "TIFF, gray, white is zero": tiff(8, 0, GRAYS.tobytes()),
    "TIFF, palette": in_mode("P", format="TIFF"),
    "TIFF, alpha": with_alpha(format="TIFF"),
    "TIFF, CMYK": in_mode("CMYK", format="TIFF"),
    "TIFF, big-endian": encoded(RGB, format="TIFF", big_tiff=True),
    **{
        f"TIFF, {name}": encoded(RGB, format="TIFF", compression=name)
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd")
    },
    "TIFF, JPEG in YCbCr": in_mode("YCbCr", format="TIFF", compression="jpeg"),
}

REFUSED = {
    "PNG, 16-bit gray": (
        encoded(Image.fromarray(GRAYS.astype(np.uint16) * 257), format="PNG"),
        "16-bit or 32-bit gray",
    ),
    "TIFF, 16-bit gray": (encoded(Image.fromarray(GRAYS.astype(np.uint16) * 257), format="TIFF"), "16-bit or 32-bit"),
    "TIFF, 32-bit gray": (encoded(Image.fromarray(GRAYS.astype(np.int32)), format="TIFF"), "16-bit or 32-bit"),
    "TIFF, floats": (encoded(Image.fromarray(GRAYS.astype(np.float32) / 255), format="TIFF"), "floating-point gray"),
    "TIFF, 1 bit": (in_mode("1", format="TIFF"), r"TIFF file of a kind \(mode 1, 1 bits\)"),
    "TIFF, 1 bit, group 4": (in_mode("1", format="TIFF", compression="group4"), "mode 1, 1 bits"),
    "TIFF, 4-bit gray": (tiff(4, 1, ((GRAYS[:, ::2] & 0xF0) | (GRAYS[:, 1::2] >> 4)).tobytes()), "mode L, 4 bits"),
    "TIFF, depth in 32-bit numbers": (
        lambda: tiff(8, 1, GRAYS.tobytes())().replace(struct.pack("<HH", 258, 3), struct.pack("<HH", 258, 4)),
        "mode L, 8 bits",
    ),
    "TIFF, signed": (tiff(8, 1, GRAYS.tobytes(), t339=2), "TIFF file of a kind"),
    "TIFF, 16-bit RGB": (tiff(16, 2, DEEP.astype("<u2").tobytes(), 3), "mode RGB, 16 bits"),
    "TIFF, multiplied by alpha": (tiff(8, 2, FOUR.tobytes(), 4, t338=1), "mode RGBA, 8 bits"),
    "TIFF, gray and alpha": (in_mode("LA", format="TIFF"), "mode LA"),
    "TIFF, LAB": (encoded(lab(), format="TIFF"), "mode LAB"),
    "TIFF, LZMA": (encoded(RGB, format="TIFF", compression="lzma"), "TIFF file of a kind"),
    "TIFF, rotated": (encoded(RGB, format="TIFF", tiffinfo={274: 6}), "TIFF file of a kind"),
    "PGM up to 1": (netpbm("P5", 1, GRAYS), "a maximum other than 255"),
    "PGM up to 100": (netpbm("P5", 100, GRAYS), "a maximum other than 255"),
    "PPM up to 200": (netpbm("P6", 200, COLOURS), "a maximum other than 255"),
    "PPM up to 1000": (netpbm("P6", 1000, COLOURS), "a maximum other than 255"),
    "PGM up to 65535": (netpbm("P5", 65535, GRAYS), "16-bit or 32-bit gray"),
    "PGM as text": (netpbm("P2", 255, GRAYS), "in text form"),
    "PPM as text": (netpbm("P3", 255, COLOURS), "in text form"),
    "PFM": (lambda: b"Pf\n90 60\n-1.0\n" + (GRAYS[::-1] / 255).astype("<f4").tobytes(), "floating-point gray"),
    "BMP, 16 bits": (bmp(16, 0, FIVE_BITS), "BMP file with 16 bits"),
    "BMP, 16 bits in fields": (
        bmp(16, 3, FIVE_BITS, struct.pack("<III", 0x7C00, 0x3E0, 0x1F)),
        "BMP file with 16 bits",
    ),
}


@pytest.mark.parametrize("make", ACCEPTED.values(), ids=ACCEPTED)
def test_an_accepted_kind_is_decoded_as_pillow_converts_it(make: Make) -> None:
    """Within 1 of 255 in the mean and, where chroma is subsampled and interpolated, 20 at worst."""
    data = make()
    assert why_unusable(data) is None
    with Image.open(BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"), np.float64)
    difference = np.abs(decode(data, "cpu", None) - expected)
    assert difference.mean() < 1
    assert difference.max() < 20


@pytest.mark.parametrize("verify", ["header", "full"])
@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_kind_that_is_not_supported_is_found_by_the_check(
    tmp_path: Path, make: Make, reason: str, verify: Verify
) -> None:
    (tmp_path / "image.bin").write_bytes(make())
    found = inspect(Span(tmp_path / "image.bin"), verify)
    assert found is not None
    assert re.search(reason, found)


def test_every_extension_has_an_accepted_kind() -> None:
    formats = {".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".pgm": "PGM", ".ppm": "PPM", ".webp": "WebP"}
    assert {formats.get(name, name[1:].upper()) for name in EXTENSIONS} <= {name.split(",")[0] for name in ACCEPTED}


def test_a_jpeg_with_arithmetic_codes_is_found_by_a_full_check(tmp_path: Path) -> None:
    """Here the marker alone says so: Pillow would decode such a file, DALI not."""
    data = ACCEPTED["JPEG"]()
    (tmp_path / "image.jpg").write_bytes(data.replace(b"\xff\xc0", b"\xff\xc9", 1))
    assert inspect(Span(tmp_path / "image.jpg")) == (
        "is a JPEG file of a kind (frame 0xc9) that is not supported: convert it to 8-bit gray or RGB"
    )


def test_a_jpeg_of_four_colours_without_adobes_mark_is_found_by_a_full_check(tmp_path: Path) -> None:
    """Pillow takes its values as they are, DALI inverts them."""
    data = ACCEPTED["JPEG, CMYK"]()
    at = data.index(b"Adobe") - 4  # the mark and its length
    (tmp_path / "image.jpg").write_bytes(data[:at] + data[at + 16 :])
    assert inspect(Span(tmp_path / "image.jpg")) == (
        "is a JPEG file of four colours without Adobe's mark, which is not supported: convert it to 8-bit gray or RGB"
    )


@pytest.mark.parametrize("verify", ["header", "full"])
def test_an_image_of_too_many_pixels_is_found_by_its_header(tmp_path: Path, verify: Verify) -> None:
    huge = png(8, 2, np.zeros((1, 1), np.uint8))().replace(struct.pack(">II", 90, 60), struct.pack(">II", 30000, 30000))
    (tmp_path / "huge.png").write_bytes(huge)
    assert inspect(Span(tmp_path / "huge.png"), verify) in ("has too many pixels", "is not a picture")
