"""The commands of the pages for a first run are run in their order, on fewer images and for two steps."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from PIL import Image

from acam_kd.cli import main
from acam_kd.data import shapes

from .pages import ROOT, blocks, commands

pytestmark = pytest.mark.slow
SHORTER = {"--iterations": "2", "--pseudo-labels": "0.051"}
"""Option -> the value that it has here: a teacher of two steps has low scores."""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory, where drawn datasets are small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(shapes, "SPLITS", {"train": 44, "val": 4})
    return tmp_path


def commands_of(page, *, without):
    """Return the arguments of a page's ``acam-kd`` commands, without those that name data of the reader's."""
    found = [words[1:] for words in commands(ROOT / "docs" / page) if words[0] == "acam-kd"]
    return [words for words in found if not set(words) & set(without)]


def run(words):
    """Run a command with the shorter values."""
    before = [None, *words]
    main([SHORTER.get(option, word) for option, word in zip(before, words)])


def test_get_started_with_torchvision(place):
    random = np.random.default_rng(0)
    (place / "photos").mkdir()
    Image.fromarray(random.integers(0, 255, (80, 96, 3), dtype=np.uint8)).save(place / "photos/a.jpg")
    film = cv2.VideoWriter("film.mp4", cv2.VideoWriter_fourcc(*"mp4v"), 5, (96, 80))
    for _ in range(2):
        film.write(random.integers(0, 255, (80, 96, 3), dtype=np.uint8))
    film.release()
    found = commands_of("torchvision.md", without=["camvid"])
    assert [words[0] for words in found] == ["shapes", "train", "train", "eval", "doctor", "predict", "export", "eval"]
    for words in found:
        if words[0] == "doctor":  # which says that a teacher of two steps is broken
            with pytest.raises(SystemExit) as end:
                run(words)
            assert end.value.code == 1
        else:
            run(words)
    assert (place / "predictions/a.jpg").is_file() and (place / "predictions/film.mp4").is_file()
    assert (place / "student.onnx").is_file() and (place / "output/acam/README.txt").is_file()


def test_few_labels_many_pictures(place):
    found = commands_of("unlabelled.md", without=["mydata"])
    assert [words[0] for words in found] == ["shapes", *["train"] * 5]
    for words in found[:2]:
        run(words)
    exec(compile(blocks(ROOT / "docs/unlabelled.md", "python")[0].text, "few", "exec"), {})
    for words in found[2:]:
        run(words)
    assert (place / "output/pseudo/pseudo_labels/boxes.json").is_file()
    for name in ("alone", "few", "unlabelled", "pseudo"):
        assert (place / f"output/{name}/student.pth").is_file(), name


def test_segmentation_with_torchvision(place):
    run(["shapes", "--output", "datasets"])
    found = [words for words in commands_of("segmentation.md", without=[]) if words[0] == "train"]
    assert len(found) == 4
    for words in found:
        run(words)
    assert (place / "output/seg/acam/student.pth").is_file()
