"""The digits of scikit-learn: their parts and their files."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from acam_kd.data.folders import find_classes, list_images
from benchmarks import digits


def test_each_class_is_divided_alike():
    labels = np.repeat([0, 1], [60, 12])
    parts = digits.divide(labels)
    assert np.bincount(parts[labels == 0]).tolist() == [30, 10, 20]
    assert np.bincount(parts[labels == 1]).tolist() == [6, 2, 4]
    assert np.array_equal(parts, digits.divide(labels))


def test_the_folders(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["digits", "--output", str(tmp_path / "digits")])
    digits.main()
    assert "901 and 300 images" in capsys.readouterr().out
    found = {}
    for folder in ("digits", "digits_test"):
        for part in ("train", "val"):
            found[folder, part] = list_images(find_classes(tmp_path / folder, part))
    names = {key: {path.rpartition("/")[2] for path in each.files} for key, each in found.items()}
    assert names["digits", "train"] == names["digits_test", "train"] and len(names["digits_test", "val"]) == 596
    assert (
        not names["digits", "val"] & names["digits_test", "val"]
        and not names["digits", "train"] & names["digits", "val"]
    )
    with Image.open(found["digits", "val"].files[0]) as image:
        assert image.size == (8, 8) and image.mode == "L" and image.getextrema()[1] == 255
