"""Every command that the documents name exists, and has the options that they give it."""

import io
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import with_timm  # noqa: F401  # before timm

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

CODE = re.compile(r"^```sh\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(
    r"(?:python -m (sdnet[\w.]*)|(?:accelerate launch|torchrun|python)[^\n]*? train/(\w+)\.py)([^\n]*)"
)
PASSED_ON = ("sdnet.timm",)
"""Programs whose options are those of the program that they run."""


class Command(NamedTuple):
    """A command as a page names it: the module, a word that may be a subcommand, and its options."""

    module: str
    subcommand: str
    options: tuple[str, ...]


def code_of(page: Path) -> Iterator[str]:
    """Yield the lines of the shell blocks of a page, and its code within sentences, without comments."""
    for block, span in CODE.findall(page.read_text()):
        for line in re.sub(r"\\\n\s*", " ", block or span).splitlines():
            yield line.split("#")[0]


def commands() -> list[Command]:
    found = set()
    for line in (line for page in PAGES for line in code_of(page)):
        for module, script, rest in PROGRAM.findall(line):
            words = rest.split()
            subcommand = words[0] if module == "sdnet.bench" and words and not words[0].startswith("-") else ""
            options = tuple(sorted({word.split("=")[0] for word in words if word.startswith("--")} - {"--help"}))
            found.add(Command(module or f"sdnet.train.{script}", subcommand, options))
    return sorted(found)


def verbs() -> set[str]:
    lines = [line for page in PAGES for line in code_of(page)]
    return {verb for line in lines if (match := re.match(r"make ([\w-]+)", line.strip())) for verb in match.groups()}


def help_of(module: str, subcommand: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["program", *([subcommand] if subcommand else []), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    output, status = io.StringIO(), None
    with redirect_stdout(output), redirect_stderr(output):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            status = end.code
    assert status in (None, 0), output.getvalue()
    return output.getvalue()


@pytest.mark.parametrize(("module", "subcommand"), sorted({command[:2] for command in commands()}))
def test_a_named_command_has_its_options(module: str, subcommand: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(module, subcommand, monkeypatch)
    assert "usage" in text.lower()
    named = {option for command in commands() if command[:2] == (module, subcommand) for option in command.options}
    if module not in PASSED_ON:
        assert [option for option in named if option not in text] == []


def test_named_verbs_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "docs", "test"} <= verbs() <= targets


def test_commands_are_found() -> None:
    assert len(commands()) > 12
    assert Command("sdnet.train.prepare", "", ("--data", "--out", "--size")) in commands()
