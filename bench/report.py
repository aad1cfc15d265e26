"""`report`: from the ledger to the tables and plots in the documents.

A document holds pairs of marks, and everything between them is written by this command:

    <!-- bench:VIEW name=value name=one,other -->
    <!-- /bench -->

VIEW is one of VIEWS. The conditions choose rows by what a row, its shape, settings or environment holds (`dtype=bf16`,
`device_type=cuda`). Of the rows that are left, each device's newest run is shown, with what it was measured on, its
commit, date and command, and a link to its lines. A run's figures are never mixed with another's.
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from sdnet.bench import plots, tables
from sdnet.bench.ledger import RESULTS, Row, read
from sdnet.train.errors import UserError

DOCUMENTS = (Path("README.md"), Path("docs/performance.md"))
PICTURES = Path("docs/figures/bench")
MARK = re.compile(r"(<!-- bench:(\S+)([^\n]*?) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
NOTHING = "Not measured yet.\n"

Found = tuple[Path, Row]
TABLES: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "kernels": ("kernels", tables.kernels_table),
    "train": ("train", tables.training_table),
    "ratios": ("train", tables.ratios_table),
    "load": ("load", tables.loading_table),
    "profile": ("profile", tables.profile_table),
}
PLOTS: dict[str, tuple[str, str, Callable[[Sequence[Row], Path], bool]]] = {
    "plot-training": ("train", "Training speed over ResNet-18's", plots.training_ratios),
    "plot-steps": ("train", "Where a training step goes", plots.step_bars),
    "plot-batch": ("train", "Training speed over the batch", lambda r, p: plots.over(r, p, "batch", "batch")),
    "plot-n-steps": ("train", "Cost of steps", lambda r, p: plots.over(r, p, "n_steps", "unrolled steps per layer")),
    "plot-kernels": ("kernels", "Speed of the CSC layer over torch", plots.kernel_ratios),
    "plot-roofline": ("kernels", "The CSC layer below the roofline", plots.roofline),
}
VIEWS = (*TABLES, *PLOTS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"the ledger's folder; default {RESULTS}")
    parser.add_argument(
        "--document", type=Path, nargs="+", default=DOCUMENTS, help="default README.md and performance.md"
    )
    parser.add_argument("--pictures", type=Path, default=PICTURES, help=f"where plots go; default {PICTURES}")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a document would change")
    parser.add_argument("--whole", type=Path, metavar="FILE", help="write all there is into one new document instead")


def run(options: argparse.Namespace) -> int:
    """Bring the documents up to date, or say which are not."""
    found = list(read(options.results))
    if options.whole:
        options.whole.write_text(whole_report(found, options.whole))
        print(f"{len(found)} rows told in {options.whole}")
        return 0
    stale = []
    for document in options.document:
        if not document.is_file():
            raise UserError(f"There is no document {document}; run this from the root of a checkout.")
        before = document.read_text()
        after = filled(before, found, document, options.pictures, dry=options.check)
        if after != before:
            stale.append(str(document))
            if not options.check:
                document.write_text(after)
    if options.check and stale:
        print(f"Not what the ledger says: {', '.join(stale)}. Run python -m sdnet.bench report.")
        return 1
    print(f"Up to date: {', '.join(map(str, options.document))}.")
    return 0


def filled(text: str, found: Sequence[Found], document: Path, pictures: Path, dry: bool = False) -> str:
    """The text with what belongs between its marks; `dry` draws no plots.

    Raises:
        UserError: a mark asks for a view or a condition that does not exist.
    """

    def block(match: re.Match[str]) -> str:
        opening, view, conditions, _, closing = match.groups()
        return opening + render(view, parse_conditions(conditions), found, document, pictures, dry) + closing

    return MARK.sub(block, text)


def parse_conditions(text: str) -> dict[str, list[str]]:
    """name=one,other ... as a dictionary."""
    pairs = [word.partition("=") for word in text.split()]
    if wrong := [name for name, sign, values in pairs if not (name and sign and values)]:
        raise UserError(f"A mark has the condition {wrong[0]!r}; conditions are name=value.")
    return {name: values.split(",") for name, _, values in pairs}


def render(
    view: str, conditions: Mapping[str, list[str]], found: Sequence[Found], document: Path, pictures: Path, dry: bool
) -> str:
    """What stands between one pair of marks."""
    if view not in VIEWS:
        raise UserError(f"A mark in {document} asks for {view!r}; it must be one of {', '.join(VIEWS)}.")
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
    """Whether a row has one of the wanted values under every name."""
    values = {**row.environment, **row.settings, **row.shape, **asdict(row)}
    return all(name in values and str(values[name]) in wanted for name, wanted in conditions.items())


def newest_runs(found: Iterable[Found]) -> dict[str, list[Found]]:
    """The rows of the newest run of each device. Names of runs sort by date."""
    found = list(found)
    newest: dict[str, str] = {}
    for _, row in found:
        device = row.environment["device"]
        newest[device] = max(newest.get(device, ""), row.run)
    runs: dict[str, list[Found]] = {}
    for path, row in found:
        if newest[row.environment["device"]] == row.run:
            runs.setdefault(row.environment["device"], []).append((path, row))
    return runs


def caption(members: Sequence[Found], document: Path) -> str:
    """On what, with which versions, from which commit, when, by which command, and where the lines are."""
    (path, row), facts = members[0], members[0][1].environment
    hardware = [facts["device"], f"driver {facts['driver']}" if facts["driver"] else f"{facts['threads']} threads"]
    versions = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    commit = f"commit {facts['commit'][:10]}" if facts["commit"] else "no commit"
    words = [*hardware, *versions, commit + (" with changes" if facts["dirty"] else ""), facts["date"][:10]]
    return f"<sub>{', '.join(words)}; [lines]({relative(path, document)}) of run {row.run}: `{facts['command']}`</sub>"


def relative(path: Path, document: Path) -> str:
    """A link from a document to a file."""
    return Path(os.path.relpath(path, document.parent)).as_posix()


def whole_report(found: Sequence[Found], document: Path) -> str:
    """Every run of a ledger, one after the other, with the plots beside the document."""
    parts = ["# Measured\n"]
    for run in sorted({row.run for _, row in found}):
        members = [(path, row) for path, row in found if row.run == run]
        theme = members[0][1].theme
        parts.append(f"## {theme}, {run}\n\n{render(theme, {'run': [run]}, members, document, document.parent, False)}")
        for view, (of, _, _) in PLOTS.items():
            if of == theme:
                plot = render(view, {"run": [run]}, members, document, document.parent, False)
                parts += [] if plot == NOTHING else [plot]
    return "\n".join(parts)
