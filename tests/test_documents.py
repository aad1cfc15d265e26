"""Tests of the documents: their Python blocks run, their links and paths exist, their facts are those of the code."""

import re
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest import SkipTest

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from tests import with_timm  # noqa: F401  # docs/timm.md imports it

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

PYTHON_BLOCK = re.compile(r"^```python$", re.MULTILINE)
FILE = re.compile(r"`((?:\.github|bench|docs|kernels|sdnet|tests|train)/[\w./<>*-]*)`")
"""A path inside the repository, in backquotes."""

PUBLIC = ("sdnet", "sdnet.inspection", "sdnet.kernels", "sdnet.robustness", "sdnet.timm")
"""The modules with public names."""

WRITTEN = ("kernels/qualify/tables/",)
"""Folders that a checkout may lack."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_blocks(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Run the Python blocks of a page, in order and in one namespace.

    Returns:
        The number of blocks that ran, and the reasons of those that a comment `<!-- skip: next "reason" -->` exempts.
    """
    monkeypatch.chdir(folder)
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    executed, reasons = 0, []
    for example in document.examples():
        is_block = isinstance(example.parsed, str)
        try:
            example.evaluate()
        except SkipTest as skipped:
            reasons.append(str(skipped))
        else:
            executed += is_block
    return executed, reasons


@pytest.fixture
def no_accelerator() -> Iterator[None]:
    """Forget the accelerator that a block creates."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.usefixtures("no_accelerator")
@pytest.mark.parametrize("page", [page for page in PAGES if PYTHON_BLOCK.search(page.read_text())], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    executed, reasons = run_blocks(page, tmp_path, monkeypatch)
    assert executed + len(reasons) == len(PYTHON_BLOCK.findall(page.read_text()))
    assert executed > 0
    assert all(re.match(r"needs \w+", reason) for reason in reasons), "a block may be exempt only for what it needs"


def test_a_block_that_raises_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nanswer = 42\n```\n\n```python\nassert answer == 43\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page, tmp_path, monkeypatch)


def test_an_exempt_block_is_counted_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text('<!-- skip: next "needs a GPU" -->\n\n```python\n1 / 0\n```\n\n```python\nanswer = 42\n```\n')
    assert run_blocks(page, tmp_path, monkeypatch) == (1, ["needs a GPU"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    links = [link or source for link, source in re.findall(r"\]\(([^)#\s]+)[^)]*\)|src=\"([^\"]+)\"", page.read_text())]
    inside = [link for link in links if "://" not in link and not link.startswith("mailto:")]
    assert [link for link in inside if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    """Of a path with a placeholder, such as `tests/kernels/test_<name>.py`, the folder must exist."""
    named = [re.sub(r"[^/]*[<*].*", "", name) for name in FILE.findall(page.read_text())]
    assert [name for name in named if not name.startswith(WRITTEN) and not (ROOT / name).exists()] == []


def test_readme_states_the_versions_and_extras_of_the_project() -> None:
    readme = (ROOT / "README.md").read_text()
    python = PROJECT["requires-python"].removeprefix(">=")
    pytorch = next(line.removeprefix("torch>=") for line in PROJECT["dependencies"] if line.startswith("torch>="))
    assert f"badge/python-{python}%2B" in readme
    assert f"badge/pytorch-{pytorch}%2B" in readme
    assert f"Python {python} or later and PyTorch {pytorch} or later" in readme
    assert f"badge/licence-{PROJECT['license']}-" in readme
    assert set(re.findall(r"\[(train|dev|demo)\]", readme)) <= set(PROJECT["optional-dependencies"])


def test_readme_has_its_sections_in_order() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    order = "Install, Two commands, Quickstart, Training, Results, Status, Documentation, Citation"
    assert headings == order.split(", ")


def table(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without the head of the table."""
    section = re.split(r"^## ", (ROOT / page).read_text(), flags=re.MULTILINE)
    rows = [line for part in section if part.startswith(heading) for line in part.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def test_every_dependency_has_its_reason_in_the_design() -> None:
    reasons = {
        (package.strip(), extra)
        for packages, reason, extras in table("docs/design.md", "Dependencies")
        for package in packages.split(",")
        for extra in re.findall(r"\w+", extras) or [""]
        if reason
    }
    groups = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    required = {(canonicalize_name(Requirement(line).name), extra) for extra in groups for line in groups[extra]}
    assert {(package.removesuffix("-cuda130"), extra) for package, extra in required} - {("sdnet", "dev")} == reasons


def test_every_environment_variable_is_in_the_design() -> None:
    sources = [path for folder in ("kernels", "sdnet", "train", "bench") for path in (ROOT / folder).glob("**/*.py")]
    used = {name for path in sources for name in re.findall(r"[\"'](SDNET_[A-Z_]+)[\"']", path.read_text())}
    assert used == {name.strip("`") for name, *_ in table("docs/design.md", "Environment variables")}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_api_page_lists_the_public_names(module: str) -> None:
    listed = [name.strip("`") for name, _ in table("docs/api.md", f"`{module}`")]
    assert listed == sorted(listed)
    assert set(listed) == set(import_module(module).__all__), "docs/api.md has one line for each name of __all__"


def test_the_names_in_the_page_on_extending_exist() -> None:
    folders = ("kernels", "sdnet", "train", "bench", "tests")
    source = "\n".join(path.read_text() for folder in folders for path in (ROOT / folder).glob("**/*.py"))
    named = set(re.findall(r"`([A-Za-z_]\w+)(?:\([^`]*\))?`", (ROOT / "docs" / "extending.md").read_text()))
    assert len(named) > 20
    assert {name for name in named if not re.search(rf"\b{name}\b", source)} == set()


def test_every_module_with_public_names_has_a_table() -> None:
    sources = [*ROOT.glob("sdnet/*.py"), *ROOT.glob("sdnet/robustness/*.py"), *ROOT.glob("kernels/**/*.py")]
    listing = [path for path in sources if re.search(r"^__all__\b", path.read_text(), re.MULTILINE)]
    stems = {str(path.relative_to(ROOT)).removesuffix(".py").removesuffix("/__init__") for path in listing}
    names = {f"sdnet.{stem}" if stem.startswith("kernels") else stem for stem in stems}
    assert {name.replace("/", ".") for name in names} == set(PUBLIC)
