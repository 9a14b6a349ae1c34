"""The benchmarks of long runs and of large datasets, short and small."""

from __future__ import annotations

import re

import pytest

from benchmarks import endurance, load
from benchmarks.endurance import Sample


def test_the_summary_compares_the_tenths():
    samples = [Sample(step, 100 + (step > 50), 7 if step < 100 else 9) for step in range(1, 101)]
    assert endurance.summary(samples) == (
        "100 steps: 100.0 MiB in the first tenth, 101.0 halfway, 101.0 in the last tenth (+1.0); open files 7 and 9"
    )


def test_a_sample_sees_memory_and_files(tmp_path):
    before = Sample.now(1)
    with open(tmp_path / "a", "w"):
        kept = bytearray(64 << 20)
        after = Sample.now(2)
    assert after.files == before.files + 1 and after.memory - before.memory > 32 and len(kept)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("run", ["torchvision", "classes", "detectron2"])
def test_a_short_run(run, tmp_path, monkeypatch, capsys):
    if run == "detectron2":
        pytest.importorskip(run)
    monkeypatch.setattr("acam_kd.data.shapes.SPLITS", {"train": 12, "val": 3})
    endurance.main(["--run", run, "--iterations", "8", "--folder", str(tmp_path)])
    said = capsys.readouterr().out
    assert re.search(rf"^{run}: 8 steps: .* MiB in the first tenth", said, re.MULTILINE)
    assert [int(step) for step in re.findall(r"Sample\(step=(\d+)", said)] == [*range(1, 9)]


@pytest.mark.slow
def test_a_small_load(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ACAM_KD_CACHE", "")
    load.main(["--images", "20", "--annotations", "60", "--folder", str(tmp_path / "load")])
    lines = capfd.readouterr().out.splitlines()
    found = [line.split(":")[0] for line in lines if line.endswith("GiB at most")]
    assert found == ["first check", "second check", "start", "resume"]
    assert (tmp_path / "load/run/result.json").is_file()
