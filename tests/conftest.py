"""Fixtures, and what happens where Detectron2 is not installed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

# One thread in each process of the tests, and in those that they start: threads of several processes wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

try:
    import detectron2.modeling  # noqa: F401

    MISSING = ""
except ImportError as error:
    MISSING = str(error)
REQUIRE_D2 = os.environ.get("ACAM_KD_REQUIRE_D2") == "1"
SKIPPED = f"tests/d2 was skipped: Detectron2 cannot be imported ({MISSING}); README.md, Set-up, says how to install it"

collect_ignore = ["d2"] if MISSING else []


def pytest_configure(config: pytest.Config) -> None:
    if REQUIRE_D2 and MISSING:
        pytest.exit(f"ACAM_KD_REQUIRE_D2=1, but Detectron2 cannot be imported: {MISSING}", returncode=1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if MISSING:
        terminalreporter.write_line(SKIPPED)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> None:
    """Let Ctrl-C interrupt, which a shell ignores in what it starts in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the checks' cache, in this process and those that it starts, out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACAM_KD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def root() -> Path:
    return Path(__file__).resolve().parent.parent
