"""ImageNet's ground truth: which class each validation picture has.

The development kit numbers the classes (`ILSVRC2012_validation_ground_truth.txt`, one number a line in the order of
the pictures) and says in `meta.mat` which number is which WordNet id. A given list says it itself, in any of the forms
that are in use: `<file> <wnid>`, `<file> <index of the sorted wnids>`, `LOC_val_solution.csv` of Kaggle, or one wnid a
line in the order of the pictures.
"""

import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdnet.train.data.archives import read_members
from sdnet.train.errors import UserError

KIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LISTS = ("val.txt", "val_labels.txt", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")


def find_truth(root: Path) -> Path | None:
    """The ground truth that lies in a folder: a list, or the development kit as an archive or unpacked."""
    names = (*LISTS, f"{KIT}.tar.gz", f"{KIT}.tar", KIT)
    return next((root / name for name in names if (root / name).exists()), None)


def read_truth(path: Path, files: Sequence[str], classes: Sequence[str]) -> list[int]:
    """The label of each validation picture, an index of `classes`.

    Args:
        path: a list, or the development kit as a folder or an archive.
        files: names of the pictures, sorted.
        classes: WordNet ids, sorted.

    Raises:
        UserError: the list is unreadable, of another length, or lacks a picture or a class.
    """
    if path.is_dir() or path.name.endswith((".tar", ".tar.gz", ".tgz")):
        names = _read_kit(path)
    else:
        names = _read_list(path, files)
    if len(names) != len(files):
        raise UserError(f"{path} has {len(names)} labels for {len(files)} validation pictures.")
    index = {name: label for label, name in enumerate(classes)} | {str(label): label for label in range(len(classes))}
    if unknown := next((name for name in names if name not in index), None):
        raise UserError(f"{path} names the class {unknown}, which the training set does not have.")
    return [index[name] for name in names]


def _read_list(path: Path, files: Sequence[str]) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {path} cannot be read: {error}.") from error
    rows = [re.split(r"[\s,]+", line.strip()) for line in lines if line.strip() and not line.startswith("ImageId,")]
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    if short := next((row for row in rows if len(row) < 2), None):
        raise UserError(f"The list {path} has a line without a label: {short[0]}.")
    known = {Path(row[0]).stem: row[1] for row in rows}
    if missing := next((file for file in files if Path(file).stem not in known), None):
        raise UserError(f"The list {path} has no label for {missing}.")
    return [known[Path(file).stem] for file in files]


def _read_kit(path: Path) -> list[str]:
    """The WordNet id of each validation picture, in their order."""
    if path.is_dir():
        found = {name: next(iter(sorted(path.rglob(name))), None) for name in (TRUTH, META)}
        contents = {name: file.read_bytes() for name, file in found.items() if file}
    else:
        members = read_members(path, lambda name: name.endswith(("/" + TRUTH, "/" + META)))
        contents = {name.rsplit("/", 1)[-1]: data for name, data in members.items()}
    if missing := [name for name in (TRUTH, META) if name not in contents]:
        raise UserError(f"The development kit {path} lacks {' and '.join(missing)}.")
    try:
        synsets = read_mat(contents[META])["synsets"]
        wnids = {int(entry["ILSVRC2012_ID"][0]): entry["WNID"] for entry in synsets if not entry["num_children"][0]}
        return [wnids[int(line)] for line in contents[TRUTH].split()]
    except (KeyError, ValueError, IndexError, TypeError, struct.error, zlib.error) as error:
        raise UserError(f"The development kit {path} cannot be understood: {type(error).__name__} {error}.") from error


# MATLAB's level 5 format: tagged elements, matrices nested in structures, each variable compressed by itself.
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR = 1, 2, 4


def read_mat(data: bytes) -> dict[str, Any]:
    """The variables of a little-endian MATLAB 5 file: numbers and cells as lists, structures as lists of dictionaries.

    Raises:
        ValueError: it is no such file.
    """
    if len(data) < 128 or data[126:128] != b"IM":
        raise ValueError("not a little-endian MATLAB 5 file")
    variables: dict[str, Any] = {}
    for kind, payload in _elements(data[128:]):
        inner = _elements(zlib.decompress(payload)) if kind == _COMPRESSED else [(kind, payload)]
        for kind, payload in inner:
            if kind == _MATRIX:
                name, value = _matrix(payload)
                variables[name] = value
    return variables


def _elements(data: bytes) -> list[tuple[int, bytes]]:
    elements: list[tuple[int, bytes]] = []
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        if kind >> 16:  # a small element: its size shares the tag, its bytes follow at once
            kind, size, begin, after = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        else:
            begin = at + 8
            after = begin + size if kind == _COMPRESSED else begin + -(-size // 8) * 8
        if begin + size > len(data):
            raise ValueError("an element breaks off")
        elements.append((kind, data[begin : begin + size]))
        at = after
    return elements


def _matrix(data: bytes) -> tuple[str, Any]:
    """Name and value of a matrix."""
    if not data:
        return "", []
    (_, flags), _, (_, name), *parts = _elements(data)
    kind = flags[0]
    if kind == _STRUCT:
        (_, width), (_, joined), *values = parts
        step = struct.unpack("<i", width)[0]
        fields = [joined[at : at + step].split(b"\0")[0].decode() for at in range(0, len(joined), step)]
        cells = [_matrix(payload)[1] for _, payload in values]
        rows = [
            dict(zip(fields, cells[at : at + len(fields)], strict=True)) for at in range(0, len(cells), len(fields))
        ]
        return name.decode(), rows
    if kind == _CELL:
        return name.decode(), [_matrix(payload)[1] for _, payload in parts]
    if not parts:
        return name.decode(), "" if kind == _CHAR else []
    stored, payload = parts[0]
    if kind == _CHAR:
        return name.decode(), payload.decode("utf-16-le" if stored in (4, 17) else "utf-8")
    form = _NUMBERS[stored]
    return name.decode(), list(struct.unpack(f"<{len(payload) // struct.calcsize(form)}{form}", payload))
