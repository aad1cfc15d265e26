"""The command line of the training programs: one option per field of `Recipe`, and where things lie."""

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from sdnet.train.errors import DataError, UserError
from sdnet.train.job import BadFiles, Job, Verify
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder


def parse_job(recipes: Mapping[str, Callable[[], Recipe]], default: str, argv: Sequence[str] | None = None) -> Job:
    """The job that the command line asks for.

    Raises:
        UserError: a value out of range, an --out that holds a run, or a --resume with another recipe (which fields).
    """
    options = vars(_parser(recipes, default).parse_args(argv))
    changes = {item.name: options[item.name] for item in fields(Recipe) if item.name in options}
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()}
    chosen, out, resume = options["recipe"], options["out"], options["resume"]
    if resume is None:
        recipe = replace(recipes[chosen or default](), **changes)
        run = RunFolder(out or Path("runs", recipe.name))
        run.check_unused()
    else:
        run = RunFolder(resume)
        stored = run.recipe()
        recipe = replace(recipes[chosen]() if chosen else stored, **changes)
        if differences := recipe.differences(stored):
            raise UserError(f"{resume} cannot be resumed with another recipe; {'; '.join(differences)}.")
    for name, least in (("threads", 0), ("log_every", 1), ("prefetch", 1)):
        if options[name] < least:
            raise UserError(f"{name} is {options[name]}; it must be at least {least}.")
    if not 0 <= options["hw_decoder_load"] <= 1:
        raise UserError(f"hw_decoder_load is {options['hw_decoder_load']}; it must be between 0 and 1.")
    same = {item.name: options[item.name] for item in fields(Job) if item.name not in ("recipe", "run", "resume")}
    return Job(recipe=recipe, run=run, resume=resume is not None, **same)


def _parser(recipes: Mapping[str, Callable[[], Recipe]], default: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        usage="%(prog)s --data DIR [--recipe NAME] [--out RUN | --resume RUN] [settings]",
        description="Train on an image folder (train/<class>/* and val/<class>/*) or another source of pictures.\n"
        f"A recipe gives the settings, options override them; brackets show those of {default}.",
        epilog="recipes:\n" + "\n".join(f"  {name:22} {recipe.__doc__}" for name, recipe in recipes.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=110),
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="where the pictures are")
    parser.add_argument("--recipe", choices=recipes, metavar="NAME", help=f"one of those below [{default}]")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="RUN", help="folder of a new run [runs/<name>]")
    place.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    parser.add_argument("--log-every", type=int, default=20, metavar="INT", help="steps between reports [20]")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--verify", choices=get_args(Verify), default="header", help="look at, or decode, each picture [header]"
    )
    data.add_argument(
        "--bad-files", choices=get_args(BadFiles), default="fail", help="what to do with broken ones [fail]"
    )
    data.add_argument("--val-labels", type=Path, metavar="FILE", help="ground truth of a flat validation folder")
    data.add_argument("--threads", type=int, default=0, metavar="INT", help="decoding threads [its share of the cores]")
    data.add_argument(
        "--prefetch", type=int, default=2, metavar="INT", help="batches that DALI works on in advance [2]"
    )
    data.add_argument(
        "--hw-decoder-load", type=float, default=0.65, metavar="FLOAT", help="share for the GPU's JPEG unit [0.65]"
    )

    groups: dict[str, Any] = {}
    hints, shown = get_type_hints(Recipe), recipes[default]()
    for item in fields(Recipe):
        title = item.metadata["group"]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        groups[title].add_argument(
            "--" + item.name.replace("_", "-"),
            dest=item.name,
            default=argparse.SUPPRESS,
            help=f"{item.metadata['help']} [{_show(getattr(shown, item.name))}]",
            **_argument(hints[item.name]),
        )
    return parser


def _argument(hint: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        return {"type": kind, "nargs": "*", "metavar": kind.__name__.upper()}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _show(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@contextmanager
def user_errors() -> Iterator[None]:
    """Ends the program with the sentence of a `UserError`, said once, instead of a traceback."""
    try:
        yield
    except UserError as error:
        said_here = isinstance(error, DataError) or os.environ.get("RANK", "0") == "0"
        raise SystemExit(f"error: {error}" if said_here else 1) from None
