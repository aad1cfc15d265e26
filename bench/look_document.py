"""What `look --document` writes between the marks of a document: the network, the table of its layers and two figures.

    <!-- look -->
    <!-- /look -->

The figures lie in figures/look/ beside the document.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sdnet
from sdnet.files import write_atomically, write_text
from sdnet.train.errors import UserError

MARKS = re.compile(r"(<!-- look -->\n).*?(<!-- /look -->)", re.DOTALL)
FIGURES = {
    "inversions.png": "The photograph, and the pictures rebuilt from the codes of every layer",
    "objective.png": "Objective over FISTA iterations, relative to the minimum, for every layer",
}
ACCURACIES = {"test_top1": "test images", "val_top1": "validation images"}
"""Entries of the header of a weights file, and what they were measured on."""


def check(document: Path) -> None:
    """Raise a UserError unless a document is a file with one pair of marks."""
    if not document.is_file():
        raise UserError(f"--document is {document}, which is not a file.")
    if len(MARKS.findall(text_of(document))) != 1:
        raise UserError(f"--document is {document}; it must have one pair of marks <!-- look --> and <!-- /look -->.")


def text_of(document: Path) -> str:
    """Return the text of a document; raise a UserError if it is not UTF-8."""
    try:
        return document.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--document is {document}, which is not UTF-8 text.") from error


def write(
    document: Path,
    model: sdnet.SDNet,
    header: Mapping[str, str],
    note: str,
    layers: Mapping[str, Mapping[str, Any]],
    table: str,
    drawn: Path,
) -> None:
    """Copy the figures, then write the text between the marks.

    Args:
        document: The document.
        model: The network.
        header: The facts in the header of its weights file.
        note: A sentence about the data, or "".
        layers: The numbers of every layer.
        table: The same as a table.
        drawn: The folder of the figures.
    """
    folder = document.parent / "figures" / "look"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [described(model, header), *([note] if note else []), "", table, ""]
    for name, text in FIGURES.items():
        content = (drawn / name).read_bytes()
        write_atomically(folder / name, lambda path, content=content: path.write_bytes(content))
        lines += [f"![{text}](figures/look/{name})", ""]
    lines.append(summary(layers))
    before = document.read_text(encoding="utf-8")
    after = MARKS.sub(lambda match: match[1] + "\n".join(lines) + "\n" + match[2], before)
    write_text(document, after)


def described(model: sdnet.SDNet, header: Mapping[str, str]) -> str:
    """Return one sentence about a network: its size, its training and its accuracy, as far as the header has them."""
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    shortcuts = "" if model.config["shortcut"] else " without shortcuts"
    text = f"The network is `{model.config['name']}`{shortcuts} of width {model.config['width']}"
    text += f": {count:.2f} million parameters"
    text += f", {header['epoch']} epochs" if "epoch" in header else ""
    text += f", seed {header['seed']}" if "seed" in header else ""
    for key, images in ACCURACIES.items():
        if key in header:
            return f"{text}, top-1 accuracy {float(header[key]):.2f} % on {images}."
    return f"{text}."


def summary(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one sentence on the layers alone, and one on the first and the last picture if there are two."""
    rebuilt = [(name, facts["psnr_matched"]) for name, facts in layers.items() if "psnr_matched" in facts]
    alone = [facts["layer_psnr"] for facts in layers.values()]
    text = f"Alone, the layers reconstruct their inputs with {min(alone):.1f} to {max(alone):.1f} dB."
    if len(rebuilt) < 2:
        return text
    (first, most), (last, least) = rebuilt[0], rebuilt[-1]
    pictures = (
        f"With matched contrast, the picture from `{first}` has {most:.1f} dB and that from `{last}` {least:.1f} dB."
    )
    return f"{pictures} {text}"
