"""Prepare the pages of the site: those of docs/, and those that are made from the code.

python docs/generate.py build/docs/source

The pages in docs/ read well where the repository is hosted. Here they are copied with two changes: links out of docs/
become plain text, and the lists of ``index.md`` become the site's navigation.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from reference import api_page, command_pages, config_page, method_pages

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
OUTSIDE = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages at the root -> their names on the site."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def main(target: Path) -> None:
    """Write all pages below ``target``, anew."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for page in sorted(DOCS.rglob("*")):
        if page.suffix in (".md", ".ipynb"):
            name = page.relative_to(DOCS).with_suffix(".md")
            text = page.read_text() if page.suffix == ".md" else notebook(page)
            write(target / name, moved(text, page, name))
    for name, new in OUTSIDE.items():
        write(target / new, moved((ROOT / name).read_text(), ROOT / name, Path(new)))
    made = {"Methods": method_pages(), "Reference": {**command_pages(), "config": config_page(), "api": api_page()}}
    for section, pages in made.items():
        for name, text in pages.items():
            write(target / section.lower() / f"{name}.md", text)
    folders = {section: [f"{section.lower()}/{name}" for name in pages] for section, pages in made.items()}
    decisions = sorted(page.stem for page in (target / "decisions").glob("0*.md"))
    write(target / "decisions/index.md", (target / "decisions/index.md").read_text() + tree("Decisions", decisions))
    write(target / "index.md", with_navigation((target / "index.md").read_text(), folders))


def write(path: Path, text: str) -> None:
    """Write a page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def moved(text: str, page: Path, name: Path) -> str:
    """Return a page with its links for the site; pictures and data beside it are linked where they are."""

    def link(match: re.Match[str]) -> str:
        mark, label, goal = match.groups()
        path, hash_sign, anchor = goal.partition("#")
        if not path or "://" in path:
            return match[0]
        file = (page.parent / path).resolve()
        if file.name in OUTSIDE and file.parent == ROOT:
            place = Path(OUTSIDE[file.name])
        elif file.is_relative_to(DOCS) and file.suffix in (".md", ".ipynb"):
            place = file.relative_to(DOCS).with_suffix(".md")
        elif mark:
            return f"![{label}]({'../' * (4 + len(name.parents) - 2)}docs/{file.relative_to(DOCS)})"
        else:
            return label
        return f"[{label}]({'../' * (len(name.parents) - 1)}{place}{hash_sign}{anchor})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(link, part) for part in parts)


def notebook(path: Path) -> str:
    """Return a notebook as a page, without outputs."""
    cells = json.loads(path.read_text())["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    shown = [text if kind == "markdown" else f"```python\n{text}\n```" for kind, text in sources]
    return "\n\n".join(shown) + "\n"


def with_navigation(index: str, made: dict[str, list[str]]) -> str:
    """Add a hidden table of contents for each section of the index, of its links and of the pages made for it."""
    first, *sections = re.split(r"(?m)^(?=## )", index)
    trees = []
    for section in sections:
        title = section.splitlines()[0][3:]
        names = [name for _, _, name in LINK.findall(section) if name.endswith(".md")]
        names = [name.removesuffix(".md") for name in names] + made.get(title, [])
        trees.append(tree(title, names))
    lists = {
        title: "\n".join(f"- [{name.split('/')[1]}]({name}.md)" for name in names) for title, names in made.items()
    }
    shown = [re.sub(r"(?m)^`make docs`.*$", lists.get(s.splitlines()[0][3:], ""), s) for s in sections]
    return "\n".join([first, *shown, *trees, ""])


def tree(caption: str, names: list[str]) -> str:
    """Return a hidden table of contents."""
    return "\n".join(["\n```{toctree}", ":hidden:", f":caption: {caption}", "", *dict.fromkeys(names), "```\n"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
