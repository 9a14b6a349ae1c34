"""The dataset that the project draws: COCO format, deterministic, never half there."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from acam_kd.data import shapes


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})


def test_it_is_coco(small, tmp_path):
    folder = shapes.make_shapes(tmp_path, size=96)
    for split, count in shapes.SPLITS.items():
        coco = COCO(str(folder / f"{split}.json"))
        assert len(coco.imgs) == count and {c["name"] for c in coco.cats.values()} == set(shapes.CLASSES)
        for image in coco.imgs.values():
            assert cv2.imread(str(folder / split / image["file_name"])).shape == (96, 96, 3)
        assert coco.anns
        for annotation in coco.anns.values():
            x, y, w, h = annotation["bbox"]
            assert 0 <= x < x + w <= 96 and 0 <= y < y + h <= 96 and w > 2 and h > 2
            inside = coco.annToMask(annotation)
            ys, xs = np.nonzero(inside)
            assert abs(xs.min() - x) <= 2 and abs(ys.max() - (y + h - 1)) <= 2  # rasterised at pixel borders


def test_the_seed_decides(small, tmp_path):
    first, again = (shapes.make_shapes(tmp_path / name, size=64, seed=5) for name in "ab")
    other = shapes.make_shapes(tmp_path / "c", size=64, seed=6)
    assert (first / "train.json").read_bytes() == (again / "train.json").read_bytes()
    assert (first / "val/00001.png").read_bytes() == (again / "val/00001.png").read_bytes()
    assert (first / "train.json").read_bytes() != (other / "train.json").read_bytes()


def test_splits_differ(small, tmp_path):
    folder = shapes.make_shapes(tmp_path, size=64)
    assert (folder / "train/00000.png").read_bytes() != (folder / "val/00000.png").read_bytes()


def test_what_is_there_is_left_alone(small, tmp_path):
    folder = shapes.make_shapes(tmp_path, size=64)
    (folder / "train.json").write_text("mine")
    assert shapes.make_shapes(tmp_path, size=64) == folder
    assert (folder / "train.json").read_text() == "mine"


def test_an_interrupted_run_leaves_nothing_under_the_final_name(small, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", fail)
        with pytest.raises(KeyboardInterrupt):
            shapes.make_shapes(tmp_path, size=64)
    assert not list(tmp_path.iterdir())
    assert (shapes.make_shapes(tmp_path, size=64) / "val.json").is_file()


def test_sizes_run_from_small_to_large():
    areas = []
    for index in range(60):
        _, drawn = shapes.draw(np.random.default_rng((0, index)), 160)
        areas += [cv2.contourArea(polygon) for _, polygon in drawn]
    sizes = [sum(low <= area < high for area in areas) for low, high in ((0, 32**2), (32**2, 96**2), (96**2, 1e9))]
    assert min(sizes) > len(areas) // 12  # COCO's small, medium and large all mean something


def test_label_images_show_what_is_drawn(small, tmp_path):
    folder = shapes.make_shapes(tmp_path, size=96)
    annotations = COCO(str(folder / "val.json")).imgToAnns
    for index in range(3):
        labels = cv2.imread(str(folder / f"val_labels/{index:05d}.png"), cv2.IMREAD_GRAYSCALE)
        assert labels.shape == (96, 96) and set(np.unique(labels)) - {0} == {
            a["category_id"] for a in annotations[index + 1]
        }


def test_nothing_lies_outside_the_image():
    for index in range(40):
        for _, polygon in shapes.draw(np.random.default_rng((1, index)), 160)[1]:
            assert len(polygon) >= 3 and polygon.min() >= 0 and polygon.max() < 160
