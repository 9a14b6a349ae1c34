"""benchmarks/attention_growth.py: points that are measured once, the exponent, and new processes."""

from __future__ import annotations

import json

import pytest
import torch

from acam_kd.core.errors import RunError
from benchmarks import attention_growth as tool
from benchmarks.growth import Point, measured
from benchmarks.growth_plot import FIT_FROM, exponent, plot, series_of, table
from benchmarks.memory import OUT_OF_MEMORY, STATUS, _send, in_own_process, is_out_of_memory, peak_memory


@pytest.fixture
def here(monkeypatch):
    """Measure points in this process, on few channels, and list them."""
    seen = []

    def measure(function, point, repeats):
        seen.append(point)
        return function(Point(**{**vars(point), "channels": 8, "masks": 2}), repeats) | {"channels": 256, "masks": 6}

    monkeypatch.setattr(tool, "in_own_process", measure)
    return seen


def run(tmp_path, *arguments):
    tool.main(["--output", str(tmp_path / "g.jsonl"), "--plot", str(tmp_path / "g.png"), "--repeats", "2", *arguments])
    return [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]


def test_points_are_measured_once(here, tmp_path, capsys):
    threads = torch.get_num_threads()
    arguments = ["--grids", "2x3", "3x4", "--paths", "auto", "map", "--threads", str(threads)]
    records = run(tmp_path, *arguments)
    assert [(r["series"], r["positions"]) for r in records] == [("auto", 6), ("map", 6), ("auto", 12), ("map", 12)]
    for record in records:
        assert len(record["seconds"]) == 2 and record["extra_memory"] >= 0 and record["on"]["versions"]["torch"]
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert len(here) == 4
    assert run(tmp_path, *arguments) == run(tmp_path, "--plot-only") == records
    assert len(here) == 4 and capsys.readouterr().out == printed * 2
    run(tmp_path, *arguments, "--grids", "2x3", "4x4")
    assert len(here) == 6


def test_the_naive_attention_is_guarded(tmp_path, capsys):
    args = tool._parser().parse_args(["--output", "x", "--grids", "100x168", "200x336"])
    found = [(point.path, point.height) for point in tool.points(args)]
    assert found == [("auto", 100), ("map", 100), ("materialized", 100), ("auto", 200), ("map", 200)]
    assert "materialized at 200x336 is left out: it needs 67.3 GiB" in capsys.readouterr().err


def test_max_positions_with_both_kinds_of_pooling():
    args = tool._parser().parse_args(["--output", "x", "--grids", "9x9", "--paths", "map", "--max-positions", "16"])
    assert [point.series for point in tool.points(args)] == ["map", "keys pooled to 16", "all pooled to 16"]


@pytest.mark.parametrize("pooling", ["keys", "all"])
def test_a_point_with_max_positions(pooling):
    point = Point("auto", 6, 6, 9, pooling, channels=8, masks=2, threads=torch.get_num_threads())
    found = measured(point, 1)
    assert found["max_positions"] == 9 and found["series"] == f"{pooling} pooled to 9"


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_dtypes(dtype):
    point = Point("auto", 3, 4, dtype=dtype, channels=8, masks=2, threads=torch.get_num_threads())
    assert measured(point, 1)["dtype"] == dtype


def record(positions, seconds=None, **others):
    fields = {"series": "auto", "height": 1, "width": positions, "device": "cpu", "dtype": "float32", "threads": 1}
    found = {"seconds": [seconds] * 3, "extra_memory": 8 * positions} if seconds else {"failed": OUT_OF_MEMORY}
    return {**fields, "positions": positions, **found, **others}


def test_the_exponent_of_exact_data():
    sizes = [FIT_FROM, 2 * FIT_FROM, 5 * FIT_FROM]
    assert exponent(sizes, [3e-9 * n**1.7 for n in sizes]) == pytest.approx(1.7)
    small = [10, 100]  # they do not count
    assert exponent([*small, *sizes], [7, 1, *(2.0 * n for n in sizes)]) == pytest.approx(1)
    assert exponent(sizes[:1] * 2, [1, 2]) is exponent(small, [1, 2]) is None
    text = table([record(n, 1e-9 * n**2) for n in sizes] + [record(90000)])
    assert "auto: exponent of time 2.00, of memory 1.00, from 4000 to 20000 positions." in text
    assert "auto at 90000 positions: out of memory." in text


def test_several_machines_in_one_file():
    records = [record(5000, 1.0), record(6000, 1.0, device="cuda"), record(7000)]
    assert list(series_of(records)) == ["auto (cpu, float32, threads: 1)", "auto (cuda, float32)"]
    assert plot(records).startswith(b"\x89PNG") and plot([]).startswith(b"\x89PNG")


def test_what_is_out_of_memory():
    errors = [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: x")]
    assert all(map(is_out_of_memory, errors)) and not is_out_of_memory(RuntimeError("x"))

    class Sent(list):
        send = list.append

    for error in errors:
        sent = Sent()
        _send(sent, lambda error=error: (_ for _ in ()).throw(error))
        assert sent == [{"failed": OUT_OF_MEMORY}]


@pytest.mark.skipif(not STATUS.is_file() or "VmHWM" not in STATUS.read_text(), reason="the system does not say")
def test_a_large_parent_does_not_hide_what_its_child_needs():
    ballast = torch.ones(2**27)  # half a GiB
    read = "{'peak': __import__('benchmarks.memory', fromlist=['x']).peak_memory(False)}"
    child = in_own_process(eval, read)["peak"]
    assert 0 < child < peak_memory(False) - ballast.nbytes / 2


def test_a_process_that_fails():
    with pytest.raises(RunError) as error:
        in_own_process(eval, "{}['nothing']")
    assert error.value.what == "eval failed in its process, with exit code 1"
