"""The findings of a look at a set-up before a long run: a table with ok, look and broken."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..core.errors import ConfigError, Names, RunError

__all__ = ["BROKEN", "LOOK", "OK", "Examination", "Part", "peak_memory", "version_findings"]

OK, LOOK, BROKEN = "ok", "look", "broken"
TESTED = {"torch": "2.14.1", "torchvision": "0.29.1", "lightning": "2.6.6", "pycocotools": "2.0.11"}
"""The versions in constraints.txt."""


@dataclass
class Part:
    """One thing that is looked at.

    Args:
        name: in a word or two.
        state: ``OK``, ``LOOK`` or ``BROKEN``.
        lines: the findings.
    """

    name: str
    state: str = OK
    lines: list[str] = field(default_factory=list)

    def ok(self, text: str) -> None:
        """Note something that is as it should be."""
        self.lines.append(text)

    def look(self, text: str) -> None:
        """Note something that a person should look at."""
        self.lines.append(text)
        self.state = LOOK if self.state == OK else self.state

    def broken(self, text: str) -> None:
        """Note something that keeps a run from its goal."""
        self.lines.append(text)
        self.state = BROKEN


class Examination:
    """A row of parts; an error that a user can mend ends a part, not the examination.

    Args:
        names: the front end's names of arguments.

    Example:
        >>> looked = Examination(str.upper)
        >>> with looked.part("data") as data:
        ...     data.ok("6 images")
        >>> with looked.part("teacher"):
        ...     raise ConfigError("teacher", "nothing", "a folder")
        >>> print(looked.table())
        data     ok      6 images
        teacher  broken  TEACHER: found nothing, expected a folder
        >>> looked.status
        1
    """

    def __init__(self, names: Names) -> None:
        self.names = names
        self.parts: list[Part] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[Part]:
        """Look at one thing."""
        part = Part(name)
        self.parts.append(part)
        try:
            yield part
        except (ConfigError, RunError) as error:
            part.broken(error.render(self.names))

    @contextlib.contextmanager
    def logged(self, part: Part, logger: logging.Logger) -> Iterator[None]:
        """Take the messages of a logger as findings; its warnings are to be looked at."""
        handler = _Taking(part)
        propagate, logger.propagate = logger.propagate, False
        others, logger.handlers = logger.handlers, [handler]
        level = logger.level
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.propagate, logger.handlers = propagate, others
            logger.setLevel(level)

    @property
    def status(self) -> int:
        """The exit status: 1 if something is broken, else 0."""
        return int(any(part.state == BROKEN for part in self.parts))

    def table(self) -> str:
        """Write the findings, a line each."""
        width = max(len(part.name) for part in self.parts)
        lines = []
        for part in self.parts:
            for number, text in enumerate(part.lines):
                head = (part.name, part.state) if not number else ("", "")
                lines.append(f"{head[0]:{width}}  {head[1]:6}  {text}")
        return "\n".join(lines)


class _Taking(logging.Handler):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def emit(self, record: logging.LogRecord) -> None:
        for line in record.getMessage().splitlines():
            (self.part.look if record.levelno >= logging.WARNING else self.part.ok)(line)


def version_findings(part: Part) -> None:
    """Compare the installed versions with the tested ones."""
    part.ok(f"Python {sys.version.split()[0]}")
    for package, tested in TESTED.items():
        try:
            found = importlib.metadata.version(package).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found = "nothing"
        if found == tested:
            part.ok(f"{package} {found}")
        else:
            part.look(f"{package}: found {found}, tested with {tested}")


def peak_memory() -> float:
    """Return the largest memory of this process so far, in GiB."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
