"""``acam-kd check``, and how a run of the command meets data that cannot be used."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd import cli
from acam_kd.data.coco import find_split
from acam_kd.tv.data import CocoImages
from acam_kd.tv.folder import RunFolder

from .conftest import STUDENT


@pytest.fixture
def own(data, tmp_path):
    """Copy the drawn shapes, so that a test can break them."""
    shutil.copytree(data, tmp_path / "own")
    return tmp_path / "own"


def change(own, split, make):
    path = own / f"{split}.json"
    content = json.loads(path.read_text())
    make(content)
    path.write_text(json.dumps(content))


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        cli.main([str(x) for x in arguments])
    message = str(error.value.code)
    assert message.startswith("acam-kd: ") and "\n" not in message
    return message


def test_a_good_dataset_is_two_lines(own, capsys):
    for arguments in (["check", own], ["check", "--data", own], ["check", own, "--masks", "--engine", "detectron2"]):
        cli.main([str(x) for x in arguments])
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0] for line in lines] == ["train", "val"]
        assert "6 images" in lines[0] and lines[0].endswith("6 categories: nothing to mend")


def test_the_mended_json_is_written(own, tmp_path, capsys):
    for split in ("train", "val"):
        change(own, split, lambda content: [a.pop("iscrowd") for a in content["annotations"]])
    cli.main(["check", str(own), "--fix", str(tmp_path / "good.json")])
    assert "mended, see above" in capsys.readouterr().out
    for split in ("train", "val"):
        content = json.loads((tmp_path / f"good_{split}.json").read_text())
        assert {a["iscrowd"] for a in content["annotations"]} == {0}
    cli.main(["check", "--val", str(own / "val.json"), str(own / "val"), "--fix", str(tmp_path / "one.json")])
    assert (tmp_path / "one.json").read_text() == (tmp_path / "good_val.json").read_text()
    assert "nothing to mend" not in capsys.readouterr().out
    message = refused("check", own, "--fix", tmp_path / "gone/good.json")
    assert "good_train.json: cannot be written" in message and message.endswith("; choose another --fix")


def test_numbers_that_are_none_are_written_as_null(own, tmp_path):
    """NaN is not json, whatever Python says."""
    change(own, "val", lambda content: content["annotations"][0].update(area=float("nan"), score=float("nan")))
    cli.main(["check", "--val", str(own / "val.json"), str(own / "val"), "--fix", str(tmp_path / "one.json")])
    text = (tmp_path / "one.json").read_text()
    assert "NaN" not in text and json.loads(text)["annotations"][0]["score"] is None


def test_both_splits_are_checked_before_an_error(own, capsys):
    for split in ("train", "val"):
        change(own, split, lambda content: content["annotations"][0].update(bbox=[0, 0, -1, 1]))
    message = refused("check", own, "--fix", own / "good.json")
    assert "found train: " in message and "the other split has troubles too" in message
    assert "val.json: annotations[0] (id 1) with bbox" in capsys.readouterr().err
    assert not list(own.glob("good*"))


def test_what_is_missing_is_said(own, tmp_path, capsys):
    (own / "val.json").unlink()
    cli.main(["check", str(own)])
    said = capsys.readouterr()
    assert said.out.startswith("train: ") and "no val split in " in said.err
    assert "no train split in " in refused("check", tmp_path)
    assert refused("check").startswith("acam-kd: --data: found nothing")


def test_labels_are_checked_too(data, tmp_path, capsys):
    shutil.copytree(data / "train", tmp_path / "train/images")
    shutil.copytree(data / "train_labels", tmp_path / "train/labels")
    names = "background,disc,barred disc,triangle,barred triangle,square,barred square"
    cli.main(["check", str(tmp_path), "--classes", names])
    assert capsys.readouterr().out.startswith("train: 6 images with labels: background ")
    assert "--fix: found " in refused("check", tmp_path, "--classes", names, "--fix", tmp_path / "a.json")
    for path in (tmp_path / "train/labels").iterdir():
        Image.fromarray(np.where(np.asarray(Image.open(path)) > 0, 255, 0).astype(np.uint8)).save(path)
    message = refused("check", tmp_path, "--classes", names)
    assert "which is ignored" in message and message.endswith("write 1 instead, and name two classes in --classes")


@pytest.mark.parametrize(
    "segmentation", [[[float("nan"), 10, 60, 10, 60, 60]], [[10, 10]], {"size": [9, 9], "counts": []}]
)
def test_a_run_ends_with_a_line_before_anything_is_built(own, tmp_path, segmentation, monkeypatch):
    monkeypatch.setattr("acam_kd.tv.training.build_models", lambda *_, **__: pytest.fail("built"))
    change(own, "val", lambda content: content["annotations"][3].update(segmentation=segmentation))
    arguments = ["train", "--data", own, "--student", "lraspp_mobilenet_v3_large", "--output", tmp_path / "run"]
    message = refused(*arguments, "--iterations", 1)
    assert "val.json: annotations[3] (id 4) with segmentation " in message and not (tmp_path / "run").exists()


def test_a_run_tells_the_troubles_of_both_splits(own, tmp_path, capsys):
    for split in ("train", "val"):
        change(own, split, lambda content: content["annotations"][3].update(bbox=[1, 2]))
    arguments = ["train", "--data", own, "--student", STUDENT, "--output", tmp_path / "run"]
    message = refused(*arguments, "--iterations", 1)
    assert "train.json: annotations[3] (id 4) with a bbox of 2 numbers" in message
    assert message.endswith("the validation data has troubles too: see above")
    assert "val.json: annotations[3] (id 4) with a bbox of 2 numbers" in capsys.readouterr().err


def test_sixteen_bits_are_trained_as_the_option_says(own, tmp_path):
    for path in own.glob("*/*.png"):
        if "labels" not in path.parent.name:
            grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
            Image.fromarray(grey * 257).save(path)
    split = find_split(own, "train")
    image, _ = CocoImages(split)[0]
    assert len(image.unique()) > 50 and torch.equal(image[0], image[2])
    arguments = ["train", "--data", own, "--student", STUDENT, "--size", 64, "--iterations", 1, "--batch-size", 2]
    arguments += ["--workers", 0, "--accelerator", "cpu", "--output", tmp_path / "run"]
    assert "of 16 bits with values from" in refused(*arguments, "--image-range", "8bit")
    cli.main([str(x) for x in [*arguments, "--image-range", "16bit"]])
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["train_split"]["image_range"] == settings["val_split"]["image_range"] == "16bit"
    cli.main(["eval", "--data", str(own), "--student", str(tmp_path / "run"), "--workers", "0"])


def test_a_run_that_is_older_than_the_option_is_resumed(settings, tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.start(settings, {})
    path = tmp_path / "run/settings.json"
    content = json.loads(path.read_text())
    for split in ("train_split", "val_split"):
        assert content[split].pop("image_range") == "auto"
    path.write_text(json.dumps(content))
    folder.check(settings, resume=True)
