"""Sphinx configuration of the documentation site; `make docs` builds it."""

import re
import sys
from pathlib import Path
from typing import Any

import sdnet

sys.path.insert(0, str(Path(sdnet.__file__).resolve().parent.parent))  # the root of the checkout, for the next import

from tests import with_timm  # noqa: F401  # the page of sdnet.timm imports timm

project = "SDNet"
copyright = "The SDNet developers"
author = "The SDNet developers"
version = release = sdnet.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "examples/*.rst"]
html_theme = "furo"
html_title = "SDNet"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
default_role = "literal"  # `name` in docstrings is code, as in Markdown

myst_heading_anchors = 3
suppress_warnings = ["myst.header"]

autodoc_member_order = "alphabetical"
autodoc_typehints = "none"  # the docstrings say the types in words
autodoc_inherit_docstrings = False
napoleon_custom_sections = ["Shape"]
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "/plot_",
    "download_all_examples": False,
    "show_signature": False,
    "show_memory": False,
    "min_reported_time": 3600,
    "abort_on_example_error": True,
    "write_computation_times": False,
    "reset_modules": (),
    "within_subsection_order": "FileNameSortKey",
}

UPWARDS = re.compile(r"\[[^\]]*\]\(((?:\.\./)+)([^)#]+)(?:#[^)]*)?\)")
"""A Markdown link to a file in a folder above that of the page."""


def name_files_outside(app: Any, page: str, source: list[str]) -> None:
    """Replace links to files of the repository outside docs/ by their names, because the site has no copy of them."""
    del app

    def name(link: re.Match[str]) -> str:
        inside = link[1].count("../") <= page.count("/") or link[2].startswith("docs/")
        return link[0] if inside else f"`{link[2]}`"

    source[0] = UPWARDS.sub(name, source[0])


def escape_marks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape |x| and x*, which reStructuredText takes as markup, outside code and the names of arguments."""
    del app, what, name, obj, options
    for number, line in enumerate(lines):
        start = line[: len(line) - len(line.lstrip(" *"))]
        parts = re.split(r"(`[^`]*`)", line[len(start) :])
        lines[number] = start + "".join(p if p.startswith("`") else re.sub(r"([|*])", r"\\\1", p) for p in parts)


def leave_out_fields(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of named tuples, which stand under the attributes of their class."""
    del app, what, name, skip, options
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """Connect the changes of sources and docstrings; marks are escaped before Napoleon reads a docstring."""
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("source-read", name_files_outside)
    app.connect("autodoc-process-docstring", escape_marks, priority=400)
