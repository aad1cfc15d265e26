"""The documentation site builds without a warning, has every public name, and shows every picture."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.test_documents import PUBLIC

ROOT = Path(__file__).parent.parent
PAGES = {page.stem for page in (ROOT / "docs").glob("*.md")}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built from a copy of its sources, because the gallery writes pages beside them."""
    sources, out = tmp_path_factory.mktemp("sources") / "docs", tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", sources, ignore=shutil.ignore_patterns("gallery"))
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", sources, out]
    environment = os.environ | {"MPLBACKEND": "agg"}
    built = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return out


def test_every_page_and_every_example_is_there(site: Path) -> None:
    assert {page.stem for page in site.glob("*.html")} >= PAGES
    examples = {example.stem for example in (ROOT / "docs" / "examples").glob("plot_*.py")}
    assert {page.stem for page in (site / "gallery").glob("plot_*.html")} == examples


@pytest.mark.parametrize("module", PUBLIC)
def test_the_reference_has_every_public_name(module: str, site: Path) -> None:
    page = (site / "reference" / f"{module.split('.')[-1]}.html").read_text()
    names = {name for name in import_module(module).__all__ if name != "robustness"}
    assert {name for name in names if f'id="{module}.{name}"' not in page} == set()


def test_fields_of_named_tuples_are_described_once(site: Path) -> None:
    pages = [page.read_text() for page in (site / "reference").glob("*.html")]
    assert "sdnet.Exported" in "".join(pages)
    assert not any("Alias for field number" in page for page in pages)


def test_every_picture_is_there(site: Path) -> None:
    missing, seen = [], 0
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^":]+)"', page.read_text()):
            seen += 1
            if not (page.parent / source).is_file():
                missing.append(f"{page.name}: {source}")
    assert missing == []
    assert seen > 5


def test_no_markup_is_left_in_the_text(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script|style).*?</\1>", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r"\|:--|^```|\$\$|\\\(", text, re.MULTILINE), page.name
