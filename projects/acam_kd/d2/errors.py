"""What a user can mend ends a program with one line."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yacs

__all__ = ["one_line_errors"]

FOLDERS = (str(Path(__file__).parent.parent), os.path.dirname(yacs.__file__))


@contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn the errors that this package raises on purpose into the program's last line, without the traceback.

    So are those of yacs, where unknown keys and wrong types end. All others pass.

    Args:
        program: its name, for the beginning of the line.

    Raises:
        SystemExit: instead of such an error.
    """
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError, AssertionError) as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not raised_in.startswith(FOLDERS):
            raise
        raise SystemExit(f"{program}: {error.args[0]}") from None
