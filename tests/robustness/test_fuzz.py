"""Damaged and hostile files of every kind: only ConfigError and RunError leave, and nothing is written elsewhere.

``ACAM_KD_FUZZ=5000`` tries more inputs, ``ACAM_KD_FUZZ_SEED`` others. The seed of CI is fixed. An input on which
something failed is added to ``test_found.py``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from acam_kd.core.errors import ConfigError, RunError

from .edits import byte_edits, damaged, edited, value_edits
from .inputs import TARGETS
from .limits import INPUTS, SECONDS, SEED, in_child

EACH = max(1, INPUTS // len(TARGETS))


@pytest.fixture(scope="module", autouse=True)
def warm():
    """Let hypothesis collect the constants of all modules once, and not in every child."""
    settings(max_examples=2, database=None, deadline=None)(given(byte_edits, value_edits)(lambda one, other: None))()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def whole(folder: Path) -> None:
    """Check that no file is a temporary one, and that each JSON can be read by any reader of JSON."""
    for path in folder.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".json" and path.is_file():
            json.loads(path.read_text(), parse_constant=refuse)


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} in JSON")


def attempt(target, read, data, tmp_path: Path) -> bool:
    """Try one input; return whether it was accepted."""
    target.file.write_bytes(data)
    (tmp_path / "last_input").write_bytes(data)
    before = snapshot(target.folder)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            read(target.folder)
        accepted = True
    except (ConfigError, RunError) as error:
        line = str(error)
        assert "\n" not in line and line.strip()
        accepted = False
    except SystemExit:  # of argparse, for a value in a file of options
        accepted = False
    finally:
        signal.alarm(0)
    assert snapshot(target.folder) == before, "an input was changed, or something was written beside it"
    for place in ("cache", "out"):
        whole(tmp_path / place)
    return accepted


@pytest.mark.parametrize("name", [*TARGETS])
def test_damaged_files_are_one_line(name, tmp_path, monkeypatch):
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    for place in ("in", "out", "cache", "here"):
        (tmp_path / place).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    target = TARGETS[name](tmp_path / "in")
    original = target.file.read_bytes()
    content = target.content
    read = target.prepare(tmp_path / "out")
    counts = {True: 0, False: 0}

    def run(data: bytes) -> None:
        counts[attempt(target, read, data, tmp_path)] += 1

    options = settings(
        max_examples=EACH if content is None else max(1, EACH // 2), deadline=None, database=None,
        suppress_health_check=[*HealthCheck], phases=[Phase.generate, Phase.shrink],
    )  # fmt: skip

    @seed(SEED)
    @options
    @given(byte_edits)
    def damaged_bytes(edits):
        run(damaged(original, edits))

    @seed(SEED)
    @options
    @given(value_edits)
    def other_values(edits):
        try:
            data = target.encode(edited(content, edits))
        except RecursionError:  # nested more deeply than a file can be written here
            return
        run(data)

    def inputs():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert attempt(target, read, original, tmp_path), "the file is refused as it is"
            damaged_bytes()
            if content is not None:
                other_values()
        (tmp_path / "counts").write_text(f"{counts[True]} accepted, {counts[False]} refused")

    in_child(inputs, tmp_path)
    assert not os.listdir(tmp_path / "here")
    print(f"{name}: {(tmp_path / 'counts').read_text()}")
