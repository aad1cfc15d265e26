"""`report`: writes the tables and plots of the documents from the ledger.

A document holds pairs of marks, and this command writes everything between them:

    <!-- bench:VIEW name=value name=one,other -->
    <!-- /bench -->

VIEW is one of VIEWS. The conditions select rows by the fields of a row, its shape, settings or environment
(`dtype=bf16`, `device_type=cuda`). Of the selected rows, the newest run on each device is shown, with a caption that
names device, versions, date and file. Figures of different runs are never mixed.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sdnet.bench import look_document, plots, tables
from sdnet.bench.ledger import RESULTS, ROOT, Row, read
from sdnet.bench.reproduce import tables as card_tables
from sdnet.bench.reproduce.cards import CARDS, read_cards
from sdnet.files import write_text
from sdnet.train.errors import UserError

DOCUMENT = ROOT / "docs" / "performance.md"
CARD_DOCUMENTS = (ROOT / "docs" / "robustness.md", ROOT / "docs" / "reproduction.md")
"""The documents whose tables are made of cards, see `sdnet.bench.reproduce`."""

PICTURES = ROOT / "docs" / "figures" / "bench"
MARK = re.compile(r"^(<!-- bench:(\S+)([^\n]*?) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL | re.MULTILINE)
OPENING = re.compile(r"^<!-- bench:", re.MULTILINE)
NOTHING = "Not measured yet.\n"
VERSIONS = ("torch", "triton")

Found = tuple[Path, Row]
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "kernels": ("kernels", tables.kernels_table),
    "train": ("train", tables.training_table),
    "inference": ("inference", tables.inference_table),
    "load": ("load", tables.loading_table),
    "profile": ("profile", tables.profile_table),
    "margins": ("margins", tables.margins_table),
    "counts": ("counts", tables.counts_table),
    "gpu": ("gpu", tables.gpu_table),
}
PLOTS: dict[str, tuple[str, str, Callable[[Sequence[Row], Path], bool]]] = {
    "plot-training": ("train", "Training speed over ResNet-18's", plots.training_ratios),
    "plot-steps": ("train", "Milliseconds of a training step by phase", plots.step_bars),
    "plot-batch": ("train", "Training speed over the batch", lambda r, p: plots.over(r, p, "batch", "batch")),
    "plot-n-steps": ("train", "Cost of steps", lambda r, p: plots.over(r, p, "n_steps", "unrolled steps per layer")),
    "plot-kernels": ("kernels", "Speed of the CSC layer over PyTorch", plots.kernel_ratios),
    "plot-roofline": ("kernels", "The CSC layer below the roofline", plots.roofline),
}
VIEWS = (*TABLES, *PLOTS, *card_tables.VIEWS, card_tables.CURVES)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("--results", type=Path, default=RESULTS, help="the ledger's folder; default the checkout's")
    parser.add_argument("--document", type=Path, nargs="+", default=[DOCUMENT, *CARD_DOCUMENTS], help="default all")
    parser.add_argument(
        "--pictures", type=Path, default=PICTURES, help="folder of the plots; default docs/figures/bench"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document would change")
    parser.add_argument("--whole", type=Path, metavar="FILE", help="write all runs into one new document instead")


def run(options: argparse.Namespace) -> int:
    """Bring the documents up to date; with --check, return 1 if one is not."""
    found = list(read(options.results))
    if options.whole:
        write_text(options.whole, whole_report(found, options.whole))
        print(f"{len(found)} rows shown in {options.whole}")
        return 0
    stale = []
    for document in options.document:
        if not document.is_file():
            raise UserError(f"--document is {document}, which is not a file.")
        before = look_document.text_of(document)
        after = filled(before, found, document, options.pictures, options.check, options.results / CARDS)
        if after != before:
            stale.append(str(document))
            if not options.check:
                write_text(document, after)
    if options.check and stale:
        print(f"Not what the ledger holds: {', '.join(stale)}. Run python -m sdnet.bench report.")
        return 1
    print(f"Up to date: {', '.join(map(str, options.document))}.")
    return 0


def filled(
    text: str,
    found: Sequence[Found],
    document: Path,
    pictures: Path,
    dry: bool = False,
    cards: Path = RESULTS / CARDS,
) -> str:
    """Return the text with the tables and plots between its marks.

    Args:
        text: The text of the document.
        found: The rows of the ledger, each with its file.
        document: The file of the document, which its links are relative to.
        pictures: The folder of the plots.
        dry: Draw no plots.
        cards: The folder of the cards.

    Raises:
        UserError: A mark is not closed, asks for a view that does not exist, or has a condition that is not name=value.
    """

    def block(match: re.Match[str]) -> str:
        opening, view, conditions, _, closing = match.groups()
        text = render(view, parse_conditions(conditions), found, document, pictures, dry, cards)
        return opening + text + closing

    if len(OPENING.findall(text)) != len(MARK.findall(text)):
        raise UserError(f"A mark <!-- bench:... --> in {document} is not closed by <!-- /bench -->.")
    return MARK.sub(block, text)


def parse_conditions(text: str) -> dict[str, list[str]]:
    """Return the conditions name=one,other of a mark as a dictionary."""
    pairs = [word.partition("=") for word in text.split()]
    if wrong := [name for name, sign, values in pairs if not (name and sign and values)]:
        raise UserError(f"A mark has the condition {wrong[0]!r}; conditions are name=value.")
    return {name: values.split(",") for name, _, values in pairs}


def render(
    view: str,
    conditions: Mapping[str, list[str]],
    found: Sequence[Found],
    document: Path,
    pictures: Path,
    dry: bool,
    cards: Path,
) -> str:
    """Return the text between one pair of marks."""
    if view not in VIEWS:
        raise UserError(f"A mark in {document} asks for {view!r}; it must be one of {', '.join(VIEWS)}.")
    if view in (*card_tables.VIEWS, card_tables.CURVES):
        link = relative(pictures, document)
        return card_tables.render(view, conditions, read_cards(cards), pictures, link, dry)
    theme = (TABLES.get(view) or PLOTS[view])[0]
    chosen = [(path, row) for path, row in found if row.theme == theme and meets(row, conditions)]
    parts = []
    for members in newest_runs(chosen).values():
        rows = [row for _, row in members]
        if view in TABLES:
            parts.append(f"{TABLES[view][1](rows)}\n\n{caption(members, document)}\n")
            continue
        _, title, draw = PLOTS[view]
        words = [view, rows[0].environment["device"], *(f"{k}-{'-'.join(v)}" for k, v in conditions.items())]
        picture = pictures / f"{re.sub(r'[^a-z0-9]+', '-', ' '.join(words).lower()).strip('-')}.png"
        if picture.exists() if dry else draw(rows, picture):
            parts.append(f"![{title}]({relative(picture, document)})\n\n{caption(members, document)}\n")
    return "\n".join(parts) or NOTHING


def meets(row: Row, conditions: Mapping[str, list[str]]) -> bool:
    """Return whether a row has one of the given values under every name."""
    values = {**row.environment, **row.settings, **row.shape, **asdict(row)}
    return all(name in values and str(values[name]) in allowed for name, allowed in conditions.items())


def newest_runs(found: Iterable[Found]) -> dict[str, list[Found]]:
    """Return the rows of the newest run on each device; names of runs sort by date."""
    runs: dict[str, dict[str, list[Found]]] = {}
    for path, row in found:
        runs.setdefault(row.environment["device"], {}).setdefault(row.run, []).append((path, row))
    return {device: of_device[max(of_device)] for device, of_device in runs.items()}


def caption(members: Sequence[Found], document: Path) -> str:
    """Return the device, the versions, the date and a link to the rows, which hold the commit and the command."""
    (path, row), facts = members[0], members[0][1].environment
    hardware = [facts["device"], f"driver {facts['driver']}" if facts["driver"] else f"{facts['threads']} threads"]
    versions = [f"{name} {facts['packages'][name]}" for name in VERSIONS if facts["packages"].get(name)]
    words = [*hardware, *versions, facts["date"][:10], f"[run {row.run}]({relative(path, document)})"]
    return f"<sub>{', '.join(words)}</sub>"


def relative(path: Path, document: Path) -> str:
    """Return the link from a document to a file."""
    return Path(os.path.relpath(path.resolve(), document.resolve().parent)).as_posix()


def whole_report(found: Sequence[Found], document: Path) -> str:
    """Return a document of every run of a ledger, with the plots beside it."""
    parts = ["# Measured\n"]
    for run in sorted({row.run for _, row in found}):
        members = [(path, row) for path, row in found if row.run == run]
        theme = members[0][1].theme
        views = [theme, *(view for view, (of, _, _) in PLOTS.items() if of == theme)]
        shown = [render(view, {"run": [run]}, members, document, document.parent, False, Path()) for view in views]
        parts.append(f"## {theme}, {run}\n")
        parts += [text for text in shown if text != NOTHING]
    return "\n".join(parts)
