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
FACADES, CAMVID = "facade at 128, Mobile DeepLabV3", "CamVid at 128, Mobile DeepLabV3"
FEW = "facade, 40 labels, teacher of all"
CHOICES = (
    (SHAPES, "PKD"),
    (SHAPES, "plain mimicking"),
    (SHAPES, "ACAM-KD, ours"),
    (CHESS, "ACAM-KD, standardised"),
    (CELLS, "ACAM-KD, standardised"),
    (CAMVID, "CWD"),
    (FEW, "distilled, with unlabelled"),
)
"""The setting and the row of each line of the front page's table."""
MIMICKING = {
    **{SHAPES: "plain mimicking", SEGMENTS: "plain logit mimicking"},
    **{CHESS: "Mimic, raw", CELLS: "Mimic, raw", FACADES: "Mimic", CAMVID: "Mimic"},
}
SAID = re.compile(r"`(\w+)`(, standardised,| with the full gradient)? ([+-][\d.]+)")
"""A method and its difference to mimicking, in a cell of the choice."""
FIGURES = re.compile(r"([+-][\d.]+) (?:AP|mIoU) \[([+-][\d.]+), ([+-][\d.]+)\]")


def records():
    names = (
        "chess_160",
        "bccd_features",
        "bccd_masks",
        "facade",
        "camvid_128",
        "facade_unlabelled",
        "chess_unlabelled",
    )
    files = [ROOT / "docs/comparison_results.jsonl", *(ROOT / f"docs/results/{name}.jsonl" for name in names)]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def differences(setting, row, other):
    """Return the paired differences over the seeds that both rows have."""
    found = [r for r in records() if r["setting"] == setting and "tuning" not in r]
    metric = "mIoU" if "mIoU" in found[0]["metrics"] else "AP"
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
        for text, other in ((alone, "student alone"), (mimicking, MIMICKING.get(setting))):
            if other in (row, None):
                assert not text
                continue
            found = differences(setting, row, other)
            mean, half = statistics.mean(found), half_width(found)
            (figures,) = FIGURES.findall(text)
            assert all(map(is_rounded, figures, (mean, mean - half, mean + half))), (row, other, figures)
            if other == MIMICKING.get(setting):
                assert text.startswith("**") == (mean - half > 0), (row, text)


def test_the_choice_of_a_method():
    detection, segmentation, photos, cells_of_blood, facades, frames = table("docs/choose_a_method.md", "task")
    drawn = {"ACAMKD": "ACAM-KD, ours", "DMKD": "DMKD (reconstruction)"}
    drawn["ACAMKD with the full gradient"] = "ACAM-KD, full gradient, pairwise"
    real = {"ACAMKD": "ACAM-KD", "ACAMKD, standardised,": "ACAM-KD, standardised"}
    for setting, cells, methods, count in (
        *((SHAPES, detection, drawn, 13), (SEGMENTS, segmentation, drawn, 8)),
        *((FACADES, facades, real, 4), (CAMVID, frames, real, 2)),
    ):
        assert len(SAID.findall(" ".join(cells))) == count, setting
        for place, cell in enumerate(cells[1:]):
            for name, more, figure in SAID.findall(cell):
                row = methods.get(name + more, name)
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


def check_interval(text, values):
    figures = [float(x) for x in re.findall(r"[+-][\d.]+", text)]
    half, centre = half_width(values), statistics.mean(values)
    assert figures == pytest.approx([centre, centre - half, centre + half], abs=0.006), text


@pytest.mark.parametrize(
    ("setting", "head", "count"),
    [
        (CHESS, "row | AP, mean (std) | AP50", 8),
        (CELLS, "blood cells | AP, mean (std) | AP50", 5),
        (FACADES, "facades | mIoU, mean (std)", 6),
        (CAMVID, "CamVid | mIoU, mean (std)", 4),
    ],
)
def test_the_verdicts_of_the_photos(setting, head, count):
    lines = table("docs/results.md", head)
    assert len(lines) == count
    for row, _, *_, alone, said, mimicking in lines[1:]:
        found = differences(setting, row, "student alone")
        assert said == verdict(found, 1.0), row
        check_interval(alone, found)
        if mimicking:
            check_interval(mimicking, differences(setting, row, MIMICKING[setting]))


def test_the_verdicts_of_the_masks():
    lines = table("docs/results.md", "masks, blood cells | AP, mean (std)")
    assert len(lines) == 4
    limits, page = ((ROOT / f"docs/{name}.md").read_text() for name in ("limits", "masks"))
    for row, *_, minus, said in lines[1:]:
        found = differences("blood cells, FCOS, masks", row, "uniform masks")
        assert said == verdict(found, 0.5) and minus in page, row
        check_interval(minus, found)
    assert lines[1][-2] in limits


@pytest.mark.parametrize(
    ("setting", "head", "count"),
    [
        (FEW, "row | mIoU, mean (std)", 7),
        ("chess, 40 labels, teacher of all", "teacher of all | AP, mean (std)", 5),
        ("chess, 40 labels, teacher of 40", "teacher of the same 40 | AP, mean (std)", 4),
    ],
)
def test_the_verdicts_of_images_without_labels(setting, head, count):
    lines = table("docs/unlabelled.md", head)
    assert len(lines) == count
    for row, _, _, _, few, said, *more, _ in lines:
        row = row.strip("*")
        if few:
            found = differences(setting, row, "distilled on 40")
            assert said == verdict(found, 1.0), row
            check_interval(few, found)
        if more and more[0]:
            check_interval(more[0], differences(setting, row, "student alone"))
