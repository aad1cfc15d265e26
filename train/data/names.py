"""File names as they appear in messages and lists."""

import re
from pathlib import Path

# Control characters, separators of lines, the backslash itself, and bytes that are not UTF-8 (surrogates in Python).
_SPECIAL = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029\ud800-\udfff]")


def printable(name: str | Path) -> str:
    r"""Return a name on one line, in characters that every terminal and UTF-8 file can take.

    Line breaks, tabs, backslashes and bytes that are not UTF-8 are written as in a Python string.

    Example:
        >>> printable("two\nlines")
        'two\\nlines'
    """
    return _SPECIAL.sub(lambda match: _escaped(match[0]), str(name))


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # the byte that Python stands a lone surrogate for
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode() if character != "\\" else "\\\\"
