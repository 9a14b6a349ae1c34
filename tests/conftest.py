"""Fixtures, and what happens where Detectron2 is not installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

try:
    import detectron2.modeling  # noqa: F401

    HAS_D2 = True
except ImportError:
    HAS_D2 = False
REQUIRE_D2 = os.environ.get("ACAM_KD_REQUIRE_D2") == "1"
SKIPPED = "Detectron2 is not installed: tests/d2 was skipped (README.md, Set-up, says how to install it)"

collect_ignore = [] if HAS_D2 else ["d2"]


def pytest_configure(config: pytest.Config) -> None:
    if REQUIRE_D2 and not HAS_D2:
        pytest.exit("ACAM_KD_REQUIRE_D2=1, but Detectron2 cannot be imported", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not HAS_D2:
        terminalreporter.write_line(SKIPPED)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def root() -> Path:
    return Path(__file__).resolve().parent.parent
