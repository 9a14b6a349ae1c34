"""Own datasets without Python, and every way to get them wrong."""

from __future__ import annotations

import copy
import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator

from acam_kd.d2 import build_evaluator, check_datasets, register_coco_datasets

GOOD = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 8, "width": 8}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 7, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
    "categories": [{"id": 7, "name": "second"}, {"id": 2, "name": "first"}],
}


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
        (tmp_path / "images" / "a.jpg").touch()
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
    with pytest.raises(ValueError, match="there is a dataset called 'mine' already"):
        register_coco_datasets([["mine", str(other), entry[2]]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not in COCO format: it has no list 'images'"),
        ({"images": [], "annotations": []}, "it has no list 'categories'"),
        ({**GOOD, "images": []}, "has no images"),
        ({**GOOD, "categories": []}, "has no categories"),
        ({**GOOD, "annotations": []}, "has no annotations"),
        (broken("annotations", iscrowd=1), "has no boxes that are not crowds"),
        (broken("annotations", category_id=9), "category_id 9 is no category"),
        (broken("annotations", image_id=9), "image_id 9 is no image"),
        (broken("annotations", bbox=[1, 2]), "bbox has 2 numbers"),
        (broken("annotations", id=0), "id is 0"),
        (broken("annotations", area=None), "annotations\\[0\\] has no 'area'"),
        (broken("images", file_name=None), "images\\[0\\] has no 'file_name'"),
        (broken("categories", name=None), "categories\\[0\\] has no 'name'"),
    ],
)
def test_files_that_are_not_coco(files, content, message):
    with pytest.raises(ValueError, match=message):
        register_coco_datasets([files(content)])


def test_files_that_are_not_there(files, tmp_path):
    entry = files()
    with pytest.raises(FileNotFoundError, match=f"no file {tmp_path}/gone.json"):
        register_coco_datasets([["mine", str(tmp_path / "gone.json"), entry[2]]])
    with pytest.raises(FileNotFoundError, match="no folder"):
        register_coco_datasets([["mine", entry[1], str(tmp_path / "gone")]])
    (tmp_path / "images" / "a.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="image .*a.jpg"):
        register_coco_datasets([entry])
    with pytest.raises(ValueError, match="is not json"):
        register_coco_datasets([files(text="{")])
    with pytest.raises(ValueError, match="a dataset is \\[name, json file, image folder\\], found \\['mine'\\]"):
        register_coco_datasets([["mine"]])


def test_other_numbers_of_classes_are_named(files, retinanet, rcnn):
    register_coco_datasets([files()])
    for cfg, key in ((retinanet, "MODEL.RETINANET.NUM_CLASSES"), (rcnn, "MODEL.ROI_HEADS.NUM_CLASSES")):
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("mine",), ()
        with pytest.raises(ValueError, match=f"mine has 2 classes \\(first, second\\), but {key} is 3"):
            check_datasets(cfg, training=True)
        cfg.merge_from_list([key, 2])
        check_datasets(cfg, training=True)


def test_datasets_that_are_not_there_are_named(retinanet):
    retinanet.DATASETS.TRAIN, retinanet.DATASETS.TEST = (), ("lvis_v1_val",)
    with pytest.raises(ValueError, match="nothing to train on"):
        check_datasets(retinanet, training=True)
    retinanet.DATASETS.TEST = ()
    with pytest.raises(ValueError, match="nothing to evaluate .key: DATASETS.TEST"):
        check_datasets(retinanet, training=False)
    retinanet.DATASETS.TEST, retinanet.MODEL.RETINANET.NUM_CLASSES = ("cityscapes_fine_instance_seg_val",), 8
    with pytest.raises(FileNotFoundError, match="cityscapes_fine_instance_seg_val: no .*cityscapes/leftImg8bit/val"):
        check_datasets(retinanet, training=False)
    retinanet.DATASETS.TEST, retinanet.MODEL.RETINANET.NUM_CLASSES = ("lvis_v1_val",), 1203
    with pytest.raises(FileNotFoundError, match="dataset lvis_v1_val: no .*lvis_v1_val.json.*DETECTRON2_DATASETS"):
        check_datasets(retinanet, training=False)
    retinanet.DATASETS.TEST = ("acam_shapes_val",)  # drawn when it is asked for
    retinanet.MODEL.RETINANET.NUM_CLASSES = 6
    check_datasets(retinanet, training=False)


def test_evaluators_follow_the_metadata(files, tmp_path):
    register_coco_datasets([files()])
    assert isinstance(build_evaluator("mine", str(tmp_path)), COCOEvaluator)
    MetadataCatalog.get("odd").evaluator_type = "odd"
    with pytest.raises(ValueError, match="evaluator_type 'odd'; known: coco, coco_panoptic_seg, lvis"):
        build_evaluator("odd", str(tmp_path))
    MetadataCatalog.remove("odd")
    assert type(build_evaluator("voc_2007_test", str(tmp_path))).__name__ == "PascalVOCDetectionEvaluator"
