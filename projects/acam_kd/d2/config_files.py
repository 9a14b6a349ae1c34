"""Config files of Detectron2, read without running code that is in them.

Detectron2's own reader falls back to ``yaml.unsafe_load``, which calls any function that a file names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.utils.file_io import PathManager
from fvcore.common.config import BASE_KEY

from ..core.errors import ConfigError
from ..yaml_file import load_yaml, problem_of
from .arithmetic import evaluated

__all__ = ["ARGUMENT", "ConfigLoader", "Each", "merge_loaded", "merge_safely", "read_config"]

ARGUMENT = "--config-file"
ALLOWED = "plain YAML, tuples, dumped CfgNodes, and arithmetic under !!python/object/apply:eval"
PYTHON = "tag:yaml.org,2002:python/"
NODES = {
    f"{PYTHON}{kind}:{module}.CfgNode"
    for kind in ("object", "object/new")
    for module in ("detectron2.config.config", "fvcore.common.config", "yacs.config")
}
DEEPEST = 20
"""The largest number of files that are based on one another."""

Each = Callable[[dict[str, Any], str], None]
"""Changes the content of one file, before it is merged with those that it is based on; gets content and path."""


class ConfigLoader(yaml.SafeLoader):
    """Plain YAML and three tags of Python, none of which runs code: tuples, dumped CfgNodes, and arithmetic."""


def _tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    return tuple(loader.construct_sequence(node, deep=True))  # type: ignore[arg-type]


def _node(loader: yaml.SafeLoader, node: yaml.Node) -> dict[str, Any]:
    """Return the items of a dumped CfgNode; its state, as immutability, is no part of a config's content."""
    content = loader.construct_mapping(node, deep=True)  # type: ignore[arg-type]
    is_new = {*content} <= {"args", "kwds", "state", "listitems", "dictitems"} and "dictitems" in content
    items: Any = content["dictitems"] if is_new else content
    if not isinstance(items, dict):
        raise yaml.constructor.ConstructorError(None, None, "a CfgNode without items", node.start_mark)
    return items


def _arithmetic(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    arguments = loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode) else []
    try:
        (text,) = arguments
        return evaluated(str(text))
    except ValueError as error:
        problem = f"{_short(node.tag)} with anything else than arithmetic ({error})"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


def _refused(_: yaml.SafeLoader, node: yaml.Node) -> Any:
    raise yaml.constructor.ConstructorError(None, None, f"the tag {_short(node.tag)}", node.start_mark)


def _short(tag: str) -> str:
    return tag.replace("tag:yaml.org,2002:", "!!", 1)


ConfigLoader.add_constructor(f"{PYTHON}tuple", _tuple)
ConfigLoader.add_constructor(f"{PYTHON}object/apply:eval", _arithmetic)
ConfigLoader.add_constructor(None, _refused)  # type: ignore[type-var]
for _tag in NODES:
    ConfigLoader.add_constructor(_tag, _node)


def read_config(path: str, *, each: Each | None = None, argument: str = ARGUMENT) -> dict[str, Any]:
    """Read a config file, and the files that its ``_BASE_`` names.

    Args:
        path: the file.
        each: changes the content of each of the files.
        argument: the name of the argument that it was given as, for messages.

    Returns:
        The keys and values, as Detectron2's own reader returns them.

    Raises:
        ConfigError: a file does not exist, cannot be read, or has a tag that would run code.
    """
    return _read(path, each, argument, [])


def _read(path: str, each: Each | None, argument: str, above: list[str]) -> dict[str, Any]:
    shown = path if "://" in path else os.path.abspath(path)
    if len(above) > DEEPEST:
        raise ConfigError(argument, f"{above[0]}, based on more than {DEEPEST} files, or on itself", "fewer files")
    try:
        with PathManager.open(path, "r") as file:
            loaded = load_yaml(file.read(), ConfigLoader)
    except OSError as error:
        reason = f"which cannot be read ({error.strerror or error})"
        if isinstance(error, FileNotFoundError):
            reason = "which does not exist"
        based = f"{above[0]}, based on {path}, {reason}" if above else f"{shown}, {reason}"
        raise ConfigError(argument, based, "existing files") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(argument, problem_of(error, shown), ALLOWED) from error
    if not isinstance(loaded, dict) or not _all_text(loaded):
        raise ConfigError(argument, f"{shown} with other things than names and values", "a config of Detectron2")
    if each is not None:
        each(loaded, path)
    bases = loaded.pop(BASE_KEY, [])
    merged: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        _merge(_read(_place(str(base), path), each, argument, [*above, shown]), merged, shown, argument)
    _merge(loaded, merged, shown, argument)
    return merged


def _all_text(node: dict[str, Any]) -> bool:
    return all(isinstance(k, str) and (not isinstance(v, dict) or _all_text(v)) for k, v in node.items())


def _place(base: str, path: str) -> str:
    base = os.path.expanduser(base) if base.startswith("~") else base
    absolute = base.startswith(("/", "http://", "https://"))
    return base if absolute else os.path.join(os.path.dirname(path), base)


def _merge(new: dict[str, Any], into: dict[str, Any], path: str, argument: str) -> None:
    """Override values by those of another file, key by key."""
    for key, value in new.items():
        if isinstance(value, dict) and key in into:
            if not isinstance(into[key], dict):
                raise ConfigError(argument, f"{path} with keys below {key}", f"a value, as {key} has in its _BASE_")
            _merge(value, into[key], path, argument)
        else:
            into[key] = value


def merge_loaded(cfg: CfgNode, loaded: dict[str, Any], path: str) -> None:
    """Merge what ``read_config`` returned into a config, as Detectron2 merges a file, with its upgrades."""
    cfg.__dict__["load_yaml_with_base"] = lambda *_, **__: loaded
    try:
        type(cfg).merge_from_file(cfg, path)
    finally:
        del cfg.__dict__["load_yaml_with_base"]


def merge_safely(cfg: CfgNode, path: str, *, argument: str = ARGUMENT) -> None:
    """Merge a file into a config of plain Detectron2.

    Raises:
        ConfigError: see ``read_config``; or it has unknown keys or values of other types.
    """
    loaded = read_config(path, argument=argument)
    try:
        merge_loaded(cfg, loaded, path)
    except (KeyError, ValueError, AssertionError, TypeError, AttributeError, RecursionError, MemoryError) as error:
        if isinstance(error, ConfigError):
            raise
        found = f"{path}: {error.args[0] if error.args else type(error).__name__}"
        raise ConfigError(argument, found, "a config of Detectron2") from error
