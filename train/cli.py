"""The command line of the training programs: every setting of a `Recipe` and a `Job` is an option."""

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from sdnet.train.data.names import printable
from sdnet.train.errors import DataError, LostProcessError, UserError
from sdnet.train.interrupt import end_with_launcher
from sdnet.train.job import Job
from sdnet.train.overrides import override, read_overrides
from sdnet.train.recipes import Recipe
from sdnet.train.run_folder import RunFolder
from sdnet.train.settings import settings_of, type_hints

AUTO = Path("auto")
PATH_OPTIONS = ("--data", "--out", "--resume", "--checkpoint", "--val-labels")
Recipes = Mapping[str, Callable[[], Recipe]]


def parse_job(recipes: Recipes, default: str, argv: Sequence[str] | None = None) -> Job:
    """Return the job that a command line describes.

    The defaults of the settings are those of the recipe that --recipe names, or of the run that --resume names.

    Args:
        recipes: The recipes that --recipe can name.
        default: The recipe of a new run without --recipe.
        argv: The arguments; None for those of the process.

    Raises:
        UserError: A value is not allowed, --out names a folder that cannot be used, or --resume names a folder with no
            run, with a damaged one or with another recipe.
        SystemExit: The arguments ask for help or cannot be parsed.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    check_paths(argv)
    asks_for_help = not {"-h", "--help"}.isdisjoint(argv)
    where = _place(recipes, default)
    place, _ = _parse(make_dataclass("Place", where), argv, return_unknown_args=True, add_help=False)
    stored, before, out = None, None, place.out
    notes: tuple[str, ...] = ()
    changes = read_overrides(place.override)
    if place.resume is not None and not asks_for_help:
        out = _folder_to_resume(place.out, place.resume)
        if place.resume != AUTO or RunFolder(out).has_checkpoint():
            before, notes = RunFolder(out).check_resumable()
            stored = override(before, changes)
    elif changes and not asks_for_help:
        raise UserError("--override changes a run that is resumed; give a new run the options themselves.")
    base = stored if stored and not place.recipe else recipes[place.recipe or default]()

    groups = asdict(_parse(_options(where, base), argv, description=_description(recipes)))
    values = {name: value for group in groups.values() for name, value in group.items()}
    recipe = base.with_settings(values | changes)
    for name, reason in recipe.unused().items():
        if (value := getattr(recipe, name)) != getattr(before or base, name):
            notes += (f"{name} is {value}, which has no effect: {reason}.",)
    run = RunFolder(out or Path("runs", recipe.name))
    if stored is None:
        run.check_unused()
    elif differences := recipe.differences(stored):
        raise UserError(f"{out} cannot be resumed with another recipe; {'; '.join(differences)}.")
    run.check_writable()
    settings = {item.name: values[item.name] for item in settings_of(Job)}
    changed = tuple(stored.differences(before)) if stored and before else ()
    return Job(recipe, values["data"], run, resume=stored is not None, changes=changed, notes=notes, **settings)


def check_paths(argv: Sequence[str] | None) -> None:
    """Check that no path is empty: it would mean the working folder, as a shell variable without a value does.

    Raises:
        UserError: A path is empty.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    for word, value in zip(words, [*words[1:], "more"], strict=True):
        if (word in PATH_OPTIONS and not value) or (word[-1:] == "=" and word[:-1] in PATH_OPTIONS):
            raise UserError(f"{word.rstrip('=')} is empty; it must be a path, such as . for the working folder.")


def _folder_to_resume(out: Path | None, resume: Path) -> Path:
    """Return the run folder that --out and --resume mean together.

    Raises:
        UserError: They contradict each other.
    """
    if resume == AUTO:
        if out is None:
            raise UserError("--resume auto needs --out RUN, the folder in which the run starts or goes on.")
        return out
    if out is not None:
        raise UserError("--out and --resume exclude each other: a resumed run stays in its folder.")
    return resume


def _place(recipes: Recipes, default: str) -> list[Any]:
    """Return the fields of the options that say where to run."""
    chosen: Any = Literal[tuple(recipes)]
    rows = (
        ("recipe", chosen, "NAME", "one of the recipes above", default),
        ("out", Path, "RUN", "folder of a new run", "runs/<name>"),
        ("resume", Path, "RUN", "folder of the run to continue; auto: that of --out, started if it is new", "none"),
    )
    place: list[Any] = []
    for name, kind, metavar, text, shown in rows:
        option = arg(metavar=metavar, help=text, help_behavior_hint=f"(default: {shown})")
        place.append((name, Annotated[kind | None, option], None))
    change = arg(metavar="NAME=VALUE", help="a setting that a resumed run changes from here on")
    return [*place, ("override", UseAppendAction[Annotated[tuple[str, ...], change]], ())]


def _options(place: list[Any], base: Recipe) -> type:
    """Return a dataclass with one group of options per heading; `base` gives the defaults."""
    groups: dict[str, Any] = {"run": [("data", Annotated[Path, arg(metavar="DIR", help="folder of the images")])]}
    groups["run"] += place
    for owner in (Job, Recipe):
        for item in fields(owner):
            kind = type_hints(owner)[item.name]
            default = getattr(base, item.name) if owner is Recipe else item.default
            if is_dataclass(default):
                groups[item.name] = (kind, default)
            elif "group" in item.metadata:
                option = arg(help=item.metadata["help"], metavar="FILE" if default is None else None)
                group = groups.setdefault(item.metadata["group"], [])
                group.append((item.name, Annotated[kind, option], default))
    return make_dataclass(
        "Options",
        [
            (title, OmitArgPrefixes[kind], default)
            for title, group in groups.items()
            for kind, default in [group if isinstance(group, tuple) else (make_dataclass(title, group), MISSING)]
        ],
        kw_only=True,
    )


def _parse(options: type, argv: Sequence[str], **settings: Any) -> Any:
    """Return the parsed options; under a launcher only the first process prints help and errors."""
    return tyro.cli(options, args=argv, console_outputs=os.environ.get("RANK", "0") == "0", **settings)


def _description(recipes: Recipes) -> str:
    names = "\n".join(f"  {name:22} {recipe.__doc__}" for name, recipe in recipes.items())
    return (
        "Train on an image folder (train/<class>/* and val/<class>/*) or another source of images.\n"
        f"A recipe gives the settings, and options override them.\n\nrecipes:\n{names}"
    )


@contextmanager
def user_errors() -> Iterator[None]:
    """End the program with the sentence of a `UserError` instead of a traceback, and print it once.

    What the operating system refuses, such as a name that is too long, is said with the name of the file, and a package
    that is missing, such as DALI on a system that is not Linux, with its name.

    Standard output escapes the characters that its encoding lacks, as standard error does, so no file name can end the
    program.

    Raises:
        SystemExit: A `UserError`, an error of the operating system, a missing package or Ctrl-C ended the block.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    end_with_launcher()
    try:
        yield
    except UserError as error:
        said_here = isinstance(error, (DataError, LostProcessError)) or os.environ.get("RANK", "0") == "0"
        raise SystemExit(f"error: {error}" if said_here else 1) from None
    except OSError as error:
        if error.strerror is None:
            raise
        place = "" if error.filename is None else f"{printable(os.fsdecode(error.filename))}: "
        raise SystemExit(f"error: {place}{error.strerror}.") from None
    except ModuleNotFoundError as error:
        if (package := (error.name or "sdnet").partition(".")[0]) == "sdnet":
            raise
        raise SystemExit(
            f"error: The package {package} is missing; pip install 'sdnet[train]' installs what training needs."
        ) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
