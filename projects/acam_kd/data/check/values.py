"""Numbers and ids of a json, however they are written: 120, 120.0, "120". Where the meaning is in doubt: None."""

from __future__ import annotations

import math
import re
from typing import Any

__all__ = ["identity", "number", "whole"]

WRITTEN = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
LARGEST = 2**63 - 1
"""The largest id, of 64 bits."""


def number(value: Any) -> float | int | None:
    """Return a finite number, also of a text; None for anything else, True and False included.

    Example:
        >>> number(" 60.50 "), number(7), number("60,5"), number(float("nan")), number(True)
        (60.5, 7, None, None, None)
    """
    if type(value) is str:
        if not WRITTEN.fullmatch(value):
            return None
        value = float(value)
    if type(value) is int:
        return value if abs(value) <= LARGEST else None
    return value if type(value) is float and math.isfinite(value) else None


def whole(value: Any) -> int | None:
    """Return a whole number, also of a text or of a float without a fraction; None for anything else.

    Example:
        >>> whole("12"), whole(120.0), whole(0.5)
        (12, 120, None)
    """
    if type(value) is str and WRITTEN.fullmatch(value) and value.strip().lstrip("+-").isdigit():
        value = int(value)  # a float would round a long one
    found = number(value)
    return int(found) if found is not None and found == int(found) and abs(found) <= LARGEST else None


def identity(value: Any) -> int | str | None:
    """Return an id: a whole number however it is written, or a text that is none; None for anything else.

    Example:
        >>> identity("7"), identity(7.0), identity("frame_7"), identity([7])
        (7, 7, 'frame_7', None)
    """
    found = whole(value)
    if found is not None:
        return found
    return value if type(value) is str and value else None
