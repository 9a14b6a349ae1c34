"""The two errors that this project raises on purpose, and how a program ends with one of them.

The core knows arguments, never config keys or command-line options. A front end names an argument in its own words when
it prints the error: see :meth:`ConfigError.render`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

__all__ = ["ConfigError", "Names", "RunError", "first_line", "names_of", "one_line_errors", "rendered"]

Names = Callable[[str], str]
"""The name of an argument, as ``PKD.alpha`` -> what the front end calls it, as ``PKD_ALPHA``."""


def _same(name: str) -> str:
    return name


def rendered(text: str, names: Names) -> str:
    """Replace the ``{argument}`` fields of a hint or a warning by a front end's names."""
    first, *others = text.split("{")
    for other in others:
        name, brace, rest = other.partition("}")
        is_field = brace and name.replace(".", "_").isidentifier()  # other braces, as of a dict in a hint, are text
        first += f"{names(name)}{rest}" if is_field else f"{{{other}"
    return first


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, for a message of one line; its type if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def names_of(method: str, arguments: Iterable[str], names: Names) -> Names:
    """Return ``names`` for the texts of one method: its own arguments begin with the method."""
    own = {*arguments}
    return lambda argument: names(f"{method}.{argument}" if argument in own else argument)


class ConfigError(ValueError):
    """An argument, or a file named by one, that cannot be used. It reads "argument: found X, expected Y; hint".

    Args:
        argument: its name. Those of a method begin with the method, as ``"PKD.alpha"``.
        value: the value, or a few words for it; strings are shown without quotes.
        allowed: what is expected.
        hint: what to do. ``{taps}`` in it is replaced by the front end's name of the argument ``taps``.

    Example:
        >>> print(ConfigError("alpha", -1, allowed=">= 0"))
        alpha: found -1, expected >= 0
        >>> error = ConfigError("method", "PDK", allowed="one of PKD, KD", hint="see {method}")
        >>> error.render(str.upper)
        'METHOD: found PDK, expected one of PKD, KD; see METHOD'
    """

    def __init__(self, argument: str, value: object = "", allowed: str = "", hint: str = "") -> None:
        super().__init__(argument, value, allowed, hint)
        self.argument, self.value, self.allowed, self.hint = argument, value, allowed, hint
        self._method: tuple[str, tuple[str, ...]] = ("", ())

    def __str__(self) -> str:
        return self.render(_same)

    def render(self, names: Names) -> str:
        """Return the message in one line, with the arguments under the front end's names."""
        if "\n" in self.argument:  # a data loader raises a worker's error anew, with the traceback as its only argument
            return self.argument.strip().splitlines()[-1].partition(": ")[2]
        found = f"found {self.value if self.value != '' else repr('')}"
        expected = f", expected {self.allowed}" if self.allowed else ""
        hint = f"; {rendered(self.hint, names_of(*self._method, names))}" if self.hint else ""
        return " ".join(f"{names(self.argument)}: {found}{expected}{hint}".split())

    def of(self, method: str, arguments: Iterable[str]) -> ConfigError:
        """Return the same error as a method's: its arguments, as ``alpha``, become ``PKD.alpha``."""
        own = tuple(arguments)
        error = ConfigError(names_of(method, own, _same)(self.argument), self.value, self.allowed, self.hint)
        error._method = (method, own)
        return error


class RunError(RuntimeError):
    """A run that cannot go on: a full disk, a broken file, a loss that is not finite. It reads "where: what; remedy".

    Args:
        what: what is wrong.
        where: the place, as a file or ``"iteration 7"``.
        remedy: what to do, with ``{argument}`` fields as in :class:`ConfigError`.

    Example:
        >>> print(RunError("the loss is not finite", where="iteration 7", remedy="lower the learning rate"))
        iteration 7: the loss is not finite; lower the learning rate
    """

    def __init__(self, what: str, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        return self.render(_same)

    def render(self, names: Names) -> str:
        """Return the message in one line, with the arguments under the front end's names."""
        if "\n" in self.what:  # from a data loader's worker; see ConfigError
            return self.what.strip().splitlines()[-1].partition(": ")[2]
        where = f"{self.where}: " if self.where else ""
        remedy = f"; {rendered(self.remedy, names)}" if self.remedy else ""
        return " ".join(f"{where}{self.what}{remedy}".split())


@contextmanager
def one_line_errors(program: str, names: Names = _same) -> Iterator[None]:
    """End a program with one line for the two errors above; anything else is a bug and keeps its traceback.

    Args:
        program: its name, for the beginning of the line.
        names: how it calls an argument.

    Raises:
        SystemExit: instead of such an error.
    """
    try:
        yield
    except (ConfigError, RunError) as error:
        raise SystemExit(f"{program}: {error.render(names)}") from None
