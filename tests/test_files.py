"""Files that are written completely or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat

import numpy as np
import pytest

from acam_kd.files import numbers, sha256, to_json, write_atomically


@pytest.fixture
def umask():
    """Return the function that sets the umask, and restore the old umask afterwards."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_text_and_bytes_are_written(tmp_path):
    write_atomically(tmp_path / "text", "grün\n")
    write_atomically(str(tmp_path / "bytes"), b"\x00\xff")
    assert (tmp_path / "text").read_bytes() == "grün\n".encode()
    assert (tmp_path / "bytes").read_bytes() == b"\x00\xff"
    assert sorted(os.listdir(tmp_path)) == ["bytes", "text"]
    assert sha256(tmp_path / "bytes") == hashlib.sha256(b"\x00\xff").hexdigest()


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_a_new_file_gets_the_mode_of_the_umask(tmp_path, umask, mask):
    umask(mask)
    write_atomically(tmp_path / "new", "x")
    assert mode(tmp_path / "new") == 0o666 & ~mask


@pytest.mark.parametrize("own", [0o600, 0o640, 0o444, 0o755])
def test_an_existing_file_keeps_its_mode(tmp_path, umask, own):
    path = tmp_path / "old"
    path.write_text("before")
    path.chmod(own)
    write_atomically(path, "after")
    assert path.read_text() == "after" and mode(path) == own


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    sync, replace = os.fsync, os.replace

    def seen_sync(handle):
        info = os.fstat(handle)
        seen.append(("folder" if stat.S_ISDIR(info.st_mode) else f"{info.st_size} bytes", path.exists()))
        sync(handle)

    def seen_replace(source, target):
        seen.append(("replace", path.exists()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_sync)
    monkeypatch.setattr(os, "replace", seen_replace)
    write_atomically(path, "12345")
    assert seen == [("5 bytes", False), ("replace", False), ("folder", True)]


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fails):
    path = tmp_path / "file"
    write_atomically(path, "before")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "after")
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"a": x}, lambda x: [1, (x, 2)], lambda x: {"a": [{"b": x}]}])
def test_json_has_null_for_every_number_that_is_not_finite(value, place):
    def fail(text):
        raise AssertionError(text)

    text = to_json(place(value), indent=1)
    assert json.loads(text, parse_constant=fail) == json.loads(json.dumps(place(None)))


def test_json_keeps_everything_else():
    value = {"a": [1, 2.5, "NaN", None, True], "b": {"c": (1,)}, 3: 1e300}
    assert to_json(value) == json.dumps(value)
    assert numbers({"a": None, "b": 0, "c": "x"}) == pytest.approx({"a": math.nan, "b": 0, "c": "x"}, nan_ok=True)
    with pytest.raises(TypeError):
        to_json({"a": object()})
