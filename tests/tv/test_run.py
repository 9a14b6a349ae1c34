"""The folder of a run: errors name the argument or the place."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
import torch

from acam_kd.core.errors import ConfigError, RunError
from acam_kd.lock import Lock
from acam_kd.tv.card import Card, read_card, resolved
from acam_kd.tv.folder import RunFolder


@pytest.fixture
def folder(tmp_path, settings):
    """A folder whose run has started."""
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    made.start(settings, {})
    return made


def test_a_folder_with_a_run_is_not_used_again(folder, settings):
    with pytest.raises(ConfigError) as error:
        folder.check(settings, resume=False)
    assert (error.value.argument, error.value.value) == ("output", f"{folder.path}, which has a run already")
    assert "{resume}" in error.value.hint and "{output}" in error.value.hint
    folder.check(settings, resume=True)


@pytest.mark.parametrize(
    ("change", "before"), [({"learning_rate": 0.02}, "0.01"), ({"method": "PKD"}, "''"), ({"taps": ("logits",)}, "[]")]
)
def test_a_run_is_resumed_with_its_own_settings(folder, settings, change, before):
    changed = dataclasses.replace(settings, **change)
    (name, value), *_ = change.items()
    with pytest.raises(ConfigError) as error:
        folder.check(changed, resume=True)
    assert (error.value.argument, error.value.value) == (name, list(value) if isinstance(value, tuple) else value)
    assert error.value.allowed == f"{before}, as in the run in {folder.path}" and "{output}" in error.value.hint
    folder.check(dataclasses.replace(settings, workers=7), resume=True)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(ConfigError) as error:
        Lock(tmp_path / "run").__enter__()
    assert error.value.argument == "output"
    assert error.value.value == f"{tmp_path}/run, which cannot be written (File exists)"


@pytest.mark.parametrize("argument", ["student", "teacher"])
def test_a_folder_without_a_finished_run_is_named_as_its_argument(folder, argument):
    with pytest.raises(ConfigError) as error:
        read_card(folder.path, argument=argument)
    assert (error.value.argument, error.value.value) == (argument, f"no finished run in {folder.path}")
    assert error.value.allowed == "a folder with student.json and student.pth"


def test_settings_name_the_student(folder, settings):
    unfinished = dataclasses.replace(settings, student=str(folder.path), size=None)
    for ask in (lambda: unfinished.student_name, lambda: resolved(unfinished)):
        with pytest.raises(ConfigError) as error:
            ask()
        assert error.value.argument == "student"


def test_a_full_disk_ends_the_run_with_one_line(folder, settings, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    model = torch.nn.Linear(1, 1)
    writes = {
        "metrics.jsonl": lambda: folder.log(2, {"loss": 1.0}),
        "predictions.json": lambda: folder.write_predictions([]),
        "last.ckpt": lambda: folder.write_checkpoint({}),
        "student.pth": lambda: folder.write_student(Card("x", 2, None), model),
        "result.json": lambda: folder.finish(model, settings, metrics={}, seconds=1.0),
    }

    folder.log(1, {"loss": 1.0})
    monkeypatch.setattr("acam_kd.tv.folder.write_atomically", full)
    monkeypatch.setattr("builtins.open", full)
    for name, write in writes.items():
        with pytest.raises(RunError) as error:
            write()
        assert (error.value.what, error.value.where) == (
            "writing failed (No space left on device)",
            str(folder.path / name),
        )
        assert "{resume}" in error.value.remedy
    monkeypatch.undo()
    assert len((folder.path / "metrics.jsonl").read_text().splitlines()) == 1 and folder.result() is None
