"""The Markdown pages: their links, their Python and their commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
OUTSIDE = ("http://", "https://", "mailto:", "../../actions/")


@dataclass(frozen=True)
class Block:
    """A fenced block of one language."""

    page: Path
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text.splitlines()[0]}"


def pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[Block]:
    found = re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, text) for text in found]


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`]*`\b", "", text)
    found = LINK.findall(text) + re.findall(r'<img src="([^"]+)"', text)
    return [link for link in found if not link.startswith(OUTSIDE)]


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of the headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> list[list[str]]:
    """Return the words of each command of a page, with the variables that its blocks set filled in."""
    variables: dict[str, str] = {}
    found = []
    for line in "".join(block.text for block in blocks(page, "bash")).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$(\w+)", lambda name: variables.get(name[1], name[0]), line)
        if match := re.fullmatch(r'(?:export )?([A-Z]\w*)=("?)(.*?)\2(\s+#.*)?', line.strip()):
            variables[match[1]] = match[3]
            continue
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found
