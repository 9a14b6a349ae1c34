"""The pages of the site that are made from the code name every command, method and key."""

from __future__ import annotations

import importlib.util

import pytest

from acam_kd.cli import COMMANDS
from acam_kd.core import DISTILLER_REGISTRY

from .conftest import MISSING
from .pages import ROOT


@pytest.fixture(scope="module")
def reference():
    spec = importlib.util.spec_from_file_location("reference", ROOT / "docs/reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_has_a_page(reference):
    pages = reference.command_pages()
    for command in COMMANDS:
        assert f"acam-kd {command.name}" in pages[f"cli_{command.name}"]


def test_every_method_has_a_page_with_its_recipes_and_measured_rows(reference):
    pages = reference.method_pages()
    for name, cls in DISTILLER_REGISTRY:
        if cls.__module__.startswith("acam_kd."):
            page = pages[name]
            assert f"# {name}" in page and all(recipe.source in page for recipe in cls.recipes.values())
    assert "+2.00" not in pages["AT"]
    for name, row in {"PKD": "| PKD | 16.52", "ScoreWeighted": "| ScoreWeighted | ", "PSKD": "| PS-KD | 97.46"}.items():
        assert row in pages[name]
    assert "chosen" not in pages["ScoreWeighted"]  # runs that chose a weight are no results


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_every_key_is_in_the_reference(reference):
    from detectron2.config import get_cfg

    from acam_kd.d2.config import add_distillation_config

    cfg = get_cfg()
    add_distillation_config(cfg)
    methods = {name.upper() for name, _ in DISTILLER_REGISTRY}
    text = reference.config_page()
    for key, value in cfg.DISTILL.items():
        names = [f"{key}.{inner}" for inner in value] if isinstance(value, dict) else [key]
        for name in names:
            if name.rpartition(".")[2] not in ("LEVELS", "TAPS") or key not in methods:
                assert f"`DISTILL.{name}`" in text, name
