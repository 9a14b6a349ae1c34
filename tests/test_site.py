"""The site builds without a warning, and the notebook runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from acam_kd.cli import COMMANDS
from acam_kd.core import DISTILLER_REGISTRY

from .conftest import MISSING
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


def test_every_command_and_method_has_a_page(site):
    for command in COMMANDS:
        assert f"acam-kd {command.name}" in (site / f"reference/cli_{command.name}.md").read_text()
    for name, cls in DISTILLER_REGISTRY:
        if cls.__module__.startswith("acam_kd."):
            page = (site / f"methods/{name}.md").read_text()
            assert f"# {name}" in page and all(recipe.source in page for recipe in cls.recipes.values())
    assert "+2.00" not in (site / "methods/AT.md").read_text()
    for name, row in {"PKD": "| PKD | 16.52", "ScoreWeighted": "| ScoreWeighted | ", "PSKD": "| PS-KD | 97.46"}.items():
        assert row in (site / f"methods/{name}.md").read_text()
    assert "chosen" not in (site / "methods/ScoreWeighted.md").read_text()  # runs that chose a weight are no results


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_every_key_is_in_the_reference(site):
    from detectron2.config import get_cfg

    from acam_kd.d2.config import add_distillation_config

    cfg = get_cfg()
    add_distillation_config(cfg)
    methods = {name.upper() for name, _ in DISTILLER_REGISTRY}
    text = (site / "reference/config.md").read_text()
    for key, value in cfg.DISTILL.items():
        names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        for name in names:
            if name.rpartition(".")[2] not in ("LEVELS", "TAPS") or key not in methods:
                assert f"`DISTILL.{name}`" in text, name
