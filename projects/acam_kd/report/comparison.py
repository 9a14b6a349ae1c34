"""Statistics, table and plot of a comparison: several rows, each run with several seeds.

A record describes one run. It is a mapping with ``row``, ``seed``, ``metrics`` and the entries that
``acam_kd.compare`` adds. Rows are paired by seed, because runs of one seed share their start and the order of their
images.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from . import tuning
from .curves import GREY, PALETTE, STYLE
from .interval import half_width, verdict

__all__ = ["INHERITANCE_ALONE", "STUDENT_ALONE", "TEACHER", "Panel", "check_equal", "differences", "plot", "section"]

Record = Mapping[str, Any]
TEACHER = "teacher"
"""The row of a setting's teacher, which is shown and compared with nothing."""
STUDENT_ALONE, INHERITANCE_ALONE = "student alone", "inheritance alone"
"""The rows that the others are compared with wherever a setting has them; the first is the usual control."""


@dataclass(frozen=True)
class Panel:
    """The rows and records of one setting.

    Args:
        name: the setting's name.
        records: the records of its runs, in any order. Records of rows that are not in ``rows`` are left out.
        rows: the rows in the order of the table.
        metrics: names of metrics; the first is compared.
        control: the row that a verdict refers to; empty for no such row.
        threshold: the gain over the control that a verdict asks for; None for no verdicts.
        mimicking: the row that every method should beat; empty for no such row.
        failed: row -> seeds whose run failed.
        tried: the records of tuning runs, which are no results.
        chosen: tuned row -> the number of its best candidate, once all were tried.
    """

    name: str
    records: Sequence[Record]
    rows: Sequence[str]
    metrics: Sequence[str]
    control: str = ""
    threshold: float | None = None
    mimicking: str = ""
    failed: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tried: Sequence[Record] = ()
    chosen: Mapping[str, int] = field(default_factory=dict)

    @property
    def baselines(self) -> list[str]:
        """The rows that get a column of differences."""
        names = dict.fromkeys((self.control, STUDENT_ALONE, INHERITANCE_ALONE))
        return [name for name in names if name in self.rows]

    def of(self, row: str) -> list[Record]:
        """List the records of a row by seed."""
        return sorted((r for r in self.records if r["row"] == row), key=lambda r: r["seed"])

    def values(self, row: str, metric: str) -> dict[int, float]:
        """Map the seeds of a row to a metric."""
        return {r["seed"]: float(r["metrics"].get(metric, math.nan)) for r in self.of(row)}


def differences(panel: Panel, row: str, other: str) -> list[float]:
    """Subtract ``other`` from ``row`` in the first metric, for every seed that both have."""
    ours, theirs = (panel.values(name, panel.metrics[0]) for name in (row, other))
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def check_equal(panel: Panel) -> None:
    """Check that the runs may stand in one table.

    Rows may differ in their iterations, which the table then shows: a plan may ask what more of them are worth.

    Raises:
        ConfigError: the runs of a row had different numbers of iterations, or the students different versions of torch
            or devices.
    """
    for row in panel.rows:
        _check_same(panel, "iterations", [(r["iterations"], r) for r in panel.of(row)], of="of a row")
    students = [r for r in panel.records if r["row"] in panel.rows]
    _check_same(panel, "versions of torch", [(r["versions"]["torch"], r) for r in students])
    _check_same(panel, "devices", [(r.get("device"), r) for r in students])


def _check_same(panel: Panel, name: str, found: Sequence[tuple[Any, Record]], of: str = "that are compared") -> None:
    values: dict[Any, Record] = {}
    for value, record in found:
        values.setdefault(value, record)
    if len(values) > 1:
        from ..core.errors import ConfigError  # here, because the core imports torch and pictures need none

        each = ", ".join(f"{value} ({r['row']}, seed {r['seed']})" for value, r in values.items())
        raise ConfigError("records", f"different {name} in {panel.name}: {each}", allowed=f"the same for all runs {of}")


def section(panel: Panel) -> str:
    """Write the Markdown of one setting: heading, table, notes, and the table of its tuning.

    Raises:
        ConfigError: see ``check_equal``.
    """
    check_equal(panel)
    notes = _notes(panel)
    parts = [_table(panel), notes, tuning.table(panel.tried, panel.metrics, panel.chosen)]
    return "\n".join([f"## {panel.name}", "", *(line for part in parts if part for line in (*part, ""))])


def _table(panel: Panel) -> list[str]:
    first, *others = panel.metrics
    heads = ["row", f"{first}, mean (std)", *others, f"{first} per seed"]
    for other in panel.baselines:
        judged = panel.threshold is not None and other == panel.control
        heads += [f"minus {other}, 95%", *(["n", "verdict"] if judged else [])]
    unequal = len(_iterations(panel)) > 1
    heads += ["iterations"] if unequal else []
    heads += ["distillation/task", "s/step", "peak GiB of the GPU" if _on_gpu(panel) else "peak GiB of the process"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in (TEACHER, *panel.rows):
        records, failed = panel.of(row), panel.failed.get(row, ())
        if not records and not failed:
            continue
        seeds = [f"{value:.2f}" for value in panel.values(row, first).values()]
        seeds += [f"**failed** (seed {seed})" for seed in sorted(failed)]
        cells = [row, _spread(panel, row, first), *(_spread(panel, row, m) for m in others), ", ".join(seeds)]
        for other in panel.baselines:
            cells += _compared(panel, row, other)
        if unequal:
            cells.append(str(records[0]["iterations"]) if records else "")
        cells += [
            _mean(records, "distillation_to_task"),
            _mean(records, "seconds_per_step"),
            _mean(records, "peak_gpu_gib" if _on_gpu(panel) else "peak_rss_gib"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _compared(panel: Panel, row: str, other: str) -> list[str]:
    """Fill the columns of one baseline: the difference, and for the control its n and the verdict."""
    found = [] if row in (TEACHER, other) else differences(panel, row, other)
    cells = [_difference(found)]
    if panel.threshold is not None and other == panel.control:
        cells += [str(len(found)), verdict(found, panel.threshold)] if found else ["", ""]
    return cells


def _iterations(panel: Panel) -> list[int]:
    """Return the numbers of iterations that students had."""
    return sorted({r["iterations"] for r in panel.records if r["row"] in panel.rows})


def _range(numbers: Sequence[int]) -> str:
    """Write the first and the last of sorted numbers, or the one that both are."""
    return " to ".join(dict.fromkeys(map(str, (numbers[0], numbers[-1]))))


def _on_gpu(panel: Panel) -> bool:
    return any(record.get("peak_gpu_gib") for record in panel.records)


def _spread(panel: Panel, row: str, metric: str) -> str:
    values = list(panel.values(row, metric).values())
    if not values:
        return ""
    if not all(map(math.isfinite, values)):  # without any detection there is no AP
        return "nan"
    return f"{statistics.mean(values):.2f}" + (f" ({statistics.stdev(values):.2f})" if len(values) > 1 else "")


def _difference(found: Sequence[float]) -> str:
    if not found:
        return ""
    if not all(map(math.isfinite, found)):
        return "nan"
    mean, half = statistics.mean(found), half_width(found)
    return f"{mean:+.2f}" if half is None else f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def _mean(records: Sequence[Record], key: str) -> str:
    values = [r[key] for r in records if r.get(key) is not None]
    return f"{statistics.mean(values):.3g}" if values else ""


def _notes(panel: Panel) -> list[str]:
    students = [r for r in panel.records if r["row"] in panel.rows]
    counts = sorted({len(panel.of(row)) for row in panel.rows if panel.of(row)})
    notes = []
    if students:
        iterations, seeds = _range(_iterations(panel)), _range(counts)
        notes.append(f"{iterations} iterations a run, {seeds} seed{'s' * (counts[-1] > 1)} a row.")
        notes.append("Differences are paired by seed; the 95% interval is Student's t.")
    if any(r.get("seconds_per_step_is") == "total" for r in students):
        notes.append("s/step: where too few steps are logged, all seconds of the run, evaluations too, by iterations.")
    if panel.threshold is not None:
        notes.append(
            f"GO: the interval is above 0 and the mean at least {panel.threshold:g} more than {panel.control}. "
            f"NO-GO: the interval is below {panel.threshold:g}. INCONCLUSIVE: neither, or too few seeds."
        )
    else:
        missing = [row for row in (STUDENT_ALONE, INHERITANCE_ALONE) if row not in panel.rows]
        notes += [f"There is no row for {row}, so there is no difference against it." for row in missing]
    notes.extend(_beyond_mimicking(panel))
    return notes


def _beyond_mimicking(panel: Panel) -> list[str]:
    """List the rows that beat plain mimicking, that is whose interval of the difference is above 0, and the others."""
    if not panel.mimicking or not panel.of(panel.mimicking):
        return []
    better, others, unknown = [], [], []
    for row in panel.rows:
        if row == panel.mimicking or row in panel.baselines or not panel.of(row):
            continue
        found = differences(panel, row, panel.mimicking)
        half = half_width(found)
        if half is None:
            unknown.append(row)
        elif statistics.mean(found) - half > 0:
            better.append(f"{row} {_difference(found)}")
        else:
            others.append(f"{row} {_difference(found)}")
    notes = []
    if better:
        notes.append(f"Better than {panel.mimicking} (the 95% interval is above 0): {'; '.join(better)}.")
    if others:
        notes.append(f"Not better than {panel.mimicking} (it is not above 0): {'; '.join(others)}.")
    if unknown:
        notes.append(
            f"Compared with {panel.mimicking}, too few common seeds with a value to say: {'; '.join(unknown)}."
        )
    return notes


def plot(panels: Sequence[Panel]) -> bytes:
    """Draw dots for all seeds and a stroke at their mean, one panel per setting; return a PNG file."""
    shown = [[row for row in (TEACHER, *panel.rows) if panel.of(row)] for panel in panels]
    heights = [0.3 * max(1, len(rows)) + 0.9 for rows in shown]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, sum(heights)), layout="constrained")
        every = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, panel, rows in zip(every, panels, shown):
            for place, row in enumerate(rows):
                values = list(panel.values(row, panel.metrics[0]).values())
                colour = GREY if row == TEACHER else PALETTE[place % (len(PALETTE) - 1)]
                axes.plot(values, [place] * len(values), "o", color=colour, markersize=5, alpha=0.7)
                axes.plot([statistics.mean(values)], [place], "|", color=colour, markersize=16, markeredgewidth=2)
            axes.set_yticks(range(len(rows)), rows)
            axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)
            axes.set_title(panel.name, loc="left", fontsize=10, fontweight="bold")
            axes.set_xlabel(f"{panel.metrics[0]}, a dot per seed, the mean as a stroke")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
