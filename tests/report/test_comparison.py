"""The statistics, the table and the plot of a comparison."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from acam_kd.compare.records import best
from acam_kd.core.errors import ConfigError
from acam_kd.report.comparison import Panel, check_equal, differences, plot, section
from acam_kd.report.interval import half_width, t_quantile, verdict


def record(row, seed, ap, **more):
    base = {"iterations": 100, "versions": {"torch": "2"}, "seconds_per_step": 0.5, "peak_rss_gib": 1.0}
    return {"row": row, "seed": seed, "metrics": {"AP": ap, "AP50": 2 * ap}, **base, **more}


def panel(**more):
    """Return the three rows with torchvision of docs/segmentation.md."""
    values = {
        "student alone": (39.50, 34.93, 38.59),
        "mimicking": (44.88, 35.67, 42.05),
        "ACAM-KD": (42.50, 35.83, 44.02),
    }
    records = [record(row, seed, ap) for row, own in values.items() for seed, ap in enumerate(own)]
    content = {"name": "shapes", "records": records, "rows": list(values), "metrics": ["AP", "AP50"]}
    return Panel(**{**content, "control": "student alone", "mimicking": "mimicking", **more})


def test_a_run_without_a_value_stays_in_the_table():
    """COCO has no AP where nothing was detected."""
    records = [record(row, seed, 10.0 + seed) for row in ("student alone", "mimicking", "ACAM-KD") for seed in (0, 1)]
    records[-1] = record("ACAM-KD", 1, math.nan)
    text = section(panel(records=records))
    line = next(line for line in text.splitlines() if line.startswith("| ACAM-KD"))
    assert line.startswith("| ACAM-KD | nan |") and "10.00, nan" in line
    assert "with a value to say: ACAM-KD" in text and "| mimicking | 10.50 (0.71) |" in text


def test_runs_on_other_devices_are_no_comparison():
    records = [record("student alone", 0, 1.0), {**record("mimicking", 0, 2.0), "device": "H200"}]
    with pytest.raises(ConfigError) as error:
        section(panel(records=records))
    assert error.value.argument == "records"
    assert error.value.value.startswith("different devices in shapes: ")
    assert error.value.value.endswith("H200 (mimicking, seed 0)")


# Statistics.


@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 15, 30])
def test_quantiles_by_integrating_the_density(degrees):
    """Half of 95% lies between 0 and the quantile. For t = sqrt(n) tan(a) the density is cos^(n-1)."""
    angle = np.arctan(t_quantile(degrees) / np.sqrt(degrees))

    def integral(end):
        middle = (np.arange(200000) + 0.5) / 200000 * end
        return (np.cos(middle) ** (degrees - 1)).sum() * end / 200000

    assert integral(angle) / integral(np.pi / 2) == pytest.approx(0.95, abs=2e-5)


def test_quantiles_fall_to_the_normal_ones():
    found = [t_quantile(n) for n in range(1, 33)]
    assert found[:31] == sorted(found[:31], reverse=True) and found[30] == found[31] == 1.96
    with pytest.raises(ValueError, match="0 degrees"):
        t_quantile(0)


def test_interval_by_hand():
    """The deviation of 1, 2, 3 is 1, so the result is 4.3027 / sqrt(3)."""
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.48416, abs=1e-4)
    assert half_width([5.0]) is None and half_width([]) is None


@pytest.mark.parametrize(
    ("values", "threshold", "expected"),
    [  # the half width of 1, 2, 3 is 2.4842, that of three equal values 0
        ((3.0, 4.0, 5.0), 1.0, "GO"),
        ((3.0, 4.0, 5.0), 4.0, "GO"),  # the mean is exactly the threshold
        ((3.0, 4.0, 5.0), 4.1, "INCONCLUSIVE"),  # surely a gain, but perhaps a smaller one
        ((3.0, 4.0, 5.0), 6.5, "NO-GO"),  # surely a gain, surely a smaller one: up to 6.484
        ((1.0, 2.0, 3.0), 1.0, "INCONCLUSIVE"),  # the lower bound is below 0
        ((-3.0, -2.0, -1.0), 1.0, "NO-GO"),  # the upper bound is 0.484
        ((-3.0, -2.0, -1.0), 0.4, "INCONCLUSIVE"),
        ((0.0, 0.0), 0.0, "INCONCLUSIVE"),  # the lower bound is exactly 0, and so is the upper one
        ((0.0, 0.0), 0.5, "NO-GO"),
        ((1.0, 1.0), 1.0, "GO"),  # no width, both bounds are exactly the threshold
        ((1.0, 1.0), 1.5, "NO-GO"),
        ((9.0,), 1.0, "INCONCLUSIVE"),
        ((), 1.0, "INCONCLUSIVE"),
        ((9.0, 9.0, math.nan), 1.0, "INCONCLUSIVE"),
    ],
)
def test_verdicts_by_hand(values, threshold, expected):
    assert verdict(values, threshold) == expected


def test_the_lower_bound_must_be_above_zero():
    """The half width of d, 0, -d around their mean m is 2.4842 d, so at m = 2.4842 d the lower bound is 0."""
    half = half_width([1.0, 0.0, -1.0])
    for mean, expected in ((half * (1 - 1e-9), "INCONCLUSIVE"), (half * (1 + 1e-9), "GO")):
        assert verdict([mean + 1, mean, mean - 1], 1.0) == expected


def test_the_best_candidate():
    def tried(*values):
        return [{"metrics": {"AP": v}, "tuning": {"candidate": k, "arguments": []}} for k, v in enumerate(values)]

    assert best(tried(1.0, 3.0, 2.0), "AP") == 1
    assert best(tried(1.0, 3.0, 3.0)[::-1], "AP") == 1
    assert best(tried(math.nan, -1.0, math.inf), "AP") == 1
    assert best(tried(math.nan, math.nan)[::-1], "AP") == 0


def test_differences_are_paired_by_common_seeds():
    records = [record("a", 2, 5.0), record("a", 0, 1.0), record("b", 2, 3.0), record("b", 1, 100.0)]
    assert differences(panel(records=records, rows=["a", "b"]), "a", "b") == [2.0]


# The table.


def test_table():
    text = section(panel())
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines() if "|" in line
    }
    assert rows["row"] == [
        *("row", "AP, mean (std)", "AP50", "AP per seed", "minus student alone, 95%"),
        *("distillation/task", "s/step", "peak GiB of the process"),
    ]
    assert rows["ACAM-KD"][:5] == [
        *("ACAM-KD", "40.78 (4.36)", "81.57 (8.71)", "42.50, 35.83, 44.02", "+3.11 [-2.52, +8.74]")
    ]
    assert rows["student alone"][4] == ""
    assert "There is no row for inheritance alone" in text
    assert "Not better than mimicking (it is not above 0): ACAM-KD -0.08 [-5.51, +5.35]." in text
    assert "100 iterations a run, 3 seeds a row." in text


def test_what_beats_mimicking_is_said():
    records = [*panel().records, *(record("new", s, ap) for s, ap in enumerate((45.88, 36.77, 43.05)))]
    text = section(panel(records=records, rows=[*panel().rows, "new"]))
    assert "Better than mimicking (the 95% interval is above 0): new +1.03 [+0.89, +1.18]." in text


def test_verdicts_in_the_table():
    records = [*panel().records, *(record("sure", s, ap) for s, ap in enumerate((41.5, 37.0, 40.6)))]
    records += [record("sure", 7, 1.0), record("once", 0, 80.0), record("teacher", 0, 57.4)]
    text = section(panel(records=records, rows=[*panel().rows, "sure", "once"], threshold=2.0))
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert cells["row"][4:7] == ["minus student alone, 95%", "n", "verdict"]
    assert cells["ACAM-KD"][4:7] == ["+3.11 [-2.52, +8.74]", "3", "INCONCLUSIVE"]
    assert cells["sure"][4:7] == ["+2.03 [+1.93, +2.12]", "3", "GO"]
    assert cells["once"][4:7] == ["+40.50", "1", "INCONCLUSIVE"]
    assert cells["student alone"][4:7] == cells["teacher"][4:7] == ["", "", ""]
    assert "GO: the interval is above 0 and the mean at least 2 more than student alone. NO-GO: " in text
    text = section(panel(records=records, rows=[*panel().rows, "sure"], threshold=6.0, control="mimicking"))
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in text.splitlines()}
    assert cells["row"][4:8] == ["minus mimicking, 95%", "n", "verdict", "minus student alone, 95%"]
    assert cells["ACAM-KD"][4:7] == ["-0.08 [-5.51, +5.35]", "3", "NO-GO"]


def test_one_seed_has_no_interval():
    text = section(panel(records=[r for r in panel().records if r["seed"] == 0]))
    assert "| +3.00 |" in text and "[" not in text.partition("\n\n")[2].partition("\n\n")[0]
    assert (
        "too few common seeds with a value to say: ACAM-KD." in text and "100 iterations a run, 1 seed a row." in text
    )


def test_ratio_teacher_and_failures_are_shown():
    records = [*panel().records, record("teacher", 0, 57.41, iterations=600)]
    records[3] = {**records[3], "distillation_to_task": 0.5}
    text = section(panel(records=records, failed={"ACAM-KD": [4, 3], "student alone": []}))
    assert "| teacher | 57.41 | 114.82 | 57.41 |  |  | 0.5 | 1 |" in text
    assert re.search(r"\| mimicking \|.* \| 0.5 \| 0.5 \| 1 \|", text)
    assert "44.02, **failed** (seed 3), **failed** (seed 4)" in text


def test_unequal_runs_get_no_table():
    records = [*panel().records, record("mimicking", 3, 1.0, iterations=200)]
    with pytest.raises(ConfigError) as error:
        section(panel(records=records))
    assert error.value.argument == "records"
    different = "different iterations in shapes: 100 (mimicking, seed 0), 200 (mimicking, seed 3)"
    assert error.value.value == different and error.value.allowed == "the same for all runs of a row"
    with pytest.raises(ConfigError) as error:
        check_equal(panel(records=[*panel().records, record("mimicking", 3, 1.0, versions={"torch": "3"})]))
    assert error.value.value.startswith("different versions of torch in shapes: 2 ") and ", 3 " in error.value.value
    assert error.value.allowed == "the same for all runs that are compared"


def test_rows_of_other_lengths_show_theirs():
    """A plan may ask what twice the steps are worth: chess_trunk.yaml and the pair of facade.yaml."""
    longer = [record("student alone, twice as long", seed, 41.0 + seed, iterations=200) for seed in range(3)]
    rows = [*panel().rows, "student alone, twice as long"]
    equal, text = section(panel()), section(panel(records=[*panel().records, *longer], rows=rows))
    assert "iterations |" not in equal and "100 iterations a run, 3 seeds a row." in equal
    heads = next(line for line in text.splitlines() if line.startswith("| row")).split(" | ")
    for row, count in (("student alone", "100"), ("ACAM-KD", "100"), ("student alone, twice as long", "200")):
        cells = next(line for line in text.splitlines() if line.startswith(f"| {row} |")).split(" | ")
        assert cells[heads.index("iterations")] == count
    assert "100 to 200 iterations a run, 3 seeds a row." in text


def test_plot_is_a_picture_also_of_nothing():
    full, empty = plot([panel(), panel()]), plot([panel(records=[])])
    assert full.startswith(b"\x89PNG") and empty.startswith(b"\x89PNG") and len(full) > len(empty) > 1000
