"""Former names of a method's arguments, and of their values: they are still read, with one line in the log."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from functools import lru_cache, wraps
from typing import Any

from .errors import ConfigError, Names

__all__ = ["current_arguments", "reading_former_names"]


@lru_cache
def _warn_once(text: str) -> None:
    logging.getLogger("acam_kd").warning(text)


def current_arguments(
    method: type,
    arguments: Mapping[str, Any],
    *,
    names: Names = str,
    log: Callable[[str], object] = _warn_once,
    spell: Callable[[str], str] = str,
) -> dict[str, Any]:
    """Replace the former names and values of a method's arguments, its ``renamed`` and ``renamed_values``.

    Args:
        method: a subclass of ``Distiller``.
        arguments: argument -> value, as a user gave them.
        names: how a front end calls an argument, as ``ACAMKD.standardize``, in the lines for the log.
        log: takes one line per former name or value; a warning, once per process, if left out.
        spell: how the keys of ``arguments`` are spelled, as ``str.upper``.

    Returns:
        The arguments under the names, and with the values, of today.

    Raises:
        ConfigError: an argument is given under both names, with different values.

    Example:
        >>> from acam_kd.methods import ACAMKD
        >>> current_arguments(ACAMKD, {"alpha": 2.0, "standardize": True}, log=print)
        ACAMKD.standardize is called ACAMKD.standardize_fused now; the former name is still read
        {'alpha': 2.0, 'standardize_fused': True}
    """
    title = method.__name__
    current = dict(arguments)
    own = inspect.signature(method).parameters
    for old, new in method.renamed.items():  # type: ignore[attr-defined]
        if spell(old) not in current or old in own:
            continue
        value = current.pop(spell(old))
        given = current.get(spell(new))
        if given is None:
            current[spell(new)] = given = value
        if value is not None and given != value:
            hint = f"leave {{{title}.{old}}} out, its former name"
            raise ConfigError(f"{title}.{new}", f"{given!r} and {value!r}", "one value", hint)
        if value is None:  # a config that was written out has the keys that are open too
            continue
        log(f"{names(f'{title}.{old}')} is called {names(f'{title}.{new}')} now; the former name is still read")
    for name, values in method.renamed_values.items():  # type: ignore[attr-defined]
        old = current.get(spell(name))
        if isinstance(old, str) and old in values:
            current[spell(name)] = values[old]
            log(f"{names(f'{title}.{name}')}: {old} is called {values[old]} now; the former value is still read")
    return current


def reading_former_names(method: type, constructor: Callable[..., None]) -> Callable[..., None]:
    """Return a method's constructor that takes the former names and values of its arguments too."""

    @wraps(constructor)
    def wrapper(self: Any, *args: Any, **arguments: Any) -> None:
        constructor(self, *args, **current_arguments(method, arguments))

    return wrapper
