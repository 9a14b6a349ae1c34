"""Readers of options' values, for argparse."""

from __future__ import annotations

import argparse
import math

from ..core import read_methods
from ..core.errors import ConfigError
from ..fields import positive, rate
from .names import option as name_of

__all__ = ["amount", "decay", "devices", "method"]


def method(text: str) -> str:
    """Read the name of a method, or several."""
    try:
        read_methods("" if text == "none" else text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(error.render(name_of).removeprefix("--method: ")) from None
    return text


def devices(text: str) -> int | str:
    """Read a number of devices, or ``auto``."""
    return text if text == "auto" else positive(text)


def decay(text: str) -> float:
    """Read the decay of a moving average."""
    value = rate(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be below 1, found {value}")
    return value


def amount(text: str) -> float:
    """Read a finite number from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, found {text}")
    return value
