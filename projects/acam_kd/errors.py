"""What a user can mend ends a program with one line."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

__all__ = ["one_line_errors"]

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
