"""The site builds without a warning, and the notebook runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from acam_kd.cli import COMMANDS
from acam_kd.core import DISTILLER_REGISTRY

from .pages import ROOT

pytestmark = pytest.mark.slow
NOTEBOOK = ROOT / "docs/notebooks/distil_on_a_cpu.ipynb"


@pytest.mark.filterwarnings("default")
def test_the_notebook_runs(monkeypatch, capsys):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    scope: dict = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), scope)
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "True" and "distilled student: 0." in out
    assert not hasattr(scope["distilled"], "distillation")


@pytest.fixture(scope="module")
def site():
    """The folder of the prepared pages, after the site was built from them."""
    pytest.importorskip("sphinx", reason="pip install -e '.[docs]'")
    script = ["bash", "dev/docs.sh"]
    done = subprocess.run(
        script, cwd=ROOT, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/docs/source"


def test_the_site_has_a_page_for_every_command_and_method(site):
    html = site.parent / "html"
    for command in COMMANDS:
        assert (html / f"reference/cli_{command.name}.html").is_file()
    for name, cls in DISTILLER_REGISTRY:
        assert not cls.__module__.startswith("acam_kd.") or (html / f"methods/{name}.html").is_file()
