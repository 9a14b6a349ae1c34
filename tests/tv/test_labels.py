"""Images and label PNGs: their targets, crops, runs of the command, and errors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd import cli
from acam_kd.cli import train_settings
from acam_kd.data.coco import find_split
from acam_kd.data.splits import LabelSplit, find_any_split, named_split, read_classes
from acam_kd.tv.data import CocoImages
from acam_kd.tv.labels import LabelledImages, load_data

from .conftest import STUDENT

LRASPP = "lraspp_mobilenet_v3_large"
CLASSES = "background,disc,barred disc,triangle,barred triangle,square,barred square"


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    """Lay out the drawn shapes and their label images as a dataset of labels."""
    root = tmp_path_factory.mktemp("labelled")
    for split in ("train", "val"):
        shutil.copytree(data / split, root / split / "images")
        shutil.copytree(data / f"{split}_labels", root / split / "labels")
    return root


@pytest.fixture
def own(folder, tmp_path):
    """Copy the dataset, so that a test can break it."""
    shutil.copytree(folder, tmp_path / "own")
    return tmp_path / "own"


def train_arguments(output, *more):
    arguments = ["train", "--student", LRASPP, "--iterations", 2, "--batch-size", 2, "--workers", 0]
    return [str(x) for x in [*arguments, "--accelerator", "cpu", "--output", output, *more]]


def test_labels_are_the_numbers_in_the_files(folder, data):
    split = find_any_split(folder, "train", CLASSES)
    dataset = load_data(split, LRASPP, name="training data")
    assert isinstance(dataset, LabelledImages) and len(dataset) == 6 and dataset.semantic
    assert dataset.num_classes == 7 and dataset.categories[2] == "barred disc"
    coco = CocoImages(find_split(data, "train"), semantic=True)
    for index in range(3):
        image, target = dataset[index]
        drawn = np.array(Image.open(dataset.pairs[index][1]))
        assert torch.equal(target["semantic"], torch.from_numpy(drawn).long()) and target["image_id"] == index + 1
        assert torch.equal(image, coco[index][0]) and type(target["semantic"]) is torch.Tensor
        flipped = {
            bool(torch.equal(dataset[index, seed][1]["semantic"], target["semantic"].flip(1))) for seed in range(8)
        }
        assert flipped == {True, False}


@pytest.mark.parametrize("kind", ["labels", "coco"])
def test_crops_have_one_size_and_keep_image_and_labels_together(folder, data, kind):
    """The shapes have no grey in them, so padding is known by its colour."""
    split = find_any_split(folder, "train", CLASSES) if kind == "labels" else find_split(data, "train")
    dataset = load_data(split, LRASPP, name="training data", crop=(48, 80))
    mean = torch.tensor([124, 116, 104]).view(3, 1, 1) / 255
    padded = []
    for seed in range(12):
        image, target = dataset[0, seed]
        assert image.shape == (3, 48, 80) and target["semantic"].shape == (48, 80) and image.max() <= 1
        assert torch.equal(image, dataset[0, seed][0])
        outside = target["semantic"] == 255
        assert torch.isclose(image, mean, atol=1e-6).all(0)[outside].all()
        padded.append(float(outside.float().mean()))
        assert set(target["semantic"].unique().tolist()) <= {*range(7), 255}
    assert min(padded) == 0 and 0.4 < max(padded) < 0.95  # from twice the size to half of it
    assert dataset[0][0].shape == (3, 64, 64)  # evaluation sees the whole image


def test_a_crop_of_twice_the_size_shows_what_was_there(folder, monkeypatch):
    monkeypatch.setattr("acam_kd.tv.data.SCALES", (2.0, 2.0))
    dataset = load_data(find_any_split(folder, "train", CLASSES), LRASPP, name="x", crop=(128, 128))
    whole = dataset[1][1]["semantic"].repeat_interleave(2, 0).repeat_interleave(2, 1)
    found = dataset[1, 3][1]["semantic"]
    assert torch.equal(found, whole) or torch.equal(found, whole.flip(1))


@pytest.mark.parametrize("form", ["data", "splits", "classes.txt"])
def test_the_command_trains_and_evaluates(own, tmp_path, capsys, form):
    (own / "names").write_text(CLASSES.replace(",", "\n") + "\n")
    if form == "classes.txt":
        (own / "names").rename(own / "classes.txt")
        options = ["--data", own]
    elif form == "data":
        options = ["--data", own, "--classes", CLASSES]
    else:
        options = ["--classes", own / "names"]
        for split in ("train", "val"):
            options += [f"--{split}", own / split / "images", own / split / "labels"]
    cli.main(train_arguments(tmp_path / "run", *options, "--crop", 64, 64, "--schedule", "poly"))
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-2])
    card = json.loads((tmp_path / "run/student.json").read_text())
    assert card["num_classes"] == 7 and card["categories"]["0"] == "background"
    if form == "data":
        evaluation = ["eval", "--student", tmp_path / "run", "--workers", 0, *options]
        cli.main([str(x) for x in evaluation])
        assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == found
        cli.main(train_arguments(tmp_path / "more", *options, "--teacher", tmp_path / "run", "--size", 64))


def refused(*arguments):
    with pytest.raises(SystemExit) as error:
        cli.main([str(x) for x in arguments])
    message = str(error.value.code)
    assert message.startswith("acam-kd: ") and "\n" not in message
    return message


def test_bad_input_is_one_line(own, data, tmp_path):
    out = tmp_path / "out"

    def check(*more):
        return refused(*train_arguments(out, *more))

    message = check("--data", own)
    assert message.startswith("acam-kd: --classes: found no names for the numbers in the labels, expected names with ")
    assert message.endswith("; give --classes, or put classes.txt into the folder --data")
    assert "0 to 2 for the 3 classes" in (message := check("--data", own, "--classes", "a,b,c"))
    assert "found training data: label " in message and "or name its classes in --classes; all of" in message
    message = check("--data", own, "--classes", "a,a")
    assert message.startswith("acam-kd: --classes: found 2 ('a', 'a'), expected 1 to 255 different names")
    assert "acam-kd: --classes: found no file " in check("--data", own, "--classes", "gone.txt")
    message = check("--data", data, "--classes", "a,b")
    assert message.startswith("acam-kd: --classes: found a,b beside ") and "names its categories itself" in message
    message = check("--data", own, "--classes", CLASSES, "--student", STUDENT)
    assert message.startswith(f"acam-kd: --student: found {STUDENT} for training data with label PNGs in {own}/train")
    assert message.endswith("; detectors need data in COCO format")
    message = check("--data", data, "--crop", 32, 32, "--student", STUDENT)
    assert message.startswith(f"acam-kd: --crop: found 32 x 32 for {STUDENT}, expected whole images")
    message = check("--data", data, "--crop", 32, 32, "--size", 64)
    assert "--crop" in message and "--size" in message
    message = check("--data", tmp_path)
    assert message.startswith(f"acam-kd: --data: found no train split in {tmp_path}, expected one of train.json + ")
    assert ", or train/images + train/labels with label PNGs, or a data.yaml as YOLO's, or Annotations + " in message
    message = check("--data", own, "--classes", CLASSES, "--train", own / "train/images", own / "gone")
    assert f"found training data: no folder {own}/gone" in message
    next((own / "val/labels").iterdir()).unlink()
    message = check("--data", own, "--classes", CLASSES)
    assert "found validation data: 1 of 3 images without a label" in message
    assert not out.exists()


def test_the_default_method_of_a_segmentation_model(folder, data):
    for own, student, method in (
        (["--data", folder, "--classes", CLASSES], LRASPP, "CWD"),
        (["--data", data], LRASPP, "CWD"),  # its objects are painted
        (["--data", data], STUDENT, "ACAMKD"),
    ):
        options = [*map(str, own), "--student", student, "--teacher", "output/teacher", "--output", "run"]
        assert train_settings(options).method == method
        assert train_settings([*options, "--method", "none"]).method == ""


def test_splits_by_their_parts(folder, data):
    images, labels = str(folder / "val/images"), str(folder / "val/labels")
    assert named_split(images, labels, "a, b") == LabelSplit(images, labels, ("a", "b"))
    assert find_any_split(data, "val") == find_split(data, "val")
    assert read_classes("sky") == ("sky",)
