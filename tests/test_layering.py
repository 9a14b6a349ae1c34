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
    """List the top-level names of all absolute imports anywhere in a file; ``torchvision.ops``, which is free, in full."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add("torchvision.ops" if node.module == "torchvision.ops" else node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ["core", "data", "methods", "report"])
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
        assert path.relative_to(PACKAGE).parts[0] == folder or framework not in imported(path), path


def test_the_command_runs_without_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; from acam_kd import cli, demo; import acam_kd.tv.demo"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_core_imports_without_detectron2():
    code = (
        "import sys; sys.modules['detectron2'] = None; import acam_kd.core, acam_kd.data.shapes, acam_kd.report.report"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_config_stays_at_the_door():
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] != "d2":
            assert "cfg" not in path.read_text().replace("pretrained_cfg", ""), path  # an attribute of timm's networks


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
    assert len((root / "train_net.py").read_text().splitlines()) < 25
    assert os.path.isfile(root / "LICENSE")


@pytest.mark.parametrize("folder", ["core", "methods"])
def test_core_and_methods_know_arguments_and_neither_keys_nor_options(folder):
    for path in (PACKAGE / folder).rglob("*.py"):
        text = path.read_text()
        assert "DISTILL." not in text and "--" not in text, path


def test_the_front_door_is_light():
    heavy = ("torch", "torchvision", "detectron2", "lightning", "fvcore", "numpy")
    code = f"import sys, acam_kd; acam_kd.__version__; sys.exit(', '.join(n for n in {heavy} if n in sys.modules) or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_front_door_loads_no_framework_that_was_not_there():
    """A student of Detectron2 or torchvision has imported its framework itself."""
    code = """
import sys, torch, acam_kd
from torch import nn
student, teacher = (nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()) for _ in range(2))
paths = {"c1": "1"}
acam_kd.distill(student, teacher, method="PKD", student_levels=paths, teacher_levels=paths)
student(torch.rand(2, 3, 8, 8))
assert list(student.distillation.losses) == ["loss_pkd_pearson"]
sys.exit(", ".join(name for name in ("torchvision", "detectron2", "lightning") if name in sys.modules) or 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


BELOW = {
    "core": set(),
    "lock": {"core"},
    "yaml_file": {"core"},
    "json_file": {"core"},
    "fields": set(),
    "methods": {"core"},
    "data": {"core"},
    "report": {"core", "data"},
    "export": {"core"},
    "compare": {"core", "methods", "report", "data", "lock", "json_file"},
    "tv": {"core", "methods", "data", "report", "export", "lock", "fields", "json_file"},
    "d2": {"core", "methods", "data", "report", "export", "lock", "json_file"},
    "demo": {"core", "methods", "data", "report", "lock"},
    "cli": {"core", "methods", "data", "report", "export", "tv", "demo", "compare", "lock", "fields"},
    "__init__": {"core", "methods"},
}
"""Part of the package -> the parts that it may import: cli, d2, tv, compare, report -> methods -> core -> nothing."""
ANYWHERE = {"files", "yaml_file"}
"""Writing files without halves, and reading YAML that may be hostile."""
DEMOS = {("tv", "demo"), ("d2", "demo")}
"""The engines' halves of the demo import its neutral one, and are loaded by name."""


def ours(path: Path) -> set[str]:
    """List the parts of the package that a file imports, wherever in it."""
    found: set[str] = set()
    package = ["acam_kd", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module.split(".") if node.module else [])]
            modules = [module] if len(module) > 1 else [[*module, alias.name] for alias in node.names]
        found |= {(module + ["__init__"])[1] for module in modules if module[0] == "acam_kd"}
    return found


def test_imports_go_down():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in PACKAGE.rglob("*.py")}
    assert parts <= BELOW.keys() | ANYWHERE, "say where the new part stands"
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).with_suffix("").parts[0]
        allowed = BELOW.get(part, set()) | ANYWHERE | {part}
        up = {name for name in ours(path) - allowed if (part, path.stem) not in DEMOS or name != "demo"}
        version = {"__init__"} if part in ("cli", "export") else set()
        assert not up - version, (path, up)


def test_no_part_is_below_itself():
    """The table has an order, so that nothing goes round in circles."""
    order: list[str] = []
    while len(order) < len(BELOW):
        free = [part for part in BELOW if part not in order and BELOW[part] <= {*order}]
        assert free, "a circle"
        order += free
    assert "core" in order[:2] and {"d2", "tv"}.isdisjoint(set().union(*(BELOW[x] for x in BELOW if x != "cli")))


def test_core_names_no_method():
    """Nothing in the core asks which method it has."""
    methods = {path.stem for path in (PACKAGE / "methods").glob("*.py") if path.stem != "__init__"} | {"ACAMKD"}
    for path in (PACKAGE / "core").glob("*.py"):
        names = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not {str(name).lower() for name in names} & {name.lower() for name in methods}, path


def test_pictures_need_no_torch():
    code = "import sys; sys.modules['torch'] = None; from acam_kd.report import comparison, report"
    subprocess.run([sys.executable, "-c", code], check=True)
