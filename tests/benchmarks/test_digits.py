"""The digits of scikit-learn: their parts and their files."""

from __future__ import annotations

import sys
from pathlib import Path

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
    seen = {key: {Path(path).read_bytes() for path in each.files} for key, each in found.items()}
    assert seen["digits", "train"] == seen["digits_test", "train"] and len(found["digits_test", "val"].files) == 596
    parts = [seen["digits", "train"], seen["digits", "val"], seen["digits_test", "val"]]
    assert len(set.union(*parts)) == sum(map(len, parts))
    with Image.open(found["digits", "val"].files[0]) as image:
        assert image.size == (8, 8) and image.mode == "L" and image.getextrema()[1] > 200
