"""Which files are images that can be used.

Training decodes with DALI (`train/imagenet.py`) or with Pillow (`train/cifar.py`). A kind of image is accepted if
DALI's CPU decoder gives the pixels of Pillow's `convert("RGB")`, which a test checks for every kind; any other kind is
refused before the run, for it would be decoded wrongly or not at all.
"""

from io import BytesIO

from PIL import Image, PpmImagePlugin, TiffImagePlugin, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "TIFF", "WEBP")  # those that Pillow may recognise
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**26)  # what Pillow decodes at most
HEAD, TAIL = 26, 12  # bytes that `looks_whole` needs

_ADVICE = "convert it to 8-bit gray or RGB"
# Values of TIFF tags. Compression: none, LZW, JPEG, two names of Deflate, PackBits, Zstandard. Photometric
# interpretation: gray either way, RGB, palette, CMYK, and YCbCr, which JPEG uses.
_TIFF_COMPRESSIONS = (1, 5, 7, 8, 32946, 32773, 50000)
_TIFF_PHOTOMETRIC = (0, 1, 2, 3, 5, 6)
_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; not lossless, not arithmetic
_BMP_LAYOUTS = {0: (1, 4, 8, 24, 32), 1: (8,), 3: (32,)}  # compression none, run lengths, bit fields: bits per pixel


def why_unusable(data: bytes) -> str | None:
    """Return why these bytes cannot be used as an image, None if they can; decodes them."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            if reason := why_unsupported(image, data):
                return reason
            image.load()
    except UnidentifiedImageError:
        return "is not a picture" if data else "is empty"
    except Image.DecompressionBombError:
        return "has too many pixels"
    except Exception as error:  # Pillow raises exceptions of every kind on broken files
        return "is truncated" if "truncated" in str(error).lower() else f"cannot be decoded: {error}"
    return None


def why_unsupported(image: Image.Image, data: bytes) -> str | None:
    """Return why DALI and Pillow would not decode an opened image alike, None if they do."""
    if image.mode.startswith(("I", "F")):
        kind = "floating-point" if image.mode.startswith("F") else "16-bit or 32-bit"
        return f"has {kind} gray values, which are not supported: {_ADVICE}"
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _why_unsupported_tiff(image)
    if isinstance(image, PpmImagePlugin.PpmImageFile) and image.tile[0][0] != "raw":
        return f"is a PGM or PPM file in text form or with a maximum other than 255, which is not supported: {_ADVICE}"
    if image.format in ("JPEG", "MPO") and (frame := _jpeg_frame(data)) not in _JPEG_FRAMES:
        return f"is a JPEG file of a kind (frame {frame:#x}) that is not supported: {_ADVICE}"
    if image.format in ("JPEG", "MPO") and image.mode == "CMYK" and "adobe" not in image.info:
        return f"is a JPEG file of four colours without Adobe's mark, which is not supported: {_ADVICE}"
    if image.format == "BMP" and int.from_bytes(data[14:18], "little") >= 40:  # older headers are plain
        bits, compression = (int.from_bytes(data[at : at + 2], "little") for at in (28, 30))
        if bits not in _BMP_LAYOUTS.get(compression, ()):
            return f"is a BMP file with {bits} bits and compression {compression}, which is not supported: {_ADVICE}"
    return None


def looks_whole(head: bytes, tail: bytes) -> bool:
    """Return whether the first `HEAD` and last `TAIL` bytes are those of a complete JPEG or a supported PNG file."""
    jpeg = head.startswith(b"\xff\xd8\xff") and tail.endswith(b"\xff\xd9")
    png = head.startswith(b"\x89PNG\r\n\x1a\n") and tail == b"\0\0\0\0IEND\xaeB`\x82"
    return jpeg or (png and head[24:26] != b"\x10\0" and _png_pixels(head) <= MOST_PIXELS)  # not 16-bit gray


def _png_pixels(head: bytes) -> int:
    """Return the number of pixels of a PNG file."""
    return int.from_bytes(head[16:20], "big") * int.from_bytes(head[20:24], "big")


def _jpeg_frame(data: bytes) -> int:
    """Return the marker of a JPEG's frame, which tells how it is coded; 0 if there is none."""
    at = 2
    while at + 4 <= len(data):
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at] != 0xFF:
            break
        if marker == 0xFF:  # a byte that fills
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # not tables of codes, nor an extension
            return marker
        else:
            at += 2 + length
    return 0


def _why_unsupported_tiff(image: TiffImagePlugin.TiffImageFile) -> str | None:
    """Accept 8-bit TIFF files of plain layouts only: the format has many more than either library decodes."""
    tags = image.tag_v2
    bits, samples, extra = tags.get(258, (1,)), tags.get(339, (1,)), tags.get(338, (0,))
    accepted = (
        set(bits) == {8}
        and tags.tagtype.get(258) == 3  # DALI takes this tag as 16-bit numbers only
        and set(samples) == {1}  # unsigned integers
        and 1 not in extra  # colours multiplied by alpha
        and tags.get(262) in _TIFF_PHOTOMETRIC
        and tags.get(259, 1) in _TIFF_COMPRESSIONS
        and tags.get(274, 1) == 1  # Pillow turns what has a rotation flag
        and image.mode in ("L", "P", "RGB", "RGBA", "CMYK")
    )
    if accepted:
        return None
    return f"is a TIFF file of a kind (mode {image.mode}, {bits[0]} bits) that is not supported: {_ADVICE}"
