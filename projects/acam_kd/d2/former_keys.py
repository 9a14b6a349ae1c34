"""Former names of the keys below ``DISTILL.<METHOD>``: a config that is merged may still have them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import yaml
from detectron2.config import CfgNode

from ..core import DISTILLER_REGISTRY
from ..core.renamed import current_arguments
from .names import key

__all__ = ["CurrentFiles", "former_keys", "forget_former_keys", "read_former_keys"]

LINES = "former_keys"
"""Where a config keeps methods and lines for the log: the log is set up after the config is read."""


def read_former_keys(cfg: CfgNode) -> None:
    """Let every merge into a config read former keys, and former values, as those of today.

    yacs can refuse a renamed key, or ignore it, and nothing else; so the two functions through which every merge
    goes are replaced for this config, its clones and pickles.
    """
    cfg.__dict__[LINES] = []
    for function in (merge_from_other_cfg, merge_from_list):
        cfg.__dict__[function.__name__] = partial(function, cfg)  # a bound method would be lost in a pickle


def forget_former_keys(cfg: CfgNode) -> None:
    """Undo ``read_former_keys``."""
    for name in (LINES, merge_from_other_cfg.__name__, merge_from_list.__name__):
        cfg.__dict__.pop(name, None)


def former_keys(cfg: CfgNode, methods: Iterable[str]) -> list[str]:
    """Return a line for the log for every former key or value of these methods that was merged into a config."""
    wanted = {*methods}
    return list(dict.fromkeys(line for method, line in cfg.__dict__.get(LINES, []) if method in wanted))


class CurrentFiles(CfgNode):
    """Reads config files with the keys of today, each file on its own: a file may override its ``_BASE_``'s.

    A subclass says where ``lines`` go.
    """

    lines: list[tuple[str, str]]

    @classmethod
    def _open_cfg(cls, filename: str) -> io.StringIO:
        with super()._open_cfg(filename) as file:
            text = file.read()
        try:
            loaded = yaml.safe_load(text)
        except yaml.YAMLError:  # unsafe tags, of which a method's keys have no need; or an error, which comes again
            return io.StringIO(text)
        if isinstance(loaded, dict) and _replace(loaded, cls.lines):
            text = yaml.safe_dump(loaded, sort_keys=False)
        return io.StringIO(text)


def merge_from_other_cfg(self: CfgNode, cfg_other: CfgNode) -> None:
    """Merge another config, which may have former keys.

    Raises:
        ConfigError: it has a key under both names, with different values.
    """
    other = cfg_other.clone()
    _replace(other, self.__dict__[LINES])
    type(self).merge_from_other_cfg(self, other)


def merge_from_list(self: CfgNode, cfg_list: Sequence[Any]) -> None:
    """Merge KEY VALUE pairs, which may have former keys.

    Raises:
        ConfigError: they have a key under both names, with different values.
    """
    if len(cfg_list) % 2 == 0:  # yacs refuses an odd number
        pairs = dict(zip(cfg_list[::2], cfg_list[1::2]))
        for name, method in DISTILLER_REGISTRY:
            prefix = f"DISTILL.{name.upper()}."
            given = {k.removeprefix(prefix): pairs.pop(k) for k in [*pairs] if k.startswith(prefix)}
            current = _current(method, given, self.__dict__[LINES])
            pairs.update({f"{prefix}{k}": value for k, value in current.items()})
        cfg_list = [x for pair in pairs.items() for x in pair]
    type(self).merge_from_list(self, cfg_list)


def _replace(config: dict[str, Any], lines: list[tuple[str, str]]) -> bool:
    """Replace the former keys and values of all methods.

    Returns:
        There were some.
    """
    distill, before = config.get("DISTILL"), len(lines)
    for name, method in DISTILLER_REGISTRY:
        node = distill.get(name.upper()) if isinstance(distill, dict) else None
        if isinstance(node, dict):
            current = _current(method, node, lines)
            node.clear()
            node.update(current)
    return len(lines) > before


def _current(method: type, node: dict[str, Any], lines: list[tuple[str, str]]) -> dict[str, Any]:
    def log(line: str) -> None:
        lines.append((method.__name__, line))

    return current_arguments(method, node, names=key, log=log, spell=str.upper)
