"""COCO jsons of other people: the meaning is clear, and it is mended; or it is in doubt, and everything is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from acam_kd.core.errors import ConfigError
from acam_kd.data.check.values import identity, number, whole


def refused(drawn, **options):
    with pytest.raises(ConfigError) as error:
        drawn.check(**options)
    assert error.value.argument == "dataset" and "\n" not in str(error.value)
    assert error.value.value.startswith("mine: ")
    return str(error.value)


def test_a_good_dataset_is_left_as_it_is(drawn):
    before = json.loads(json.dumps(drawn.content))
    assert drawn.check() == ({}, before) and drawn.said == []


# What is not in doubt is mended, counted and said once.


def without(*keys):
    def change(drawn):
        for item in drawn.content["annotations"]:
            for key in keys:
                del item[key]

    return change


def texts(drawn):
    drawn.each("annotations", image_id=lambda a: str(a["image_id"]), bbox=lambda a: [40, 30, "60.0000", "50.0000"])
    drawn.each("images", width=lambda i: "160", height=lambda i: 120.0)


def ids(make):
    def change(drawn):
        drawn.each("categories", id=lambda c: make(c["id"]))
        drawn.each("annotations", category_id=lambda a: make(a["category_id"]))

    return change


def doubled(part):
    return lambda drawn: drawn.content[part].append(dict(drawn.content[part][0]))


@pytest.mark.parametrize(
    ("change", "mended"),
    [
        (without("iscrowd"), {"annotations without iscrowd": 4}),
        (without("area"), {"annotations without area": 4}),
        (without("id"), {"annotations numbered anew": 4}),
        (without("bbox"), {"annotations without bbox": 4}),
        (texts, {"annotations with image_id": 4, "annotations with a bbox": 4, "images with width": 4, "images with he": 4}),
        (ids(str), {"categories with an id": 1, "annotations with category_id": 4}),
        (ids(float), {"categories with an id": 1, "annotations with category_id": 4}),
        (lambda d: d.each("images", id=lambda i: f"{i['id']}"), {"images with an id": 4}),
        (lambda d: d.each("annotations", image_id=lambda a: f"{a['image_id']}"), {"annotations with image_id": 4}),
        (lambda d: d.each("annotations", id=lambda a: 7), {"annotations numbered anew": 4}),
        (lambda d: d.each("annotations", id=lambda a: a["id"] - 1), {"annotations numbered anew": 4}),
        (lambda d: d.each("annotations", id=lambda a: f"a{a['id']}"), {"annotations numbered anew": 4}),
        (lambda d: d.each("annotations", iscrowd=lambda a: False), {"annotations with iscrowd": 4}),
        (lambda d: d.each("annotations", iscrowd=lambda a: "0"), {"annotations with iscrowd": 4}),
        (lambda d: d.each("annotations", area=lambda a: "3000"), {"annotations with an area": 4}),
        (lambda d: d.each("annotations", area=lambda a: None), {"annotations without area": 4}),
        (lambda d: d.each("annotations", area=lambda a: float("nan")), {"annotations without area": 4}),
        (lambda d: d.each("categories", name=lambda c: 5), {"categories whose name": 1}),
        (doubled("categories"), {"categories that are there twice": 1}),
        (doubled("images"), {"images that are there twice": 1}),
        (lambda d: d.annotation.update(bbox=[110, 30, 50.5, 50]), {"boxes that reach beyond": 1}),
        (lambda d: d.annotation.update(bbox=[-0.4, -1, 50.5, 50]), {"boxes that reach beyond": 1}),
        (lambda d: d.annotation.update(bbox=[160, 30, 5, 5]), {"annotations whose box only touches": 1}),
        (lambda d: [i.pop("width") for i in d.content["images"]], {"images without width": 4}),
        (lambda d: d.content["images"][0].update(id="first") or d.annotation.update(image_id="first"),
         {"images with an id that is no text": 3, "annotations with image_id": 3}),
    ],
)  # fmt: skip
def test_the_meaning_is_clear(drawn, change, mended):
    change(drawn)
    found, content = drawn.check()
    assert {next(key for key in mended if what.startswith(key)): n for what, n in found.items()} == mended
    assert len(drawn.said) == len(mended) and all(f": mended {n} " in "".join(drawn.said) for n in mended.values())
    drawn.content = content
    assert drawn.check() == ({}, content), "what was mended is good"
    for image in content["images"]:
        assert (image["width"], image["height"]) == (160, 120) and type(image["width"]) is int
    for annotation in content["annotations"]:
        assert annotation["iscrowd"] == 0 and annotation["category_id"] == 1 and type(annotation["category_id"]) is int
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and x + w <= 160 and y >= 0 and y + h <= 120


def test_areas_are_those_of_masks_else_of_boxes(drawn):
    drawn.each("annotations", bbox=lambda a: [40, 30, 60, 50])
    without("area")(drawn)
    drawn.annotation["segmentation"] = [[40, 30, 100, 30, 100, 80]]
    del drawn.content["annotations"][1]["segmentation"]
    _, content = drawn.check(masks=None)
    areas = [annotation["area"] for annotation in content["annotations"]]
    assert areas[1:] == [3000, 3000, 3000] and 1400 < areas[0] < 1600


def test_training_alone_needs_no_areas_and_takes_ids_from_0(drawn):
    without("area")(drawn)
    drawn.each("annotations", id=lambda a: a["id"] - 1)
    mended, content = drawn.check(areas=False, ids=False)
    assert not mended and "area" not in content["annotations"][0]


def test_names_of_files_with_backslashes(drawn):
    (drawn.root / "images/sub").mkdir()
    drawn.image(1).rename(drawn.root / "images/sub/1.png")
    drawn.content["images"][0]["file_name"] = "sub\\1.png"
    mended, content = drawn.check()
    assert content["images"][0]["file_name"] == "sub/1.png" and list(mended.values()) == [1]


# Encodings.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_trouble(drawn, encoding):
    drawn.content["categories"][0]["name"] = "Käse"
    mended, content = drawn.check(json.dumps(drawn.content, ensure_ascii=False).encode(encoding))
    assert content["categories"][0]["name"] == "Käse" and len(mended) == 1


def test_the_locale_does_not_matter(drawn):
    drawn.content["categories"][0]["name"] = "Käse"
    path = drawn.save(json.dumps(drawn.content, ensure_ascii=False).encode())
    code = (
        "import sys; from acam_kd.data.check import check_coco\n"
        f"c = check_coco({path!r}, {str(drawn.root / 'images')!r}, name='mine')\n"
        "print(ascii(c.content['categories'][0]['name']), len(c.mended))"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "'K\\xe4se' 1", done.stderr  # Detectron2 would open the file with the locale's


def test_other_encodings_are_said(drawn):
    data = json.dumps(drawn.content).replace("thing", "K\u00e4se").encode("latin-1")
    with pytest.raises(ConfigError) as error:
        drawn.check(data)
    assert "is not json" in str(error.value) and error.value.hint == "save it as UTF-8"
    with pytest.raises(ConfigError) as error:
        drawn.check(b"[" * 100_000)
    assert "is not json" in str(error.value)


# What is in doubt is refused.


@pytest.mark.parametrize(
    ("part", "changes", "text"),
    [
        ("annotations", {"category_id": "1,0"}, "annotations[0] (id 1) with category_id '1,0'"),
        ("annotations", {"category_id": True}, "with category_id True"),
        ("annotations", {"category_id": 1.5}, "with category_id 1.5"),
        ("annotations", {"image_id": "0"}, "with image_id '0'"),
        ("annotations", {"iscrowd": 2}, "with iscrowd 2"),
        ("annotations", {"ignore": 1}, "with ignore 1"),
        ("annotations", {"area": -1}, "with area -1"),
        ("annotations", {"area": 1e9}, "with area 1000000000.0"),
        ("annotations", {"bbox": [40, 30, "60,5", 50]}, "with bbox [40, 30, '60,5', 50]"),
        ("annotations", {"bbox": [40, 30, float("inf"), 50]}, "with bbox [40, 30, inf, 50]"),
        ("annotations", {"bbox": {"x": 1}}, "with bbox {'x': 1}"),
        ("annotations", {"bbox": [162, 30, 5, 5]}, "which lies outside its image, expected a box in 160 x 120 pixels"),
        ("images", {"width": -1}, "images[0] (id 1) with width -1"),
        ("images", {"width": 160.5}, "with width 160.5"),
        ("images", {"file_name": 7}, "with file_name 7"),
        ("images", {"file_name": "a\0b"}, "without its file "),
        ("images", {"file_name": "gone.png"}, "without its file "),
        ("images", {"width": 120, "height": 160}, "with 160 x 120 pixels, expected 120 x 160, as the json says"),
        ("images", {"id": None}, "images[0] (id None) with id None"),
        ("categories", {"id": "thing"}, "categories[0] with id 'thing'"),
        ("categories", {"name": ""}, "categories[0] with name ''"),
    ],
)  # fmt: skip
def test_the_meaning_is_in_doubt(drawn, part, changes, text):
    drawn.content[part][0].update(changes)
    refused(drawn)
    assert text.split(", expected")[0].replace("images[0] (id None) ", "") in "".join(drawn.said) + refused(drawn)


def test_two_with_one_id_that_differ(drawn):
    drawn.content["categories"].append({"id": 1, "name": "other"})
    assert "categories[1] with id 1, as another one, expected an id for each" in refused(drawn)


def test_boxes_of_another_form_are_seen_in_all_of_them(drawn):
    """Two corners, or parts of the image's size: a model would learn nothing, and nothing would say so."""
    many = [{**drawn.annotation, "id": number, "bbox": [40, 30, 150, 110]} for number in range(1, 13)]
    drawn.content["annotations"] = many
    assert "they look like [x0, y0, x1, y1]" in refused(drawn)
    for annotation in many:
        annotation.update(bbox=[0.25, 0.25, 0.375, 0.4], area=0.15)
    assert "they look like parts of the image's size" in refused(drawn)
    for annotation in many[:6]:
        annotation["bbox"] = [40, 30, 60, 50]
    drawn.check()


# All troubles at once.


def test_all_troubles_are_told_at_once(drawn):
    drawn.content["annotations"] = [{**drawn.annotation, "id": n, "bbox": [n, 0, -1, 5]} for n in range(1, 16)]
    drawn.content["annotations"][3].update(image_id=99)
    drawn.image(2).unlink()
    line = refused(drawn)
    assert line.startswith(f"dataset: found mine: {drawn.root}/d.json: 16 troubles: images[1] (id 2) without its file ")
    assert "annotations[0] (id 1) with bbox [1, 0, -1, 5], which has a negative size (the first of 14)" in line
    assert "annotations[3] (id 4) with image_id 99" in line and "all of them are in " in line
    said = "\n".join(drawn.said)
    assert "bbox: 14" in said and "and 4 others" in said and said.count("negative size") == 10
    full = Path(line.split("all of them are in ")[1]).read_text()
    assert full.count("negative size") == 14 and "with image_id 99" in full


def test_what_is_shown_of_a_value_has_an_end(drawn):
    drawn.annotation["bbox"] = list(range(1_000_000))
    drawn.content["annotations"][1]["segmentation"] = [["x" * 1_000_000]]
    assert len(refused(drawn)) < 2000 and max(map(len, drawn.said)) < 1000


# The parts.


def test_numbers_however_they_are_written():
    assert [number(x) for x in (" 7.5", "1e2", 3, -0.5)] == [7.5, 100.0, 3, -0.5]
    for odd in ("", "7,5", "1_000", "nan", "inf", "٣", "0x1", None, [], True, float("inf"), 10**400, "1" * 400):
        assert number(odd) is None, odd
    assert [whole(x) for x in ("9007199254740993", 2.0, "-3")] == [9007199254740993, 2, -3]
    assert whole(1e300) is None and whole("1.5") is None
    assert [identity(x) for x in ("007", "a7", 7.0, "", None, False)] == [7, "a7", 7, None, None, None]


def test_an_image_may_have_no_annotations_and_boxes_may_be_empty(drawn):
    drawn.annotation["bbox"] = [20, 20, 0, 5]
    del drawn.content["annotations"][2]
    mended, content = drawn.check()
    assert not mended and np.shape(content["annotations"]) == (3,)
