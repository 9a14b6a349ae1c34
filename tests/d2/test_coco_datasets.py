"""Datasets for Detectron2: mended ones are read by training and evaluation alike, misread ones are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from pycocotools.coco import COCO

from acam_kd.core.errors import ConfigError, RunError
from acam_kd.d2 import build_evaluator, register_coco_datasets, register_datasets
from acam_kd.d2.train import parser

from .conftest import detector_config, forget


@pytest.fixture
def files(tmp_path):
    """Return a function that writes a json of usual troubles and its image, and returns the entry of a dataset."""

    def write(name="mine", **changes):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images/a.jpg")
        annotation = {"image_id": "5", "category_id": 2.0, "bbox": [0, "0", 4, 4], **changes}
        content = {
            "images": [{"id": 5, "file_name": "a.jpg", "height": "8", "width": 8.0}],
            "annotations": [annotation, dict(annotation)],
            "categories": [{"id": "2", "name": "Käse"}, {"id": "2", "name": "Käse"}],
        }
        path = tmp_path / f"{name}.json"
        path.write_bytes(b"\xef\xbb\xbf" + json.dumps(content, ensure_ascii=False).encode())
        return [name, str(path), str(tmp_path / "images")]

    yield write
    forget("mine", "other")


@pytest.mark.parametrize("named", ["folders", "folder", "yaml"])
def test_yolos_files_are_registered_as_they_lie(files, tmp_path, named):
    """The class of each object, its box and its image are those of the text file."""
    root = tmp_path / "set"
    for name in ("images", "labels"):
        (root / "train" / name).mkdir(parents=True)
    Image.new("RGB", (40, 20)).save(root / "train/images/a.png")
    (root / "train/labels/a.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (root / "data.yaml").write_text("path: .\ntrain: train/images\nval: train/images\nnc: 2\nnames: [cat, dog]\n")
    if named == "folders":  # which have no data.yaml above them to go by
        (root / "train/labels/classes.txt").write_text("cat\ndog\n")
    places = {
        "folders": (root / "train/images", root / "train/labels"),
        "folder": (root, "train"),
        "yaml": (root / "data.yaml", "train"),
    }
    register_coco_datasets([["mine", *map(str, places[named])]])
    (record,) = DatasetCatalog.get("mine")
    assert record["file_name"] == str(root / "train/images/a.png")
    (found,) = record["annotations"]
    assert found["bbox"] == [15, 5, 10, 10] and MetadataCatalog.get("mine").thing_classes[found["category_id"]] == "dog"


def test_label_images_are_for_another_option(files, tmp_path):
    for name in ("images", "labels"):
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "set" / "train" / name / "a.png")
    (tmp_path / "set/classes.txt").write_text("a\nb\n")
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([["mine", str(tmp_path / "set"), "train"]])
    assert error.value.argument == "DATASETS.COCO_FORMAT" and error.value.hint == "give them by --sem-seg-dataset"


def test_a_mended_json_is_registered_for_training_and_evaluation(files, tmp_path, caplog):
    entry = files()
    register_coco_datasets([entry], output_dir=str(tmp_path / "run"))
    used = MetadataCatalog.get("mine").json_file
    assert used == str(tmp_path / "run/mended_mine.json") and used in caplog.text
    (record,) = DatasetCatalog.get("mine")
    assert [a["category_id"] for a in record["annotations"]] == [0, 0] and record["image_id"] == 5
    assert MetadataCatalog.get("mine").thing_classes == ["Käse"]
    evaluator = build_evaluator("mine", str(tmp_path / "results"))
    truth = evaluator._coco_api.dataset["annotations"]
    assert [a["id"] for a in truth] == [1, 2] and [a["area"] for a in truth] == [16, 16]
    assert Path(used).read_bytes().isascii(), "it is read with any locale"
    register_coco_datasets([entry], output_dir=str(tmp_path / "run"))  # the same again, as a resumed run does
    register_coco_datasets([entry], output_dir=str(tmp_path / "another run"))
    assert MetadataCatalog.get("mine").json_file == str(tmp_path / "another run/mended_mine.json")


def test_what_only_evaluation_needs_is_asked_for_validation_only(files, tmp_path):
    entries = [files("mine"), files("other")]
    cfg = detector_config(
        "Base-RetinaNet.yaml",
        "DATASETS.TRAIN",
        ("mine",),
        "DATASETS.TEST",
        ("other",),
        "OUTPUT_DIR",
        str(tmp_path / "run"),
    )
    cfg.DATASETS.COCO_FORMAT, cfg.DATASETS.SEM_SEG, cfg.DATASETS.UNLABELLED = entries, [], ()
    register_datasets(cfg, training=True)
    areas = [
        [a.get("area") for a in COCO(MetadataCatalog.get(name).json_file).dataset["annotations"]]
        for name in ("mine", "other")
    ]
    assert areas == [[None, None], [16, 16]]


VOC = """<annotation><size><width>40</width><height>20</height><depth>3</depth></size>
<object><name>{}</name><bndbox><xmin>16</xmin><ymin>6</ymin><xmax>25</xmax><ymax>15</ymax></bndbox></object>
</annotation>"""


@pytest.mark.parametrize("named", ["folders", "folder"])
def test_pascal_vocs_files_by_the_option_of_the_command(files, tmp_path, named):
    """Corners are counted from 1, classes are in the order of the alphabet, and each split has its own images."""
    root = tmp_path / "VOC2012"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for name, label, split in (("a", "dog", "train"), ("b", "cat", "val")):
        Image.new("RGB", (40, 20)).save(root / f"JPEGImages/{name}.jpg")
        (root / f"Annotations/{name}.xml").write_text(VOC.format(label))
        (root / f"ImageSets/Main/{split}.txt").write_text(f"{name}\n")
    places = {"folders": (root / "JPEGImages", root / "Annotations"), "folder": (root, "train")}[named]
    args = parser().parse_args(["--dataset", "mine", *map(str, places)])
    register_coco_datasets(args.dataset)
    dicts = DatasetCatalog.get("mine")
    assert [Path(d["file_name"]).name for d in dicts] == {"folders": ["a.jpg", "b.jpg"], "folder": ["a.jpg"]}[named]
    classes = MetadataCatalog.get("mine").thing_classes
    assert classes == ["cat", "dog"]
    (object_,) = dicts[0]["annotations"]
    assert object_["bbox"] == [15, 5, 10, 10] and classes[object_["category_id"]] == "dog"
    (root / "Annotations/a.xml").write_text("no xml")
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([["other", *map(str, places)]])
    assert error.value.argument == "DATASETS.COCO_FORMAT" and "a.xml" in str(error.value)


def test_masks_are_asked_for_if_the_head_reads_them(files, tmp_path):
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([files()], output_dir=str(tmp_path), masks=True)
    assert error.value.argument == "DATASETS.COCO_FORMAT" and "without 'segmentation'" in error.value.value
    bad = files(segmentation=[[1, 1]])  # Detectron2 would leave the whole annotation out
    register_coco_datasets([bad], output_dir=str(tmp_path), masks=False)
    assert len(DatasetCatalog.get("mine")[0]["annotations"]) == 2


def test_images_that_detectron2_would_clip_are_refused(files, tmp_path):
    entry = files()
    Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(tmp_path / "images/a.jpg", format="PNG")
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([entry], output_dir=str(tmp_path))
    assert "a.jpg of 16 bits" in error.value.value and "Detectron2" in error.value.allowed
    assert "8 bits" in error.value.hint


def test_every_dataset_is_checked_before_the_first_error(files, tmp_path, caplog):
    entries = [files("mine", bbox=[0, 0, -1, 1]), files("other", bbox=[0, 0, -2, 1])]
    with pytest.raises(ConfigError) as error:
        register_coco_datasets(entries, output_dir=str(tmp_path))
    assert error.value.value.startswith("dataset mine: ")
    assert "bbox [0, 0, -1, 1]" in caplog.text and "bbox [0, 0, -2, 1]" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_line(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError) as error:
        register_coco_datasets([files()], output_dir=str(tmp_path / "file"))
    assert "the mended json of dataset mine cannot be written" in str(error.value)
