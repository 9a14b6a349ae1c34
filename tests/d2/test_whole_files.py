"""Detectron2's checkpoints are whole or not there, and a disk that is full is one line."""

from __future__ import annotations

import os
import resource

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from acam_kd.core import RunError
from acam_kd.core.average import Average
from acam_kd.d2.best import _Saver
from acam_kd.d2.weights_file import read_safely
from acam_kd.d2.whole_files import write_safely

from ..robustness.limits import in_child


def checkpointer(folder):
    made = read_safely(DetectionCheckpointer(nn.Linear(1000, 1000), str(folder)))
    write_safely(made)
    return made


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    made = checkpointer(out)
    made.save("model_1", iteration=1)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        for name in ("model_1", "model_2"):
            with pytest.raises(RunError) as error:
                made.save(name, iteration=2)
            line = (
                f"{out}/{name}.pth: writing failed (File too large); make room on the disk, or make the folder writable"
            )
            assert str(error.value).startswith(line), error.value

    in_child(full, tmp_path)
    assert sorted(os.listdir(out)) == ["last_checkpoint", "model_1.pth"]
    assert torch.load(out / "model_1.pth", weights_only=True)["iteration"] == 1
    assert checkpointer(out).resume_or_load("", resume=True)["iteration"] == 1


def test_a_name_appears_when_the_file_is_complete(tmp_path):
    made = checkpointer(tmp_path)
    with pytest.raises(ValueError), made.path_manager.open(str(tmp_path / "a"), "w") as file:
        file.write("half")
        assert [name[:3] for name in os.listdir(tmp_path)] == [".a."]
        raise ValueError
    assert not os.listdir(tmp_path)
    with made.path_manager.open(str(tmp_path / "a"), "w") as file:
        file.write("whole")
    with made.path_manager.open(str(tmp_path / "a")) as file:
        assert file.read() == "whole"


def test_the_best_checkpoint_never_stands_for_the_last_one(tmp_path):
    """Not for a moment, in which a run could be killed."""
    made = checkpointer(tmp_path)
    made.save("model_1")
    average = Average(made.model, 0.5)
    _Saver(made, average).save("model_best")
    assert (tmp_path / "last_checkpoint").read_text() == "model_1.pth"
    written, write = [], made.path_manager.open
    made.path_manager.open = lambda path, mode: written.append(os.path.basename(path)) or write(path, mode)
    _Saver(made, average).save("model_average")
    assert written == ["model_average.pth"]
    made.save("model_2")
    assert (tmp_path / "last_checkpoint").read_text() == "model_2.pth"
