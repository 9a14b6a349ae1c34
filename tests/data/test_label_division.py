"""Images with label PNGs and without a split, divided by links."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acam_kd.data.division import Division
from acam_kd.data.label_division import divide_labels
from acam_kd.data.labels import find_pairs, read_label
from acam_kd.data.splits import LabelSplit, find_whole

from .drawn import draw, refused, write


@pytest.fixture
def labelled(tmp_path):
    """Make three scenes of four images with label PNGs; class 2 is in one image of each scene, class 3 in one scene."""
    root = tmp_path / "set/train"
    for scene in range(3):
        for frame in range(4):
            name = f"scene{scene}/{frame}.png"
            draw(root / "images" / name)
            (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
            values = np.full((20, 40), 255 if frame else 2, np.uint8)
            values[:5] = 3 if scene == 0 else 1
            Image.fromarray(values).save(root / "labels" / name)
    return LabelSplit(str(root / "images"), str(root / "labels"), ("a", "b", "c", "d"))


def names(split):
    return [
        os.path.relpath(image, split.image_root)
        for image, _ in find_pairs(split.image_root, split.label_root, name="x")
    ]


def test_label_images_are_divided_by_links(labelled, tmp_path):
    assert find_whole(tmp_path / "set", "a,b,c,d") == labelled
    division = Division(0.3, group_by=r"^(scene\d)/")
    parts = divide_labels(labelled, division, tmp_path / "run")
    train, val = names(parts["train"]), names(parts["val"])
    assert sorted(train + val) == names(labelled) and len({Path(name).parts[0] for name in val}) == 1 and len(val) == 4
    assert "scene0" not in {Path(name).parts[0] for name in val}  # a class does not lose its last group to train on
    for image, label in find_pairs(parts["val"].image_root, parts["val"].label_root, name="x"):
        scene = Path(image).parts[-2]
        assert Path(image).resolve() == Path(labelled.image_root, scene, Path(image).name).resolve()
        assert set(np.unique(read_label(label))) == {1, 2 if Path(label).stem == "0" else 255}
    assert divide_labels(labelled, division, tmp_path / "run") == parts  # a resumed run
    with refused("0.5", "0.3, as in", argument="val_fraction"):
        divide_labels(labelled, Division(0.5, group_by=r"^(scene\d)/"), tmp_path / "run")
    Path(labelled.label_root, "scene1/0.png").write_bytes(b"changed")
    with refused("data that changed since its split was made", "the same data", argument="data"):
        divide_labels(labelled, division, tmp_path / "run")


def test_label_images_that_cannot_be_divided(labelled, tmp_path):
    with refused("1 group of images", "at least 2", argument="group_by"):
        divide_labels(labelled, Division(0.3, group_by="scene"), tmp_path / "run")
    with refused("1.5", "between 0 and 1", argument="val_fraction"):
        divide_labels(labelled, Division(1.5), tmp_path / "run")
    write(tmp_path / "file", "a file")
    with refused("which cannot be written", "a folder to write into", argument="output"):
        divide_labels(labelled, Division(0.3), tmp_path / "file")
