"""The figures of the front page and of the choice of a method follow from the records in docs/."""

from __future__ import annotations

import json
import re
import statistics

import pytest

from acam_kd.report.interval import half_width, verdict

from .pages import ROOT

SHAPES, SEGMENTS, CHESS = "drawn shapes, FCOS", "drawn shapes, LR-ASPP", "chess at 160, FCOS"
CELLS = "blood cells, FCOS"
CHOICES = (
    (SHAPES, "PKD"),
    (SEGMENTS, "CWD"),
    (SHAPES, "plain mimicking"),
    (SHAPES, "ACAM-KD, ours"),
    (SHAPES, "KD"),
    (CHESS, "ACAM-KD, standardised"),
    (CELLS, "ACAM-KD, standardised"),
)
"""The setting and the row of each line of the front page's table."""
MIMICKING = {SHAPES: "plain mimicking", SEGMENTS: "plain logit mimicking", CHESS: "Mimic, raw", CELLS: "Mimic, raw"}
FIGURES = re.compile(r"([+-][\d.]+) (?:AP|mIoU) \[([+-][\d.]+), ([+-][\d.]+)\]")


def records():
    results = ROOT / "docs/results"
    files = [ROOT / "docs/comparison_results.jsonl", results / "chess_160.jsonl", results / "bccd_features.jsonl"]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def differences(setting, row, other):
    """Return the paired differences over the seeds that both rows have."""
    metric = "mIoU" if setting == SEGMENTS else "AP"
    found = [r for r in records() if r["setting"] == setting]
    mine, theirs = ({r["seed"]: r["metrics"][metric] for r in found if r["row"] == name} for name in (row, other))
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def is_rounded(text, value):
    return float(text) == pytest.approx(value, abs=0.0501)


def table(page, first):
    """Return the cells of each line of the table whose head begins with some words."""
    (found,) = re.findall(
        rf"^\| {re.escape(first)} \|.*\n\|---.*\n((?:\|.*\n)+)", (ROOT / page).read_text(), re.MULTILINE
    )
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]


def test_the_front_pages_table():
    lines = table("README.md", "you have")
    for (setting, row), (_, _, alone, mimicking) in zip(CHOICES, lines, strict=True):
        for text, other in ((alone, "student alone"), (mimicking, MIMICKING[setting])):
            if row == other:
                assert not text
                continue
            found = differences(setting, row, other)
            mean, half = statistics.mean(found), half_width(found)
            (figures,) = FIGURES.findall(text)
            assert all(map(is_rounded, figures, (mean, mean - half, mean + half))), (row, other, figures)
            if other == MIMICKING[setting]:
                assert text.startswith("**") == (mean - half > 0), (row, text)


def test_the_choice_of_a_method():
    detection, segmentation, photos, cells_of_blood = table("docs/choose_a_method.md", "task")
    methods = {"ACAMKD": "ACAM-KD, ours", "DMKD": "DMKD (reconstruction)"}
    for setting, cells in ((SHAPES, detection), (SEGMENTS, segmentation)):
        for place, cell in enumerate(cells[1:]):
            for method, full, figure in re.findall(r"`(\w+)`( with the full gradient)? ([+-][\d.]+)", cell):
                row = "ACAM-KD, full gradient, pairwise" if full else methods.get(method, method)
                found = differences(setting, row, MIMICKING[setting])
                mean, half = statistics.mean(found), half_width(found)
                assert is_rounded(figure, mean), (row, figure, mean)
                assert place == (0 if mean - half > 0 else 2 if mean + half < 0 else 1), (row, mean, half)
    rows = {"`ACAMKD`": "ACAM-KD, standardised", "`ACAMKD`, raw,": "ACAM-KD, raw", "`ScoreWeighted`": "ScoreWeighted"}
    for setting, cells in ((CHESS, photos), (CELLS, cells_of_blood)):
        said = dict(re.findall(r"(`ACAMKD`(?:, raw,)?|`ScoreWeighted`) ([+-][\d.]+)", cells[2]))
        assert len(said) == (3 if setting == CHESS else 2)
        for name, figure in said.items():
            found = differences(setting, rows[name], MIMICKING[setting])
            assert is_rounded(figure, statistics.mean(found)), name
            assert abs(statistics.mean(found)) <= half_width(found), name


@pytest.mark.parametrize(("setting", "head", "count"), [(CHESS, "row", 8), (CELLS, "blood cells", 5)])
def test_the_verdicts_of_the_photos(setting, head, count):
    lines = table("docs/results.md", f"{head} | AP, mean (std) | AP50")
    assert len(lines) == count
    for row, mean, *_, alone, said, mimicking in lines[1:]:
        found = differences(setting, row, "student alone")
        assert said == verdict(found, 1.0), row
        for text, values in ((alone, found), (mimicking, differences(setting, row, "Mimic, raw"))):
            if text:
                figures = [float(x) for x in re.findall(r"[+-][\d.]+", text)]
                half = half_width(values)
                centre = statistics.mean(values)
                assert figures == pytest.approx([centre, centre - half, centre + half], abs=0.006), (row, mean)
