"""The demo, whole and in a few steps: table, report, and resuming where it stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from acam_kd import demo as module
from acam_kd.cli import main
from acam_kd.core.errors import ConfigError
from acam_kd.core.interrupts import Interrupted
from acam_kd.data import shapes
from acam_kd.demo import PLANS, demo
from acam_kd.demo.outcome import EXAMPLES, watched_images
from acam_kd.demo.runs import make_all
from acam_kd.tv import demo as engine
from acam_kd.tv.written import as_dict


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 4, "val": 12})
    monkeypatch.setattr(module, "make_shapes", lambda root: shapes.make_shapes(root, size=96))
    numbers = {"SIZE": 96, "TEACHER_ITERATIONS": 4, "ITERATIONS": 4, "AT_ONCE": 1}
    for name, value in {"TEACHER": engine.STUDENT, **numbers}.items():
        monkeypatch.setattr(engine, name, value)


@pytest.mark.slow
def test_it_runs_and_goes_on_and_is_not_repeated(small, tmp_path, monkeypatch, capsys):
    run, done = engine.run, []

    def stop_at_the_third(plan, *args, **kwargs):
        done.append(plan.key)
        if len(done) == 3:
            raise KeyboardInterrupt
        run(plan, *args, **kwargs)

    monkeypatch.setattr(engine, "run", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path)
    assert not (tmp_path / "report.html").exists()
    students = [tmp_path / "teacher/student.pth", tmp_path / "seed0/alone/student.pth"]
    before = [path.stat().st_mtime_ns for path in students]
    demo(tmp_path, seeds=[0, 1])
    assert [path.stat().st_mtime_ns for path in students] == before
    assert all((tmp_path / f"seed{seed}/{plan.key}/student.pth").is_file() for seed in (0, 1) for plan in PLANS)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    for plan in (module.TEACHER, *PLANS):
        assert f"| {plan.name} |" in table
    assert len(table.splitlines()[0].split("|")) == len(table.splitlines()[2].split("|"))
    assert (tmp_path / "picture.jpg").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert "ACAM-KD" in page and "plain mimicking" in page and "base64," in page
    masks = sorted(path.name for path in (tmp_path / "seed0/acam/masks").iterdir())
    moments = {f"{step:07d}" for step in (0, 2, 4)}  # the start, every evaluation
    assert {name.split("_")[0] for name in masks} == moments
    assert not (tmp_path / "seed0/mimicking/masks").exists()


def test_rows_differ_only_in_what_they_say(small, tmp_path, monkeypatch):
    """Same data, iterations, schedule and seed; the teacher is a folder of its own."""
    asked = {}
    monkeypatch.setattr(engine, "train", lambda settings, folder, **_: asked.update({folder: settings}))
    data = shapes.make_shapes(tmp_path, size=96)
    for plan in PLANS:
        engine.run(plan, tmp_path / plan.key, data=data, teacher=tmp_path / "t", seed=3, watched=[])
    kept = [
        {k: v for k, v in as_dict(settings).items() if k not in ("teacher", "method", "options", "inherit")}
        for settings in asked.values()
    ]
    assert len(kept) == 4 and all(settings == kept[0] for settings in kept) and kept[0]["seed"] == 3
    rows = {folder.name: (s.method, s.options, s.inherit, bool(s.teacher)) for folder, s in asked.items()}
    assert rows == {
        "alone": ("", (), "never", False),
        "inheritance": ("", (), "always", True),
        "mimicking": ("Mimic", ("alpha=20.0", "features=raw"), "always", True),
        "acam": ("ACAMKD", ("alpha=10.0", "features=raw"), "always", True),
    }


def test_a_quick_demo_is_short_and_has_a_folder_of_its_own(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(engine, "train", lambda settings, folder, **_: asked.append(settings))
    data = shapes.make_shapes(tmp_path, size=96)
    for plan in (module.TEACHER, *PLANS):
        quick = dataclasses.replace(plan, quick=True)
        engine.run(quick, tmp_path / plan.key, data=data, teacher=tmp_path / "t", seed=0, watched=[])
    assert {(s.iterations, s.eval_period, s.warmup) for s in asked} == {(10, 10, 5)}
    outputs = []
    monkeypatch.setattr(module, "demo", lambda output, **given: outputs.append((str(output), given["quick"])))
    for arguments in (["demo"], ["demo", "--quick"], ["demo", "--quick", "--engine", "detectron2"]):
        main(arguments)
    assert outputs == [
        ("output/demo", False), ("output/demo_quick", True), ("output/demo_detectron2_quick", True)
    ]  # fmt: skip


def test_watched_images_have_objects_of_many_sizes(small, tmp_path):
    folder = shapes.make_shapes(tmp_path, size=96)
    names = watched_images(folder)
    content = json.loads((folder / "val.json").read_text())
    sizes = {image["file_name"]: set() for image in content["images"]}
    for a in content["annotations"]:
        sizes[f"{a['image_id'] - 1:05d}.png"].add((a["area"] > 32**2) + (a["area"] > 64**2))
    assert len(names) == EXAMPLES
    assert min(len(sizes[name]) for name in names) >= max(len(s) for n, s in sizes.items() if n not in names)


def test_an_engine_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(module.ENGINES, "detectron2", "acam_kd.gone.demo")
    with pytest.raises(ConfigError) as error:
        demo(tmp_path, engine="detectron2")
    assert error.value.argument == "engine"
    assert error.value.value.startswith("detectron2, which cannot be imported (No module named ")
    assert list(tmp_path.iterdir()) == []


# Runs beside each other.


@dataclasses.dataclass(frozen=True)
class Stub:
    """A run that writes a file and ends, at once or a second after the first one began, fails, or waits for a signal."""

    file: Path
    kind: str

    def make_beside_others(self, threads):
        self.file.write_text(str(threads))
        if self.kind == "fails":
            raise ConfigError("size", 3, "4")
        if self.kind == "ends after the first":
            while not self.file.with_name("0").is_file():
                time.sleep(0.05)
            time.sleep(1)
        if self.kind == "waits":
            try:
                signal.signal(signal.SIGTERM, signal.default_int_handler)
                time.sleep(60)
            except KeyboardInterrupt:
                raise Interrupted("a checkpoint", signal.SIGTERM) from None


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def stubs(folder, *kinds):
    return [Stub(folder / str(number), kind) for number, kind in enumerate(kinds)]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_runs_beside_each_other_share_the_threads(tmp_path, two_threads):
    make_all(stubs(tmp_path, "ends", "ends", "ends"), 2)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"0": "1", "1": "1", "2": "1"}


def test_after_an_error_no_further_run_begins(tmp_path, two_threads):
    with pytest.raises(ConfigError, match="size: found 3, expected 4"):
        make_all(stubs(tmp_path, "fails", "ends after the first", "ends", "ends"), 2)
    assert names(tmp_path) == ["0", "1"]


def test_after_a_signal_no_further_run_begins(tmp_path, two_threads):
    def stop():
        while len(names(tmp_path)) < 2:
            time.sleep(0.05)
        time.sleep(0.5)  # both wait
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(Interrupted) as error:
        make_all(stubs(tmp_path, "waits", "waits", "ends", "ends"), 2)
    stopper.join()
    assert error.value.number == signal.SIGTERM and names(tmp_path) == ["0", "1"]
