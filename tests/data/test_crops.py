"""Crops of boxes: their pixels, folders and faults."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from acam_kd import cli
from acam_kd.data.coco import CocoSplit
from acam_kd.data.crops import MEAN_COLOUR, make_crops, square
from tests.tv.conftest import refuses


def test_a_square_has_the_longer_side_and_the_box_in_its_middle():
    image = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    assert np.array_equal(square(image, (2, 3, 4, 2), 0.0), image[2:6, 2:6])
    assert square(image, (2, 3, 4, 2), 0.5).shape == (6, 6, 3)


def test_beyond_the_image_is_the_mean_colour():
    found = square(np.zeros((10, 10, 3), np.uint8), (0, 0, 2, 4), 0.0)
    assert found.shape == (4, 4, 3) and (found[:, 0] == MEAN_COLOUR).all() and (found[:, 1:] == 0).all()


@pytest.fixture
def split(tmp_path):
    """Two images with a box of each of two classes, a small one and a crowd."""
    draw = np.random.default_rng(0)
    for number in (1, 2):
        Image.fromarray(draw.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    images = [{"id": n, "file_name": f"{n}.png", "width": 50, "height": 40} for n in (1, 2)]
    boxes = [(1, 1, [5, 5, 20, 10], 0), (1, 2, [30, 10, 10, 20], 0), (2, 2, [1, 1, 5, 5], 0), (2, 1, [5, 5, 9, 9], 1)]
    annotations = [
        {"id": k, "image_id": i, "category_id": c, "bbox": b, "iscrowd": crowd, "area": b[2] * b[3]}
        | ({"segmentation": {"counts": [2000], "size": [40, 50]}} if crowd else {})
        for k, (i, c, b, crowd) in enumerate(boxes, 1)
    ]
    categories = [{"id": 1, "name": "a/b"}, {"id": 2, "name": "cat"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "all.json").write_text(json.dumps(content))
    return CocoSplit(str(tmp_path / "all.json"), str(tmp_path))


def test_a_folder_for_each_class(split, tmp_path):
    counts = make_crops({"train": split, "val": split}, tmp_path / "crops", margin=0.0)
    assert counts["train"] == {"a_b": 1, "cat": 1}
    files = sorted(str(path.relative_to(tmp_path / "crops")) for path in (tmp_path / "crops").rglob("*.png"))
    assert files == ["train/a_b/1_1.png", "train/cat/1_2.png", "val/a_b/1_1.png", "val/cat/1_2.png"]
    whole, cut = (np.asarray(Image.open(path)) for path in (tmp_path / "1.png", tmp_path / "crops" / files[0]))
    assert np.array_equal(cut[5:15], whole[5:15, 5:25])


def test_a_class_without_a_box_in_a_part(split, tmp_path):
    with refuses("data", "a_b in val"):
        content = json.loads((tmp_path / "all.json").read_text())
        content["annotations"] = content["annotations"][1:2]
        (tmp_path / "val.json").write_text(json.dumps(content))
        make_crops({"train": split, "val": CocoSplit(str(tmp_path / "val.json"), str(tmp_path))}, tmp_path / "crops")
    assert not (tmp_path / "crops").exists()


def test_the_command(split, tmp_path, capsys):
    files = [split.json_file, split.image_root]
    cli.main(["crops", "--train", *files, "--val", *files, "--output", str(tmp_path / "crops")])
    assert "train: 2 images: a_b 1, cat 1" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--output"):
        cli.main(["crops", "--train", *files, "--val", *files, "--output", str(tmp_path / "crops")])
