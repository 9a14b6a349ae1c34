"""Elements of an xml file that know their lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from ..core.errors import ConfigError

__all__ = ["Element", "read_xml"]


@dataclass
class Element:
    """An element, its text and what it contains."""

    tag: str
    where: str
    """File and line."""
    text: str = ""
    children: list[Element] = field(default_factory=list)

    def all(self, tag: str) -> Iterator[Element]:
        """Iterate over the children of a name."""
        return (child for child in self.children if child.tag == tag)

    def first(self, tag: str) -> Element | None:
        """Return the first child of a name."""
        return next(self.all(tag), None)

    def value(self, tag: str) -> str:
        """Return the text of the first child of a name; empty if there is none."""
        child = self.first(tag)
        return child.text.strip() if child else ""


def read_xml(path: Path) -> Element:
    """Read an xml file.

    Raises:
        ConfigError: it does not parse, or declares entities; the error names file and line.
    """
    top = Element("", str(path))
    stack = [top]
    parser = expat.ParserCreate()

    def start(tag: str, _: object) -> None:
        stack.append(Element(tag, f"{path}:{parser.CurrentLineNumber}"))
        stack[-2].children.append(stack[-1])

    def text(part: str) -> None:
        stack[-1].text += part

    def entity(*_: object) -> None:
        raise ConfigError("dataset", f"{path}:{parser.CurrentLineNumber}: an entity", "xml without declarations")

    parser.StartElementHandler, parser.EndElementHandler = start, lambda _: stack.pop()
    parser.CharacterDataHandler, parser.EntityDeclHandler = text, entity
    try:
        parser.Parse(path.read_bytes(), True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = expat.ErrorString(error.code) if isinstance(error, expat.ExpatError) else error
        where = f"{path}:{parser.CurrentLineNumber}"
        raise ConfigError("dataset", f"{where}: xml that does not parse ({reason})", "a whole xml file") from error
    return top.children[0]
