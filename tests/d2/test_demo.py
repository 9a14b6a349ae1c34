"""The demo with Detectron2: its runs leave what the table and the report need."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time

import pytest
import torch

from acam_kd.core.errors import RunError
from acam_kd.core.interrupts import Interrupted
from acam_kd.d2 import demo as engine
from acam_kd.data import shapes
from acam_kd.demo import PLANS, TEACHER, demo

from .conftest import refused


@pytest.fixture
def short(root, tmp_path, monkeypatch):
    """A checkout whose demo takes four steps, on few images."""
    checkout = tmp_path / "checkout"
    shutil.copytree(root / "configs", checkout / "configs")
    shutil.copy(root / "train_net.py", checkout)
    monkeypatch.setattr(engine, "CHECKOUT", checkout)
    monkeypatch.setattr(engine, "AT_ONCE", 1)  # other processes would not see what is patched here
    for name in ("student", "teacher"):
        path = checkout / f"configs/demo/{name}.yaml"
        text = path.read_text()
        for key, value in {"MAX_ITER": 4, "CHECKPOINT_PERIOD": 2, "EVAL_PERIOD": 2, "WARMUP_ITERS": 1}.items():
            text = "\n".join(
                f"{line.split(key)[0]}{key}: {value}" if key + ":" in line else line for line in text.splitlines()
            )
        path.write_text(text + "\n")
    (checkout / "configs/demo/student.yaml").write_text(
        (checkout / "configs/demo/student.yaml").read_text().replace("IMS_PER_BATCH: 8", "IMS_PER_BATCH: 2")
    )
    monkeypatch.setattr(shapes, "SPLITS", {"train": 6, "val": 6})
    return tmp_path / "demo"


@pytest.mark.slow
def test_it_runs_and_is_not_repeated(short, capfd):
    demo(short, engine="detectron2")
    for folder in (short / "teacher", *(short / "seed0" / plan.key for plan in PLANS)):
        result = json.loads((folder / "result.json").read_text())
        assert {"AP", "AP50", "APs"} <= result["metrics"].keys() and result["seconds"] > 0
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps[-1] == 4 and isinstance(json.loads((folder / "predictions.json").read_text()), list)
    small, large = (
        json.loads((short / f / "result.json").read_text())["parameters"] for f in ("seed0/acam", "teacher")
    )
    assert small < 2e6 < 11e6 < large
    text = (short / "seed0/acam/config.yaml").read_text()
    assert "METHOD: ACAMKD" in text and "INHERIT: always" in text
    assert "ALPHA: 4.0" in (short / "seed0/mimicking/config.yaml").read_text()
    moments = {path.name.split("_")[0] for path in (short / "seed0/acam/masks").iterdir()}
    assert moments == {"0000002", "0000004"}
    assert TEACHER.name in (short / "table.md").read_text() and "base64," in (short / "report.html").read_text()
    capfd.readouterr()
    demo(short, engine="detectron2")
    assert "iter:" not in capfd.readouterr().out


def test_without_the_repository_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CHECKOUT", tmp_path)
    with refused("engine", "detectron2", "torchvision", f"no checkout with configs/demo in {tmp_path}"):
        engine.run(TEACHER, tmp_path, data=tmp_path, teacher=tmp_path, seed=0, watched=[])


SAVES = """
import pathlib, signal, sys, time
def save(*_):
    pathlib.Path("saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
pathlib.Path("began").touch()
time.sleep(60)
"""


def test_a_signal_ends_the_command_after_it_has_saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def stop():
        end = time.monotonic() + 30
        while not (tmp_path / "began").is_file() and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted) as error:
        engine._status([sys.executable, "-c", SAVES], {})
    stopper.join()
    assert error.value.number == signal.SIGTERM and (tmp_path / "saved").is_file()


def test_a_command_gets_the_threads_and_its_status_is_returned(tmp_path, capfd):
    code = "import os, sys; print('said'); sys.exit(int(os.environ['OMP_NUM_THREADS']) + int(os.environ['FURTHER']))"
    for console, said in ((None, "said\n"), (tmp_path / "console.txt", "")):
        status = engine._status([sys.executable, "-c", code], {"FURTHER": "40"}, console)
        assert status == 40 + torch.get_num_threads() and capfd.readouterr().out == said
    assert (tmp_path / "console.txt").read_text() == "said\n"


def test_a_run_of_other_configs_is_not_taken_for_complete(short, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(engine, "_status", lambda command, *_: ran.append(command) or 1)
    given = {"data": tmp_path, "teacher": tmp_path, "seed": 0, "watched": []}
    with pytest.raises(RunError, match="teacher failed"):
        engine.run(TEACHER, tmp_path, **given)
    settings = {"command": ran[0][1:], "config": engine._digest(ran[0])}
    (tmp_path / "result.json").write_text(json.dumps(settings))
    engine.run(TEACHER, tmp_path, **given)
    assert len(ran) == 1
    path = engine.CHECKOUT / "configs/demo/student.yaml"  # the base of the teacher's
    path.write_text(path.read_text().replace("ADAMW", "SGD"))
    with refused("output", "with a run of other settings", "another folder"):
        engine.run(TEACHER, tmp_path, **given)
