"""Outlines and run lengths: nothing reaches pycocotools' C code that makes it fail, or take the machine's memory."""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from acam_kd.core.errors import ConfigError
from acam_kd.data.check.segmentation import Wrong, check_segmentation, mask_area, mask_box

SIZE = (160, 120)
GOOD = [40, 30, 100, 30, 100, 80, 40, 80]
RUNS = {"size": [120, 160], "counts": [0, 50, 19150]}


def compressed(counts=None, **changes):
    mask = np.zeros((120, 160), np.uint8)
    mask[30:80, 40:100] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [120, 160], "counts": counts or encoded["counts"].decode(), **changes}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([[float("nan"), 10, 60, 10, 60, 60]], "not finite"),
        ([[10, 10, 60, 10, 60, float("inf")]], "not finite"),
        ([[10, 10, 60, 10, 60, 10**400]], "not finite"),
        ([[0, 0, 2e8, 3e8, 200, 200]], "far outside of its image"),
        ([GOOD, [0, -1000, 10, 10, 0, 20]], "far outside of its image"),
        ([[200, 10, 220, 10, 220, 30]], "with a polygon outside of its image"),
        ([[10, 10]], "without a polygon of three points"),
        ([[10, 10, 60, 60]], "without a polygon of three points"),
        ([[], []], "without a polygon of three points"),
        ([[10, 10, 60, 10, 60, 60, 7]], "with a polygon of 7 numbers"),
        ([[10, 10, 60, 10, 60, None]], "other things than numbers"),
        ([[10, 10, 60, 10, 60, True]], "other things than numbers"),
        ([[[10, 10], [60, 10], [60, 60]]], "other things than numbers"),
        ([[10, 10], [60, 10], [60, 60]], "without a polygon of three points"),
        ([GOOD, "text"], "no list of polygons"),
        ([GOOD, {"size": [1, 1]}], "no list of polygons"),
        ("a text", "neither polygons nor run lengths"),
        (7, "neither polygons nor run lengths"),
        ([[0, 0, 160, 0, 160, 120] * 10_000], "with an outline of "),
        ({**RUNS, "size": [160, 120]}, "with a size of [160, 120]"),
        ({**RUNS, "size": None}, "with a size of None"),
        ({"counts": RUNS["counts"]}, "with a size of None"),
        ({"size": [120, 160]}, "without counts"),
        ({**RUNS, "counts": [0, 50]}, "with runs of 50 pixels"),
        ({**RUNS, "counts": [0, -50, 19250]}, "with a negative run"),
        ({**RUNS, "counts": [0, 50, "many"]}, "other things than whole numbers"),
        ({**RUNS, "counts": []}, "with runs of 0 pixels"),
        (compressed(size=[160, 120]), "with a size of [160, 120]"),
        (compressed("`"), "no run lengths"),  # a number whose end is missing: C would read on behind the text
        (compressed("\x7f\x7f"), "no run lengths"),
        (compressed("käse"), "no run lengths"),
        (compressed("o" * 50 + "0"), "no run lengths"),
        (compressed("0" * 10), "with runs of 0 pixels"),
    ],
)
def test_what_cannot_be_used(value, found):
    with pytest.raises(Wrong) as error:
        check_segmentation(value, SIZE)
    assert found in error.value.found and error.value.allowed


@pytest.mark.parametrize(
    ("value", "kept", "mended"),
    [
        ([GOOD], [GOOD], False),
        ([[x + 0.5 for x in GOOD]], [[x + 0.5 for x in GOOD]], False),
        ([[-3, 30, 170, 30, 170, 80]], [[-3, 30, 170, 30, 170, 80]], False),  # a little beyond: it is cut off there
        (GOOD, [GOOD], True),
        ([[str(x) for x in GOOD]], [GOOD], True),
        ([GOOD, [10, 10, 60, 60]], [GOOD], True),
        ([GOOD, []], [GOOD], True),
        (RUNS, RUNS, False),
        ({**RUNS, "counts": [0.0, 50.0, "19150"]}, RUNS, True),
        ({**RUNS, "size": ["120", 160.0]}, RUNS, True),
        (compressed(), compressed(), False),
    ],
)
def test_what_can_be_used(value, kept, mended):
    found, what = check_segmentation(value, SIZE)
    assert found == kept and bool(what) is mended
    assert mask_area(found, SIZE) > 0 and len(mask_box(found, SIZE)) == 4


def test_the_compressed_form_is_read_as_pycocotools_reads_it():
    draw = np.random.default_rng(0)
    for _ in range(200):
        height, width = draw.integers(1, 60, 2).tolist()
        mask = np.repeat(draw.random((height, width)) < draw.random(), draw.integers(1, 9), axis=0).astype(np.uint8)
        encoded = coco_mask.encode(np.asfortranarray(mask))
        value = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
        assert check_segmentation(value, (width, mask.shape[0]))[0] is value
        with pytest.raises(Wrong):  # any other size has another number of pixels
            check_segmentation({**value, "size": [mask.shape[0] + 1, width]}, (width, mask.shape[0] + 1))


def test_texts_that_are_nearly_run_lengths_never_reach_pycocotools():
    draw, good = np.random.default_rng(0), compressed()["counts"]
    for _ in range(300):
        place = int(draw.integers(len(good)))
        text = good[:place] + chr(int(draw.integers(48, 112))) + good[place + int(draw.integers(0, 3)) :]
        try:
            found, _ = check_segmentation(compressed(text), SIZE)
        except Wrong:
            continue
        assert coco_mask.decode(found).shape == (120, 160)


def limited(code: str) -> subprocess.CompletedProcess[str]:
    """Run code with 2 GiB of memory more than it needs to start, so that damage ends with this process."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, preexec_fn=limit, timeout=300
    )


def zigzag():
    return [[0, 0, 160, 120] * 100_000]


@pytest.mark.slow
@pytest.mark.parametrize(
    "value",
    [
        [[float("nan"), 10, 60, 10, 60, 60]],
        [[0, 0, 2e8, 3e8, 200, 200]],
        zigzag(),
        {"size": [2_000_000_000, 2_000_000_000], "counts": [0, 50, 3_999_999_999_999_999_950]},
    ],
    ids=["nan", "far", "zigzag", "huge runs"],
)
def test_the_machine_is_left_alone(drawn, value):
    """Memory is limited, in a process of its own: these made it be killed, or take all that there is."""
    drawn.annotation["segmentation"] = value
    code = (
        "from acam_kd.core.errors import ConfigError\nfrom acam_kd.data.check import Needs, check_coco\n"
        f"try: check_coco({drawn.save()!r}, {str(drawn.root / 'images')!r}, name='mine', needs=Needs(masks=True))\n"
        "except ConfigError as error: print(error.value)"
    )
    done = limited(code)
    assert done.returncode == 0, done.stderr[-500:]
    assert "annotations[0] (id 1) with segmentation " in done.stdout


def test_an_annotation_is_named_and_all_of_them_are(drawn):
    for annotation, value in zip(drawn.content["annotations"], ([[10, 10]], [[]], "text", {"size": [160, 120]})):
        annotation["segmentation"] = value
    with pytest.raises(ConfigError) as error:
        drawn.check()
    assert "annotations[0] (id 1) with segmentation [[10, 10]], without a polygon of three points" in str(error.value)
    assert "(the first of 4)" in str(error.value)
    said = "\n".join(drawn.said)
    for place in ("annotations[1] (id 2) without 'segmentation'", "annotations[2] (id 3)", "annotations[3] (id 4)"):
        assert place in said


def test_where_no_masks_are_read_the_box_is_kept(drawn):
    drawn.annotation["segmentation"] = [[10, 10]]
    drawn.content["annotations"][1]["segmentation"] = []
    mended, content = drawn.check(masks=False)
    assert list(mended.values()) == [1] and "segmentation" not in content["annotations"][0]
    assert len(content["annotations"]) == 4
    drawn.content = json.loads(drawn.root.joinpath("d.json").read_text())
    with pytest.raises(ConfigError):
        drawn.check(masks=None)  # nobody has said what it is for
