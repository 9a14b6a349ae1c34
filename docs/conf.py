"""Sphinx's configuration; the pages that it reads are prepared by ``generate.py``: see ``make docs``."""

from __future__ import annotations

import importlib.util

from sphinx.application import Sphinx

import acam_kd

project = "acam-kd"
author = "the acam-kd contributors"
version = release = acam_kd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
html_theme = "furo"
html_title = f"acam-kd {release}"
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_mock_imports = [] if importlib.util.find_spec("detectron2") else ["detectron2"]
napoleon_google_docstring = True


def _formulas(app: Sphinx, kind: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Make the indented formulas of a docstring literal blocks, so that their signs are no markup."""
    for number in range(len(lines) - 2):
        text, between, below = lines[number : number + 3]
        if text.endswith(":") and not between.strip() and below.startswith("    "):
            lines[number] += ":"


def setup(app: Sphinx) -> None:
    """Connect the above, before napoleon reads the sections."""
    app.connect("autodoc-process-docstring", _formulas, priority=400)
