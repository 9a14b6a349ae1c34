"""The rules of the house that a linter does not know."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "projects" / "acam_kd"


def imported(path: Path) -> set[str]:
    """List the top-level names of all absolute imports anywhere in a file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["bench", "core", "data", "vis"])
def test_core_data_and_pictures_know_no_framework(folder):
    files = list((PACKAGE / folder).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & {"detectron2", "torchvision", "yacs"}, path


@pytest.mark.parametrize(("framework", "folder"), [("detectron2", "d2"), ("torchvision", "tv"), ("lightning", "tv")])
def test_each_framework_has_its_folder(framework, folder):
    exceptions = {("torchvision", PACKAGE / "d2" / "mobilenet.py")}  # Detectron2 itself needs torchvision
    for path in PACKAGE.rglob("*.py"):
        if (framework, path) in exceptions:
            continue
        assert path.parent.name == folder or framework not in imported(path), path


def test_the_command_runs_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; from acam_kd import cli, demo; import acam_kd.tv.demo"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_imports_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import acam_kd.core, acam_kd.data.shapes, acam_kd.vis.report"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_stays_at_the_door():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "d2":
            assert "cfg" not in path.read_text(), path


def test_no_config_runs_code(root):
    """Loading it would need yaml.unsafe_load."""
    assert not [p for p in (root / "configs").rglob("*.yaml") if "!!" in p.read_text()]


def test_no_path_of_one_machine_is_in_the_tree(root):
    """The names are spelled in pieces, so that this file passes."""
    homes = ["/" + "root/", "/" + "home/", "/" + "work/"]
    listed = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.fail("not a git checkout")
    for name in listed.stdout.split():
        path = root / name
        if path.suffix in (".py", ".md", ".yaml", ".toml", ".txt", ".cfg", ".html", "") and path.is_file():
            text = path.read_text()
            assert not [h for h in homes if h in text], name


def test_train_net_is_short(root):
    assert len((root / "train_net.py").read_text().splitlines()) < 150
    assert os.path.isfile(root / "LICENSE")


def test_pictures_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; from acam_kd.vis import comparison, growth, report"
    subprocess.run([sys.executable, "-c", code], check=True)
