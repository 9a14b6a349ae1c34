"""Own datasets without Python, and every way to get them wrong."""

from __future__ import annotations

import copy
import json

import pytest
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import build_evaluator, check_datasets, register_coco_datasets

KEY = "DATASETS.COCO_FORMAT"
GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
    "categories": [{"id": 7, "name": "second"}, {"id": 2, "name": "first"}],
}


def refusal(cfg, training=True):
    """The fields of the error that check_datasets raises."""
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=training)
    assert "\n" not in str(error.value)
    return error.value.args


def broken(part, **changes):
    """GOOD with the first item of a part changed; None takes the key out."""
    content = copy.deepcopy(GOOD)
    content[part][0].update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del content[part][0][key]
    return content


@pytest.fixture
def files(tmp_path):
    """Writes a json and its one image; returns the entry of a dataset."""

    def write(content=GOOD, text=None):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.jpg")
        (tmp_path / "d.json").write_text(text if text is not None else json.dumps(content))
        return ["mine", str(tmp_path / "d.json"), str(tmp_path / "images")]

    yield write
    if "mine" in DatasetCatalog.list():
        DatasetCatalog.remove("mine")
        MetadataCatalog.remove("mine")


def test_a_registered_dataset_is_detectron2s(files, tmp_path):
    entry = files()
    register_coco_datasets([entry])
    assert MetadataCatalog.get("mine").thing_classes == ["first", "second"]  # by category id, as Detectron2 orders them
    assert DatasetCatalog.get("mine")[0]["annotations"][0]["category_id"] == 1
    register_coco_datasets([entry])  # the same again is no error
    other = tmp_path / "other.json"
    other.write_text(json.dumps(GOOD))
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([["mine", str(other), entry[2]]])
    assert (error.value.argument, error.value.value) == (KEY, "dataset mine, a name that is taken")


@pytest.mark.parametrize(
    ("content", "value", "allowed"),
    [
        ([], "without a list 'images'", "as in COCO format"),
        ({"images": [], "annotations": []}, "without a list 'categories'", "as in COCO format"),
        ({**GOOD, "images": []}, "no images", "at least one"),
        ({**GOOD, "categories": []}, "no categories", "at least one"),
        ({**GOOD, "annotations": []}, "no annotations", "at least one"),
        (broken("annotations", iscrowd=1), "crowds only", "not a crowd"),
        (broken("annotations", category_id=9), "annotations[0] (id 1) with category_id 9", "the id of a category"),
        (broken("annotations", image_id=9), "annotations[0] (id 1) with image_id 9", "the id of an image"),
        (broken("annotations", bbox=[1, 2]), "a bbox of 2 numbers", "[x, y, width, height]"),
        (broken("annotations", bbox=None), "annotations[0] (id 1) without 'bbox'", "[x, y, width, height]"),
        (broken("images", file_name=None), "images[0] (id 1) without 'file_name'", "a text"),
        (broken("categories", name=None), "categories[0] without 'name'", "name"),
    ],
)
def test_files_that_are_not_coco(files, content, value, allowed):
    with pytest.raises(ConfigError) as error:
        register_coco_datasets([files(content)])
    assert error.value.argument == KEY and error.value.value.startswith("dataset mine: ")
    assert value in error.value.value and allowed in error.value.allowed and "\n" not in str(error.value)


def test_files_that_are_not_there(files, tmp_path):
    entry = files()

    def refused(entry):
        with pytest.raises(ConfigError) as error:
            register_coco_datasets([entry])
        assert error.value.argument == KEY
        return error.value.value

    assert refused(["mine", str(tmp_path / "gone.json"), entry[2]]) == f"dataset mine: no file {tmp_path}/gone.json"
    assert refused(["mine", entry[1], str(tmp_path / "gone")]) == f"dataset mine: no folder {tmp_path}/gone"
    (tmp_path / "images" / "a.jpg").unlink()
    assert refused(entry).endswith(f"d.json: images[0] (id 1) without its file {tmp_path}/images/a.jpg")
    assert "is not json" in refused(files(text="{"))
    assert refused(["mine"]) == ["mine"]
    assert refused("mine") == "mine"


def test_other_numbers_of_classes_are_named(files, retinanet, rcnn):
    register_coco_datasets([files()])
    for cfg, key in ((retinanet, "MODEL.RETINANET.NUM_CLASSES"), (rcnn, "MODEL.ROI_HEADS.NUM_CLASSES")):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
        assert refusal(cfg)[:3] == (key, 3, "2, the classes of dataset mine: first, second")
        cfg.merge_from_list([key, 2])
        check_datasets(cfg, training=True)


@pytest.fixture
def panoptic():
    """Metadata of a panoptic dataset, with two things and three classes of semantic segmentation."""
    for name, kind in (("panoptic", "coco_panoptic_seg"), ("instances", "coco")):
        DatasetCatalog.register(name, list)
        MetadataCatalog.get(name).set(evaluator_type=kind, thing_classes=["a", "b"])
    MetadataCatalog.get("panoptic").set(stuff_classes=["things", "sky", "road"], ignore_label=255)
    yield
    for name in ("panoptic", "instances"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_panoptic_fpn_has_two_numbers_of_classes(panoptic, rcnn):
    rcnn.MODEL.META_ARCHITECTURE = "PanopticFPN"
    rcnn.DATASETS.TRAIN = rcnn.DATASETS.TEST = ("panoptic",)
    assert refusal(rcnn)[:3] == ("MODEL.ROI_HEADS.NUM_CLASSES", 3, "2, the classes of dataset panoptic: a, b")
    rcnn.MODEL.ROI_HEADS.NUM_CLASSES = 2
    allowed = "3, the classes of dataset panoptic: things, sky, road"
    assert refusal(rcnn)[:3] == ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 54, allowed)
    rcnn.MODEL.SEM_SEG_HEAD.NUM_CLASSES, rcnn.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 3, 0
    assert refusal(rcnn)[:2] == ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 0)
    rcnn.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
    check_datasets(rcnn, training=True)
    rcnn.DATASETS.TEST = ("instances",)  # an evaluation of its boxes reads no labels
    check_datasets(rcnn, training=True)
    rcnn.DATASETS.TRAIN = ("instances",)
    assert refusal(rcnn)[:2] == ("DATASETS.TRAIN", "dataset instances without stuff_classes in its metadata")
    del MetadataCatalog.get("panoptic").ignore_label
    rcnn.DATASETS.TRAIN = ("panoptic",)  # Detectron2 trains it without
    check_datasets(rcnn, training=True)
    rcnn.DATASETS.TEST = ("panoptic",)
    assert refusal(rcnn)[:2] == ("DATASETS.TEST", "dataset panoptic without ignore_label in its metadata")


@pytest.mark.parametrize(
    ("name", "key", "number"),
    [("PanopticDeepLab", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3), ("TensorMask", "MODEL.TENSOR_MASK.NUM_CLASSES", 2)],
)
def test_projects_of_detectron2_say_their_number_of_classes(panoptic, rcnn, name, key, number):
    rcnn.MODEL.META_ARCHITECTURE, rcnn.MODEL.TENSOR_MASK = name, CfgNode({"NUM_CLASSES": 80})
    rcnn.DATASETS.TRAIN = rcnn.DATASETS.TEST = ("panoptic",)
    argument, _, allowed, _ = refusal(rcnn)
    assert argument == key and allowed.startswith(f"{number}, ")
    rcnn.merge_from_list([key, number])
    check_datasets(rcnn, training=True)


def test_other_meta_architectures_are_left_alone(files, rcnn):
    register_coco_datasets([files()])
    rcnn.MODEL.META_ARCHITECTURE, rcnn.DATASETS.TRAIN, rcnn.DATASETS.TEST = "ProposalNetwork", ("mine",), ("mine",)
    check_datasets(rcnn, training=True)


def test_datasets_that_are_not_there_are_named(retinanet):
    retinanet.DATASETS.TRAIN, retinanet.DATASETS.TEST = (), ("lvis_v1_val",)
    assert refusal(retinanet)[:3] == ("DATASETS.TRAIN", (), "at least one dataset to train on")
    retinanet.DATASETS.TEST = ()
    assert refusal(retinanet, training=False)[:3] == ("DATASETS.TEST", (), "at least one dataset to evaluate")
    retinanet.DATASETS.TEST, retinanet.DATASETS.TRAIN = ("nobodys",), ("nobodys",)
    for training, key in ((True, "DATASETS.TRAIN"), (False, "DATASETS.TEST")):
        argument, value, _, hint = refusal(retinanet, training=training)
        assert (argument, value) == (key, "nobodys") and "--dataset" in hint and "DATASETS.SEM_SEG" in hint
    retinanet.DATASETS.TEST, retinanet.MODEL.RETINANET.NUM_CLASSES = ("cityscapes_fine_instance_seg_val",), 8
    argument, value, _, _ = refusal(retinanet, training=False)
    assert argument == "DATASETS.TEST" and value.startswith("dataset cityscapes_fine_instance_seg_val: no ")
    assert value.rstrip("/").endswith("cityscapes/leftImg8bit/val")
    retinanet.DATASETS.TEST, retinanet.MODEL.RETINANET.NUM_CLASSES = ("lvis_v1_val",), 1203
    _, value, _, hint = refusal(retinanet, training=False)
    assert value.startswith("dataset lvis_v1_val: no ") and value.endswith("lvis_v1_val.json")
    assert "DETECTRON2_DATASETS" in hint
    retinanet.DATASETS.TEST = ("acam_shapes_val",)  # drawn when it is asked for
    retinanet.MODEL.RETINANET.NUM_CLASSES = 6
    check_datasets(retinanet, training=False)


def test_evaluators_follow_the_metadata(files, tmp_path):
    register_coco_datasets([files()])
    assert isinstance(build_evaluator("mine", str(tmp_path)), COCOEvaluator)
    MetadataCatalog.get("odd").evaluator_type = "odd"
    with pytest.raises(ConfigError) as error:
        build_evaluator("odd", str(tmp_path))
    assert error.value.argument == "DATASETS.TEST" and error.value.value == "dataset odd with evaluator_type 'odd'"
    assert "coco, coco_panoptic_seg, lvis" in error.value.allowed
    MetadataCatalog.remove("odd")
    assert type(build_evaluator("voc_2007_test", str(tmp_path))).__name__ == "PascalVOCDetectionEvaluator"
