"""A snapshot of all messages: every ConfigError and RunError in the package, and every trouble of a dataset.

They are listed as they stand in the source.

``ACAM_KD_MESSAGES=write pytest tests/test_messages.py`` writes tests/messages.txt anew; read the difference.
"""

from __future__ import annotations

import ast
import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "projects" / "acam_kd"
FILE = Path(__file__).with_name("messages.txt")


def calls():
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _name(node) in ("ConfigError", "RunError", "Wrong", "refuse"):
                yield path, node


def _name(node: ast.Call) -> str:
    return getattr(node.func, "id", "") or getattr(node.func, "attr", "")


def messages() -> str:
    by_file: dict[str, list[str]] = {}
    for path, node in calls():
        parts = [ast.unparse(part) for part in (*node.args, *(k.value for k in node.keywords))]
        by_file.setdefault(str(path.relative_to(PACKAGE)), []).append(f"{_name(node)}: {' | '.join(parts)}")
    return "".join(f"## {name}\n" + "\n".join(lines) + "\n\n" for name, lines in by_file.items())


def test_messages():
    if os.environ.get("ACAM_KD_MESSAGES") == "write":
        FILE.write_text(messages())
    assert messages() == FILE.read_text()


def test_messages_keep_to_the_form():
    """One line, a remedy where there is one, and no words of a front end in the core."""
    for path, node in calls():
        text = " ".join(ast.unparse(part) for part in node.args)
        assert "\\n" not in text, (path, text)
        if "core" in path.parts or "data" in path.parts:
            assert "DISTILL." not in text and " --" not in text and "(key" not in text, (path, text)
