"""Former names of the keys below ``DISTILL.<METHOD>``: a config that is merged may still have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from ..core import DISTILLER_REGISTRY
from ..core.renamed import current_arguments
from .names import key

__all__ = ["LINES", "former_keys", "forget_former_keys", "read_former_keys", "replace_former_keys"]

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


def merge_from_other_cfg(self: CfgNode, cfg_other: CfgNode) -> None:
    """Merge another config, which may have former keys.

    Raises:
        ConfigError: it has a key under both names, with different values.
    """
    other = cfg_other.clone()
    replace_former_keys(other, self.__dict__[LINES])
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


def replace_former_keys(config: dict[str, Any], lines: list[tuple[str, str]]) -> None:
    """Replace the former keys and values of all methods, in a config or in what one file of it holds.

    Args:
        config: is changed.
        lines: get a method and a line for the log for each.
    """
    distill = config.get("DISTILL")
    for name, method in DISTILLER_REGISTRY:
        node = distill.get(name.upper()) if isinstance(distill, dict) else None
        if isinstance(node, dict):
            current = _current(method, node, lines)
            node.clear()
            node.update(current)


def _current(method: type, node: dict[str, Any], lines: list[tuple[str, str]]) -> dict[str, Any]:
    def log(line: str) -> None:
        lines.append((method.__name__, line))

    return current_arguments(method, node, names=key, log=log, spell=str.upper)
