"""The troubles that a check finds in a dataset, and what it mends: collected first, then told together."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ...core.errors import ConfigError, rendered
from .cache import write_text

__all__ = ["Findings", "Say", "Trouble", "shown"]

Say = Callable[[str], None]
"""Takes one line for the log."""

SHOWN, KEPT, NAMED = 10, 10_000, 3
"""Troubles of a sort in the log and in the full list; sorts in the error."""

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxdict = _repr.maxtuple = 6
_repr.maxstring = _repr.maxother = 60
_repr.maxlevel = 3


def shown(value: object) -> str:
    """Return a value as text of a limited length.

    Example:
        >>> shown([[10, 10], "a"]), shown(list(range(1000)))
        ("[[10, 10], 'a']", '[0, 1, 2, 3, 4, 5, ...]')
    """
    return _repr.repr(value)


def _joined(place: str, found: str) -> str:
    return f"{place}{'' if found.startswith(',') else ' '}{found}".strip()


@dataclass(frozen=True)
class Trouble:
    """One thing that is wrong: ``annotations[3] (id 7)`` ``with bbox [1, 2]``, what is allowed, and what to do."""

    place: str
    found: str
    allowed: str = ""
    hint: str = ""

    def __str__(self) -> str:
        allowed = f", expected {self.allowed}" if self.allowed else ""
        hint = f"; {self.hint}" if self.hint else ""
        text = _joined(self.place, f"{self.found}{allowed}{hint}")
        return rendered(text, lambda argument: argument)


@dataclass
class Findings:
    """The troubles and the mended places of one dataset.

    Args:
        where: the dataset and its file, for the beginning of messages.
    """

    where: str
    troubles: dict[str, list[Trouble]] = field(default_factory=dict)
    """Sort -> the first of them."""
    counts: dict[str, int] = field(default_factory=dict)
    """Sort -> how many there are."""
    mended: dict[str, int] = field(default_factory=dict)
    """Sort of mending -> how often."""
    notices: list[str] = field(default_factory=list)
    """Things that are odd, and no trouble."""

    def refuse(self, sort: str, place: str, found: str, allowed: str = "", hint: str = "") -> None:
        """Add a trouble. ``{classes}`` in a hint is replaced by the front end's name of that argument."""
        self.counts[sort] = self.counts.get(sort, 0) + 1
        if self.counts[sort] <= KEPT:
            self.troubles.setdefault(sort, []).append(Trouble(place, found, allowed, hint))

    def mend(self, what: str, times: int = 1) -> None:
        """Count something that was mended, said as ``"annotations without iscrowd, taken as 0"``."""
        if times:
            self.mended[what] = self.mended.get(what, 0) + times

    def tell(self, say: Say) -> None:
        """Say what was mended and what is odd, a line each."""
        for what, times in self.mended.items():
            say(f"{self.where}: mended {times} {what}")
        for notice in self.notices:
            say(f"{self.where}: {notice}")

    def raise_if_any(self, say: Say) -> None:
        """Raise one error for all troubles, after their list has gone to the log and, in full, to a file.

        Raises:
            ConfigError: there is a trouble.
        """
        total = sum(self.counts.values())
        if not total:
            return
        file = None
        if total > 1:
            text = "\n".join([self.where, *self._lines(KEPT)]) + "\n"
            file = write_text("troubles", self.where, text, suffix=".txt")
            say(f"{self.where}: {total} troubles{f', all of them in {file}' if file else ''}")
            for line in self._lines(SHOWN):
                say(line)
        raise self._error(total, f"all of them are in {file}" if file else "more of them are in the log")

    def _error(self, total: int, list_of_all: str) -> ConfigError:
        first = [troubles[0] for troubles in self.troubles.values()]
        if len(first) > 1:
            named = [f"{_joined(x.place, x.found)}{self._times(sort)}" for x, sort in zip(first, self.troubles)]
            more = f"; {len(named) - NAMED} other sorts" if len(named) > NAMED else ""
            value = f"{self.where}: {total} troubles: {'; '.join(named[:NAMED])}{more}"
            return ConfigError("dataset", value, hint=list_of_all)
        ((sort, (only, *_)),) = self.troubles.items()
        where = f"{self.where}: {only.place}" if only.place else self.where
        hint = only.hint if total == 1 else "; ".join(filter(None, (only.hint, list_of_all)))
        return ConfigError("dataset", _joined(where, only.found) + self._times(sort), only.allowed, hint)

    def _times(self, sort: str) -> str:
        return f" (the first of {self.counts[sort]})" if self.counts[sort] > 1 else ""

    def _lines(self, limit: int) -> Iterator[str]:
        for sort, troubles in self.troubles.items():
            yield f"  {sort}: {self.counts[sort]}"
            yield from (f"    {trouble}" for trouble in troubles[:limit])
            if self.counts[sort] > limit:
                yield f"    and {self.counts[sort] - min(limit, len(troubles))} others"
