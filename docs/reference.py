"""The pages that are made from the code: commands, config keys, methods, Python."""

from __future__ import annotations

import os
import re
from pathlib import Path

from acam_kd.cli import _parser
from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.core.distiller import Recipe, method_arguments

DOCS = Path(__file__).resolve().parent
PACKAGE = DOCS.parent / "projects/acam_kd"
API = {
    "The front door": ["acam_kd.distill", "acam_kd.learn_tokens"],
    "Attached": ["acam_kd.core.distillation.Distillation"],
    "For methods": [
        "acam_kd.core.distiller.Distiller",
        "acam_kd.core.distiller.Recipe",
        "acam_kd.core.targets.Targets",
    ],
    "Errors": ["acam_kd.core.errors.ConfigError", "acam_kd.core.errors.RunError"],
    "Adapters": [
        "acam_kd.core.adapter.Adapter",
        "acam_kd.core.adapter.ModuleAdapter",
        "acam_kd.core.teacher.Pixels",
    ],
    "Detectron2": [
        "acam_kd.d2.config.add_distillation_config",
        "acam_kd.d2.checkpoint.checkpoint_distiller",
        "acam_kd.d2.checkpoint.guard_gradients",
        "acam_kd.d2.teacher.load_teacher",
        "acam_kd.d2.unlabelled.build_unlabelled_loader",
        "acam_kd.d2.unlabelled.feed_unlabelled",
    ],
    "torchvision": ["acam_kd.tv.build.load_model"],
}
MEASURED = {
    "comparison.md": "Drawn shapes",
    "results.md": "Photos",
    "classification.md": "Images of digits",
}
ROWS = {"ACAMKD": "ACAM-KD", "Mimic": "(?:plain |Mimic)", "PSKD": "PS-KD", "MCMI": "KD from the MCMI"}
"""Method -> how its rows in the tables begin, where that is not its name."""
FAMILIES = {
    "retinanet": "RetinaNet",
    "fcos": "FCOS",
    "reppoints": "RepPoints",
    "rcnn": "Faster, Mask, Keypoint and Cascade R-CNN",
    "semseg": "segmentation",
    "classifier": "classification of images",
    "small_classifier": "classification of images of 32 pixels",
}


def command_pages() -> dict[str, str]:
    """Return a page for the command and one for each subcommand: the text of ``--help``."""
    os.environ["COLUMNS"] = "100"
    parser = _parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    pages = {"cli": f"# acam-kd\n\n```text\n{parser.format_help()}```\n"}
    for name, command in commands.items():
        pages[f"cli_{name}"] = f"# acam-kd {name}\n\n```text\n{command.format_help()}```\n"
    return pages


def config_page() -> str:
    """Return the keys of ``add_distillation_config``, with the comment above each."""
    rows, comment, ended = [], [], True
    for line in (PACKAGE / "d2/config.py").read_text().splitlines():
        text = line.strip()
        if text.startswith("# "):
            comment = [] if ended else comment
            comment.append(text[2:])
            ended = False
        elif match := re.fullmatch(r"cfg\.((?:DISTILL|DATASETS)[\w.]*) = (.+)", text):
            ended = True  # keys that follow one another share the comment
            if match[2] != "CfgNode()":
                rows.append(f"`{match[1]}`\n: default `{match[2]}`. {' '.join(comment)}\n")
        else:
            comment = []
    methods = "".join(
        f"\n### {name}\n\n"
        + "".join(f"- `DISTILL.{name.upper()}.{argument.upper()}`\n" for argument in method_arguments(cls))
        for name, cls in DISTILLER_REGISTRY
    )
    head = "# Config keys of Detectron2\n\n`add_distillation_config` adds these to a config.\n\n"
    own = "\n## Settings of each method\n\nNone, the default, stands for the recipe's value, else the constructor's. "
    own += "Each has `LEVELS` and `TAPS`, too.\n"
    return head + "\n".join(rows) + own + methods


def api_page() -> str:
    """Return the page of the Python API, which autodoc fills."""
    parts = ["# Python API\n"]
    for title, names in API.items():
        directives = "\n".join(_directive(name) for name in names)
        parts.append(f"## {title}\n\n```{{eval-rst}}\n{directives}```\n")
    return "\n".join(parts)


def _directive(name: str) -> str:
    is_class = name.rpartition(".")[2][0].isupper()
    kind, options = ("autoclass", "   :members:\n") if is_class else ("autofunction", "")
    return f".. {kind}:: {name}\n{options}"


def method_pages() -> dict[str, str]:
    """Return a page for each registered method: its docstring, recipes, and measured rows."""
    return {name: _method_page(name, cls) for name, cls in DISTILLER_REGISTRY}


def _method_page(name: str, cls: type) -> str:
    place = f"{cls.__module__}.{cls.__qualname__}"
    reads, needs = (", ".join(getattr(cls, field)) or "nothing" for field in ("reads", "needs"))
    defaults = "".join(f"| `{key}` | `{value!r}` |\n" for key, value in method_arguments(cls).items())
    recipes = "".join(_recipe(family, recipe) for family, recipe in cls.recipes.items())  # type: ignore[attr-defined]
    table = (
        f"\n## Recipes\n\n| for | settings | levels, taps | source |\n|---|---|---|---|\n{recipes}" if recipes else ""
    )
    return (
        f"# {name}\n\n```{{eval-rst}}\n.. autoclass:: {place}\n   :no-index:\n```\n\n"
        f"It reads: {reads}. Beside features it needs: {needs}.\n\n"
        f"| argument | default |\n|---|---|\n{defaults}{table}{_measured(name)}"
    )


def _recipe(family: str, recipe: Recipe) -> str:
    arguments = ", ".join(f"`{key}={value!r}`" for key, value in recipe.arguments.items()) or "the defaults"
    first, last = recipe.levels
    levels = {
        (0, None): "all levels",
        (0, 4): "the first four levels",
        (-1, None): "the last level",
        (-2, -1): "the second-last level",
    }[first, last]
    where = ", ".join([levels, *(f"`{tap}`" for tap in recipe.taps)])
    return f"| {FAMILIES[family]} | {arguments} | {where} | {recipe.source} |\n"


def _measured(name: str) -> str:
    """Return the rows of the measured tables that are this method's."""
    found = "".join(_rows(page, data, name) for page, data in MEASURED.items())
    return f"\n## Measured\n{found}" if found else "\n## Measured\n\nNot in a table of this version.\n"


def _rows(page: str, title: str, name: str) -> str:
    """Return a method's rows of the tables of a page; a row has a mean over seeds, or it is no result."""
    found = ""
    for section in re.split(r"(?m)^(?=## )", (DOCS / page).read_text())[1:]:
        heading = section.splitlines()[0][3:]
        for head, rows in re.findall(r"(?m)^(\| row .*mean \(std\).*\n\|---.*\n)((?:\|.*\n)+)", section):
            kept = [row for row in rows.splitlines(True) if re.match(rf"\| {ROWS.get(name, name)}\b", row)]
            if kept:
                found += f"\n### {title}: {heading}\n\n[Data, seeds and weights](../{page}).\n\n{head}{''.join(kept)}"
    return found
