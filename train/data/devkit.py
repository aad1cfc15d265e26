"""ImageNet's ground truth: which class each validation image has.

The development kit numbers the classes (`ILSVRC2012_validation_ground_truth.txt`, one number a line in the order of
the images) and says in `meta.mat` which number is which WordNet id. A list names the classes itself, in any of the
forms that are in use: `<file> <class>`, `<file> <index of the sorted classes>`, Kaggle's `LOC_val_solution.csv`, or
one class a line in the order of the images.
"""

import codecs
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath

from sdnet.train.data.archives import read_members
from sdnet.train.data.formats import EXTENSIONS
from sdnet.train.data.names import printable
from sdnet.train.errors import UserError

KIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LISTS = ("val.txt", "val_labels.txt", "LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")

_SEPARATOR = re.compile(r"[\s,]+")


def find_truth(root: Path) -> Path | None:
    """Return the ground truth that lies in a folder: a list, or the development kit as an archive or unpacked."""
    names = (*LISTS, f"{KIT}.tar.gz", f"{KIT}.tar", KIT)
    return next((root / name for name in names if (root / name).exists()), None)


def read_truth(path: Path, files: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the label of each validation image, an index of `classes`.

    Args:
        path: A list, or the development kit as a folder, as an archive, or as its list of numbers beside its meta.mat.
        files: The names of the images, sorted.
        classes: The names of the classes, sorted; WordNet ids for the development kit.

    Raises:
        UserError: The ground truth is unreadable, of another length, lacks an image or a class, or is ambiguous.
    """
    here = printable(path)
    if path.is_dir() or path.name.endswith((".tar", ".tar.gz", ".tgz")):
        names = _read_kit(path)
    elif path.name == TRUTH and (path.parent / META).is_file():
        names = _read_kit(path.parent)
    else:
        names = _read_list(path, files, classes)
    if len(names) != len(files):
        raise UserError(f"{here} has {len(names)} labels for {len(files)} validation images.")
    index = {name: label for label, name in enumerate(classes)}
    unknown = next((name for name in names if name not in index), None)
    if unknown is not None and all(name.isascii() and name.isdigit() for name in names):
        index = _numbered(here, set(names), classes)
        unknown = next((name for name in names if name not in index), None)
    if unknown is not None:
        raise UserError(f"{here} names the class {printable(unknown)}, which the training set does not have.")
    return [index[name] for name in names]


def _numbered(here: str, numbers: set[str], classes: Sequence[str]) -> Mapping[str, int]:
    """Return which label each number stands for, if the numbers can only be indices of the classes.

    Raises:
        UserError: They may count from 1, or stand for classes whose names are numbers.
    """
    hint = "name the classes instead"
    values = {int(number) for number in numbers}
    if 0 not in values:
        raise UserError(
            f"The labels in {here} are numbers from {min(values)} to {max(values)}, which may count from 0 (the sorted "
            f"classes) or from 1 (the development kit's own numbers, which need its {META} beside {TRUTH}): {hint}."
        )
    if odd := next((name for at, name in enumerate(classes) if name.isdigit() and int(name) != at), None):
        raise UserError(
            f"The labels in {here} are numbers, and so is the name of class {printable(odd)}, which is not the class "
            f"of that index: {hint}."
        )
    return {number: int(number) for number in numbers if int(number) < len(classes)}


def _read_list(path: Path, files: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the class of each image by the names in a list, or in its order if it has no names.

    The name of a class may hold spaces and commas. Kaggle's table alone has further columns.
    """
    here, known = printable(path), set(classes)
    lines = [line.strip() for line in _lines(path) if line.strip()]
    if all(line in known for line in lines):
        return lines
    rows = [_SEPARATOR.split(line, maxsplit=1) for line in lines]
    if rows[0][0] == "ImageId":
        rows = [[name, *(_SEPARATOR.split(others)[0] for others in rest)] for name, *rest in rows[1:]]
    if all(len(row) == 1 for row in rows):
        return [row[0] for row in rows]
    if short := next((row for row in rows if len(row) < 2), None):
        raise UserError(f"The list {here} has a line without a label: {printable(short[0])}.")
    listed: dict[str, str] = {}
    for name, label in rows:
        if listed.setdefault(name, label) != label:
            raise UserError(f"The list {here} gives {printable(name)} two labels: {listed[name]} and {label}.")
    # A row may give the path of an image, its name, or its name without the extension.
    base_names = _unambiguous({name: _base(name) for name in listed}, listed)
    stems = _unambiguous({name: _stem(name) for name in listed}, listed)
    bases, sharing = (Counter(map(short, files)) for short in (_base, _stem))
    labels: list[str] = []
    for file in files:
        base, stem = _base(file), _stem(file)
        label = listed.get(file)
        if label is None and bases[base] == 1:
            label = base_names.get(base)
        if label is None and sharing[stem] == 1:
            label = stems.get(stem)
        if label is None:
            reason = "" if sharing[stem] == 1 else f" alone: {sharing[stem]} images are called {printable(stem)}"
            raise UserError(f"The list {here} has no label for {printable(file)}{reason}.")
        labels.append(label)
    return labels


def _unambiguous(short: Mapping[str, str], labels: Mapping[str, str]) -> dict[str, str]:
    """Return the label of every short name that stands for one listed name alone."""
    counts = Counter(short.values())
    return {short[name]: label for name, label in labels.items() if counts[short[name]] == 1}


def _base(name: str) -> str:
    """Return the last part of a path."""
    return PurePosixPath(name).name


def _stem(name: str) -> str:
    """Return the last part of a path without the extension of an image."""
    base = PurePosixPath(name)
    return base.stem if base.suffix.lower() in EXTENSIONS else base.name


def _lines(path: Path) -> list[str]:
    """Return the lines of a text in UTF-8, or in UTF-16 with its mark; names in it may hold other bytes."""
    try:
        data = path.read_bytes()
        utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = data.decode("utf-16") if utf16 else data.decode("utf-8-sig", errors="surrogateescape")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The list {printable(path)} cannot be read: {error}.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _read_kit(path: Path) -> list[str]:
    """Return the WordNet id of each validation image, in their order."""
    here = printable(path)
    if path.is_dir():
        found = {name: next(iter(sorted(path.rglob(name))), None) for name in (TRUTH, META)}
        try:
            contents = {name: file.read_bytes() for name, file in found.items() if file}
        except OSError as error:
            raise UserError(f"The development kit {here} cannot be read: {error}.") from error
    else:
        members = read_members(path, lambda name: name.endswith(("/" + TRUTH, "/" + META)))
        contents = {name.rsplit("/", 1)[-1]: data for name, data in members.items()}
    if missing := [name for name in (TRUTH, META) if name not in contents]:
        raise UserError(f"The development kit {here} lacks {' and '.join(missing)}.")
    wnids = _read_meta(contents[META], here)
    lines = contents[TRUTH].removeprefix(codecs.BOM_UTF8).split()
    if strange := next((line for line in lines if not line.isdigit() or int(line) not in wnids), None):
        raise UserError(f"The development kit {here} gives an image the number {strange!r}, which is no class of it.")
    return [wnids[int(line)] for line in lines]


def _read_meta(data: bytes, kit: str) -> dict[int, str]:
    """Return the WordNet id of each number of a class in meta.mat."""
    from scipy.io import loadmat  # heavy, and for the development kit alone

    try:
        synsets = loadmat(BytesIO(data), variable_names=["synsets"], squeeze_me=True)["synsets"].reshape(-1)
        leaves = [row for row in synsets if not int(row["num_children"])]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except Exception as error:  # SciPy raises exceptions of every kind on broken files
        raise UserError(f"The {META} of the development kit {kit} cannot be read: {error}.") from error
