"""What a user can mend ends a program with one line."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["as_options", "one_line_errors", "options_for_keys"]

MENDABLE = (ValueError, KeyError, FileNotFoundError, FloatingPointError, AssertionError)

WORKER = "in DataLoader worker process"
"""torch raises what a worker raised again, with the traceback as its text."""


@contextmanager
def one_line_errors(program: str, *others: ModuleType) -> Iterator[None]:
    """Turn the errors that this package raises on purpose into the program's last line, without the traceback.

    Args:
        program: its name, for the beginning of the line.
        others: packages whose errors are turned too, as yacs, where unknown keys and wrong types end.

    Raises:
        SystemExit: instead of such an error.
    """
    try:
        yield
    except MENDABLE as error:
        folders = [__file__, *(str(module.__file__) for module in others)]
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if WORKER in str(error) and os.path.dirname(__file__) in str(error).rpartition('File "')[2]:
            raise SystemExit(f"{program}: {str(error).strip().splitlines()[-1].partition(': ')[2]}") from None
        if not raised_in.startswith(tuple(os.path.dirname(folder) for folder in folders)):
            raise
        raise SystemExit(f"{program}: {error.args[0]}") from None


KEYS = re.compile(r"\b(key|keys): ([A-Z_.]+(?:, [A-Z_.]+)*)")


def as_options(message: str) -> str:
    """A message of the core, which names config keys, in the words of the command: ``--method``, ``--set alpha``."""

    def option(key: str) -> str:
        *place, name = key.removeprefix("DISTILL.").split(".")
        if key == "DISTILL.PERIOD":  # the command has other periods
            return "--distill-period"
        if key.startswith("DISTILL.") and place in ([], ["TEACHER"]):
            return f"--{'-'.join([*place, name]).lower().replace('_', '-')}"
        return f"--set {'.'.join([*place, name.lower()])}"

    def options(match: re.Match[str]) -> str:
        return f"{match[1].replace('key', 'option')}: {', '.join(map(option, match[2].split(', ')))}"

    return re.sub(r"DISTILL\.[A-Z_.]*[A-Z]", lambda match: option(match[0]), KEYS.sub(options, message))


@contextmanager
def options_for_keys() -> Iterator[None]:
    """Raise the core's errors in the words of the command.

    Raises:
        FileNotFoundError, FloatingPointError, ValueError: instead of an error that names config keys.
    """
    try:
        yield
    except (FileNotFoundError, FloatingPointError, KeyError, ValueError) as error:
        found = str(error.args[0]) if error.args else ""
        message = as_options(found)
        if message == found:
            raise
        kind = next((k for k in (FileNotFoundError, FloatingPointError) if isinstance(error, k)), ValueError)
        raise kind(message) from error
