"""Comparisons: several rows and seeds of several settings, run by ``acam-kd compare``."""

from .plan import COMMANDS, Run, Setting, runs_of
from .reading import read_plan
from .records import read_records, read_run
from .runner import Comparison

__all__ = ["COMMANDS", "Comparison", "Run", "Setting", "read_plan", "read_records", "read_run", "runs_of"]
