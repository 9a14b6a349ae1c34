"""YAML from files that may be damaged or hostile: one error for all that can be wrong with one, and no code is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .core.errors import first_line

__all__ = ["Parsed", "load_yaml", "parse_yaml", "problem_of"]

LARGEST = 1_000_000
"""The largest number of values, with those of aliases counted wherever an alias stands."""


@dataclass(frozen=True)
class Parsed:
    """A YAML document.

    Args:
        content: of the document; None for an empty one.
        node: the tree that it was made of, which knows the lines; None for an empty one.
    """

    content: Any
    node: yaml.Node | None


def load_yaml(text: str, loader: type[Any] = yaml.SafeLoader) -> Any:
    """Read YAML as ``yaml.load`` does, with one kind of error.

    Args:
        text: one document.
        loader: one of PyYAML's that runs no code, as ``yaml.SafeLoader`` and ``yaml.BaseLoader``, or its subclass.

    Raises:
        yaml.YAMLError: the text cannot be read, is nested too deeply, or unfolds to too many values.

    Example:
        >>> load_yaml("a: [1, 2]")
        {'a': [1, 2]}
    """
    return parse_yaml(text, loader).content


def parse_yaml(text: str, loader: type[Any] = yaml.SafeLoader) -> Parsed:
    """Read YAML, and keep the lines of its values; see ``load_yaml``."""
    try:
        reader = loader(text)
        node = reader.get_single_node()
        if node is None:
            return Parsed(None, None)
        _check_size(node)
        return Parsed(reader.construct_document(node), node)
    except RecursionError:
        raise yaml.YAMLError("values are nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        # PyYAML itself, on values such as !!int x
        raise yaml.YAMLError(f"a value that cannot be read ({first_line(error)})") from error


def problem_of(error: Exception, path: str | Path) -> str:
    """Return ``FILE:LINE: PROBLEM`` for an error of reading a YAML file."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "strerror", None) or first_line(error)
    return f"{path}:{mark.line + 1}: {problem}" if mark else f"{path}: {problem}"


def _check_size(root: yaml.Node) -> None:
    """Refuse aliases that contain themselves, or that unfold to more values than any file has."""
    sizes: dict[int, int] = {}
    open_: set[int] = set()

    def size(node: yaml.Node) -> int:
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) in open_:
            raise yaml.composer.ComposerError(None, None, "an alias within itself", node.start_mark)
        if id(node) not in sizes:
            open_.add(id(node))
            pairs = isinstance(node, yaml.MappingNode)
            parts = [part for pair in node.value for part in pair] if pairs else node.value
            sizes[id(node)] = 1 + sum(map(size, parts))
            open_.remove(id(node))
            if sizes[id(node)] > LARGEST:
                problem = f"aliases that unfold to more than {LARGEST} values"
                raise yaml.composer.ComposerError(None, None, problem, node.start_mark)
        return sizes[id(node)]

    size(root)
