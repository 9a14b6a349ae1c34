"""A cache folder of each test's own, drawn images, and errors that are one line."""

from __future__ import annotations

import json
import logging
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.tv.data import CocoImages
from acam_kd.tv.names import option


@pytest.fixture(autouse=True, name="cache")
def own_cache(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, logger="acam_kd")
    return tmp_path / "cache"


def draw(path, width=40, height=20, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((height, width, 3), 90, np.uint8)).save(path, **options)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def content(split):
    """Read a converted json, which the checks of COCO data must accept."""
    CocoImages(split, name="mine")
    return json.loads(Path(split.json_file).read_text())


def objects(split):
    """File name -> [(class name, x, y, width, height)]."""
    read = json.loads(Path(split.json_file).read_text())
    names = {category["id"]: category["name"] for category in read["categories"]}
    found = {image["id"]: (image["file_name"], []) for image in read["images"]}
    for entry in read["annotations"]:
        found[entry["image_id"]][1].append((names[entry["category_id"]], *entry["bbox"]))
    return dict(found.values())


@contextmanager
def refused(value, allowed="", hint="", argument="dataset"):
    """Expect one line of an argument that the command knows, with these parts."""
    with pytest.raises(ConfigError) as error:
        yield
    found = error.value
    line = found.render(option)
    assert found.argument == argument and "\n" not in line, line
    for part, text in ((value, found.value), (allowed, found.allowed), (hint, found.hint)):
        assert str(part) in str(text), line
