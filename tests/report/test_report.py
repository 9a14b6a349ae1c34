"""The report as a file: complete, escaped, self-contained, whatever is missing."""

from __future__ import annotations

import base64
import math
import os
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from acam_kd.report import report
from acam_kd.report.curves import loss_names, series
from acam_kd.report.report import write_report
from acam_kd.report.results import Detections, Example, Row, Snapshot

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """The elements and texts of a page, whose tags have to be balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(content, tmp_path):
    def make(**changed) -> Page:
        write_report(tmp_path / "index.html", **{**content, **changed})
        return Page((tmp_path / "index.html").read_text())

    return make


def decoded(uri):
    kind, data = re.fullmatch(r"data:image/(png|jpeg|svg\+xml);base64,(.*)", uri).groups()
    raw = base64.b64decode(data, validate=True)
    if kind == "svg+xml":
        assert raw.startswith(b"<?xml") and b"<svg" in raw and b"<script" not in raw
        return None
    image = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR)
    assert image is not None
    return image


def test_everything_is_there(page):
    made = page()
    for text in (
        "ACAM-KD on synthetic shapes",
        "2 CPU cores",
        "35.80",
        "6.90 M",
        "1 h 06 min",
        "25 min 12 s",
        "+11.08",
    ):
        assert text in made.texts
    assert any("It does not beat plain mimicking" in text for text in made.texts)
    assert "One seed: differences under about 2 AP are noise." in made.texts
    assert made.texts.count("level p3") == 2
    images = made.all("img")
    assert len(images) == 3 + 5 + 2 * 4 + 2 * 4 * 2  # metrics, losses, detections, levels of masks


def test_pictures_decode_and_say_what_they_are(page):
    for attributes in page().all("img"):
        picture = decoded(attributes["src"])
        if picture is not None:
            assert picture.shape[:2] == (int(attributes["height"]), int(attributes["width"]))
        assert len(attributes["alt"]) > 10


@pytest.mark.slow
def test_nothing_is_fetched(page, tmp_path):
    made = page()
    text = (tmp_path / "index.html").read_text()
    assert made.all("script") == [] and "@import" not in text and "url(" not in text
    addresses = [a[key] for _, a in made.elements for key in ("src", "href", "srcset", "poster") if key in a]
    assert addresses and all(address.startswith("data:") for address in addresses)
    assert "http://" not in text and "https://" not in text


def test_names_are_escaped(page, rows):
    bad = '<script>alert("x")</script>&'
    renamed = [Row(bad, bad, rows[0].metrics, 1.0, 5, rows[1].history)]
    sample = Example(bad, np.zeros((8, 8, 3), np.uint8), Detections(np.zeros((0, 4)), []), {})
    masks = {bad: {"spatial": np.ones((1, 2, 2))}}
    made = page(
        title=bad, intro=bad, caveat=bad, about={bad: bad}, rows=renamed, examples=[sample],
        snapshots=[Snapshot(1, 0, masks, {bad: 4})],
    )  # fmt: skip
    assert made.all("script") == []
    assert made.texts.count(bad) >= 8 and any(bad in a["alt"] for a in made.all("img"))


def test_missing_pieces(page):
    rows = [
        Row("a", metrics={"AP": math.nan}, role="alone"),
        Row("b", metrics={"AP": 2.0, "mIoU": 3.0}, history=[{"step": 1, "loss": math.nan}]),
        Row("c"),
    ]
    made = page(rows=rows, examples=(), snapshots=(), about={}, intro="", caveat="")
    assert made.texts.count("-") == 4 + 2 + 4  # AP, mIoU, parameters and time; b has no parameters and no time
    assert "mIoU" in made.texts and "No history was recorded." in made.texts
    assert made.all("img") == [] and "Detections" not in made.texts and made.all("details") == []
    assert page(rows=[], examples=(), snapshots=()).texts


def test_the_best_student_is_bold(page, tmp_path):
    page()
    bold = re.findall("<strong>(.*?)</strong>", (tmp_path / "index.html").read_text())
    assert bold == ["31.95", "51.12", "28.75", "15.97", "31.95"]  # not the teacher's


def test_as_many_detections_as_objects_best_first(rows):
    truth = Detections(np.array([[2.0, 2, 30, 30]]), ["cat"])
    boxes = np.array([[40.0, 40, 60, 60], [2, 2, 30, 31]])
    both = Detections(boxes, ["cat", "cat"], np.array([0.2, 0.9]))
    sample = Example(
        "x",
        np.zeros((64, 64, 3), np.uint8),
        truth,
        {"teacher": both, "ACAM-KD": Detections(boxes[:0], [], np.zeros(0))},
    )
    drawn = report._example(sample, rows)
    assert [picture.caption for picture in drawn] == [
        "ground truth: 1 object", "teacher: 1 of 1", "ACAM-KD: no detections",
    ]  # fmt: skip
    image = decoded(drawn[1].uri)[..., ::-1].astype(int)
    edge, elsewhere = image[100, round(30 * 360 / 64)], image[round(50 * 360 / 64), round(40 * 360 / 64)]
    assert np.abs(edge - report.HIT).max() < 40 and elsewhere.max() < 20


def test_masks_of_one_level_at_all_moments_in_the_order_of_steps(content):
    snapshots = [s for s in content["snapshots"] if s.image == 0]
    levels = report._masks(content["examples"][0], snapshots[::-1])
    assert [level for level, _ in levels] == ["p3", "p4", "p5", "p6"]
    assert levels == report._masks(content["examples"][0], snapshots)
    one = report._masks(content["examples"][0], snapshots[:1])
    assert levels[0][1][0].height > 2 * one[0][1][0].height and levels[0][1][0].width == one[0][1][0].width


@pytest.mark.slow
def test_the_file_appears_whole_or_not_at_all(content, tmp_path, monkeypatch):
    path = tmp_path / "new" / "index.html"
    write_report(path, **content)
    before = path.read_bytes()
    assert os.listdir(path.parent) == ["index.html"]

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, **{**content, "title": "other"})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["index.html"]


def test_the_same_content_gives_the_same_file(content, tmp_path):
    for name in ("a", "b"):
        write_report(tmp_path / name, **content)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_wrong_content(content, tmp_path):
    with pytest.raises(ValueError, match="two rows share a name"):
        write_report(tmp_path / "x", **{**content, "rows": [Row("a"), Row("a")]})
    with pytest.raises(ValueError, match="a snapshot is of image 1, but there are 1 examples"):
        write_report(tmp_path / "x", **{**content, "examples": content["examples"][:1]})
    assert not (tmp_path / "x").exists()


def test_curves_take_what_is_finite_in_the_order_of_steps():
    history = [{"step": 9, "loss": 1.0}, {"step": 3, "loss": 2.0, "AP": 1.0}, {"step": 6, "loss": math.nan}]
    steps, values = series(Row("a", history=history), "loss")
    assert steps.tolist() == [3, 9] and values.tolist() == [2, 1]


def test_total_and_shared_losses_come_first(rows):
    names = ["loss", "loss_cls", "loss_box_reg", "loss_acam_spatial", "loss_acam_diversity"]
    assert loss_names(rows[::-1]) == names


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (math.nan, "-"),
        (0.4, "0 s"),
        (59.7, "1 min 00 s"),
        (754, "12 min 34 s"),
        (3600, "1 h 00 min"),
        (7325, "2 h 02 min"),
    ],
)
def test_durations(seconds, text):
    assert report._duration(seconds) == text
