"""Own keypoint datasets through the command: metadata from the json, refusals before the run, a step and an AP."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.data import transforms as T
from detectron2.data.datasets.builtin_meta import COCO_PERSON_KEYPOINT_FLIP_MAP, COCO_PERSON_KEYPOINT_NAMES
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import build_evaluator, check_datasets, register_coco_datasets
from acam_kd.d2.keypoint_flips import flip_pairs, without_partner

from .conftest import detector_config

SIDED = ["nose", "left_eye", "right_eye"]


def content(names=("a", "b", "c"), **category):
    """The json of case F11: one cell with three keypoints."""
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "categories": [{"id": 1, "name": "cell", "keypoints": list(names), "skeleton": [], **category}],
        "annotations": [
            {
                "id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 40, 40], "area": 1600, "iscrowd": 0,
                "keypoints": [9, 9, 2, 20, 20, 2, 30, 30, 2], "num_keypoints": 3,
            }
        ],
    }  # fmt: skip


@pytest.fixture
def register(tmp_path):
    """Writes a json and its image, and registers them."""
    names = []

    def write(content, name="kp"):
        (tmp_path / name).mkdir(exist_ok=True)
        draw = np.random.default_rng(0)
        Image.fromarray(draw.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / name / "a.png")
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
        register_coco_datasets([[name, str(tmp_path / f"{name}.json"), str(tmp_path / name)]])
        names.append(name)
        return MetadataCatalog.get(name)

    yield write
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def keypoint_rcnn(*opts):
    """A tiny Keypoint R-CNN for the dataset "kp"."""
    return detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 3, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", (8,),
        "TEST.KEYPOINT_OKS_SIGMAS", [0.05, 0.1, 0.2], "DATASETS.TRAIN", ("kp",), "DATASETS.TEST", ("kp",), *opts,
    )  # fmt: skip


def refusal(cfg, training=True):
    """The error of check_datasets, which has to be one line."""
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=training)
    assert "\n" not in str(error.value)
    return error.value


def test_the_jsons_keypoints_become_metadata(register, tmp_path):
    """Case F11."""
    metadata = register(content(skeleton=[[1, 2], [3, 2]]))
    assert metadata.keypoint_names == ("a", "b", "c") and metadata.keypoint_flip_map == ()
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [("a", "b"), ("c", "b")]
    assert create_keypoint_hflip_indices("kp") == [0, 1, 2]
    check_datasets(keypoint_rcnn(), training=True)
    sigmas = keypoint_rcnn().TEST.KEYPOINT_OKS_SIGMAS
    assert build_evaluator("kp", str(tmp_path), sigmas)._kpt_oks_sigmas == (0.05, 0.1, 0.2)
    assert build_evaluator("kp", str(tmp_path), kpt_oks_sigmas=[])._kpt_oks_sigmas == ()
    assert build_evaluator("kp", str(tmp_path))._kpt_oks_sigmas == ()


def test_only_coco_evaluators_get_sigmas(register, tmp_path):
    """Others have no such argument."""
    assert type(build_evaluator("voc_2007_test", str(tmp_path), [0.1])).__name__ == "PascalVOCDetectionEvaluator"
    register(content())
    MetadataCatalog.get("kp").set(sem_seg_root="", stuff_classes=["x"], ignore_label=255, panoptic_json="x")
    MetadataCatalog.get("kp").set(panoptic_root="x", thing_dataset_id_to_contiguous_id={1: 0})
    MetadataCatalog.get("kp").set(stuff_dataset_id_to_contiguous_id={})
    entry = DatasetCatalog.get("kp")[0] | {"sem_seg_file_name": "x"}
    DatasetCatalog.pop("kp")
    DatasetCatalog.register("kp", lambda: [entry])
    MetadataCatalog.get("kp").__dict__["evaluator_type"] = "coco_panoptic_seg"
    evaluators = build_evaluator("kp", str(tmp_path), [0.1])._evaluators
    assert [e._kpt_oks_sigmas for e in evaluators if isinstance(e, COCOEvaluator)] == [(0.1,)]


def test_cocos_own_names_give_cocos_own_pairs():
    assert flip_pairs(COCO_PERSON_KEYPOINT_NAMES) == COCO_PERSON_KEYPOINT_FLIP_MAP


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left_eye", "right_eye"), ("eye_left", "eye_right"), ("L_eye", "R_eye"), ("eye_l", "eye_r"), ("eye.L", "eye.R"),
        ("leftEye", "rightEye"), ("LeftEye", "RightEye"), ("eyeLeft", "eyeRight"), ("LShoulder", "RShoulder"),
        ("eyeL", "eyeR"), ("lEye", "rEye"), ("LEFT_EYE", "RIGHT_EYE"), ("lefteye", "righteye"), ("left eye", "right eye"),
        ("Left-eye", "right-eye"), ("l1", "r1"), ("left_eye_right_corner", "right_eye_left_corner"), ("left", "right"),
    ],
)  # fmt: skip
def test_names_that_differ_only_by_left_and_right(left, right):
    names = ["nose", left, "chin", right]
    pairs = flip_pairs(names)
    assert pairs == ((left, right),) and without_partner(names, pairs) == []
    assert flip_pairs([right, left]) == ((right, left),)
    alone = left.replace("eye", "ear").replace("Eye", "Ear").replace("EYE", "EAR").replace("Shoulder", "Hip")
    if alone != left:
        assert without_partner([*names, alone], flip_pairs([*names, alone])) == [alone]


@pytest.mark.parametrize("names", [["bright", "upright"], ["red", "r", "b"], ["L", "H", "W"], ["leftover", "rightly"]])
def test_names_that_say_no_side(names):
    assert flip_pairs(names) == () and without_partner(names, ()) == []


def test_only_names_of_the_same_place_are_a_pair():
    names = ["left_eye", "right_ear", "left_eye_2", "right_eye_2"]
    assert flip_pairs(names) == (("left_eye_2", "right_eye_2"),)
    assert without_partner(names, flip_pairs(names)) == ["left_eye", "right_ear"]


@pytest.mark.parametrize("key", ["keypoint_flip_map", "flip_map"])
@pytest.mark.parametrize(
    ("written", "pairs"),
    [
        ([["a", "c"]], (("a", "c"),)),
        ([["a", "c"], ["c", "a"]], (("a", "c"),)),
        ({"a": "c"}, (("a", "c"),)),
        ([["b", "b"]], (("b", "b"),)),
        ([], ()),
        (None, ()),
    ],
)
def test_pairs_that_the_json_names(register, key, written, pairs):
    metadata = register(content(**{key: written}))
    assert metadata.keypoint_flip_map == pairs
    check_datasets(keypoint_rcnn(), training=True)
    assert create_keypoint_hflip_indices("kp") == ([2, 1, 0] if ("a", "c") in pairs else [0, 1, 2])


@pytest.mark.parametrize(
    "written", [[[0, 2]], [["a", "d"]], [["a", "b"], ["a", "c"]], [["a", "b", "c"]], "a,c", 3, ["ac"]]
)
def test_pairs_that_cannot_be_used(register, written):
    register(content(flip_map=written))
    error = refusal(keypoint_rcnn())
    assert error.argument == "DATASETS.TRAIN" and error.value.startswith("dataset kp: category cell with flip_map ")
    assert "pairs of names" in error.allowed


def test_named_pairs_are_used_instead_of_those_of_the_names(register):
    assert register(content(SIDED, flip_map=[["nose", "nose"]])).keypoint_flip_map == (("nose", "nose"),)
    error = refusal(keypoint_rcnn())
    assert error.argument == "INPUT.RANDOM_FLIP" and "left_eye, right_eye" in error.allowed


def test_a_skeletons_bad_lines_are_left_out(register, caplog):
    with caplog.at_level(logging.WARNING):
        metadata = register(content(skeleton=[[1, 2], [0, 1], [3, 4], [1], "ab", None]))
    assert [rule[:2] for rule in metadata.keypoint_connection_rules] == [("a", "b")]
    assert caplog.text.count("is not drawn; expected two numbers from 1 to 3") == 5


def test_without_keypoints_in_the_config_nothing_is_checked(register):
    metadata = register(content(names=[]))
    assert metadata.get("keypoint_names", None) is None
    check_datasets(keypoint_rcnn("MODEL.KEYPOINT_ON", False), training=True)
    bad = content()
    bad["annotations"][0]["keypoints"] = [1, 2, 3]
    register(bad, name="bad")
    check_datasets(keypoint_rcnn("MODEL.KEYPOINT_ON", False, "DATASETS.TRAIN", ("bad",)), training=True)


def test_no_names_are_refused(register):
    register(content(names=[]))
    error = refusal(keypoint_rcnn())
    assert (error.argument, error.value) == ("DATASETS.TRAIN", "dataset kp without names of keypoints")
    assert refusal(keypoint_rcnn(), training=False).argument == "DATASETS.TEST"


def test_another_number_than_the_heads_is_refused(register):
    register(content())
    error = refusal(keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17))
    assert (error.argument, error.value) == ("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17)
    assert error.allowed == "3, the keypoints of dataset kp: a, b, c"


def test_categories_share_their_keypoints(register):
    several = content()
    several["categories"] += [{"id": 2, "name": "wall", "keypoints": ["a", "b", "d"]}, {"id": 3, "name": "plain"}]
    register(several)
    cfg = keypoint_rcnn("MODEL.ROI_HEADS.NUM_CLASSES", 3)
    error = refusal(cfg)
    assert error.argument == "DATASETS.TRAIN" and "cell (a, b, c) and wall (a, b, d)" in error.value
    several["categories"][1]["keypoints"] = ["a", "b", "c"]
    assert register(several, name="same").keypoint_names == ("a", "b", "c")
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("same",)
    check_datasets(cfg, training=True)
    several["categories"][0]["flip_map"], several["categories"][1]["flip_map"] = [["a", "b"]], [["a", "c"]]
    register(several, name="flips")
    cfg.DATASETS.TRAIN = ("flips",)
    assert "category wall with another flip_map" in refusal(cfg).value


@pytest.mark.parametrize("names", ["abc", [1, 2, 3], ["a", "", "c"], ["a", "b", "a"]])
def test_names_that_cannot_be_used(register, names):
    broken = content()
    broken["categories"][0]["keypoints"] = names
    register(broken)
    error = refusal(keypoint_rcnn())
    assert error.argument == "DATASETS.TRAIN" and error.value.startswith("dataset kp: category cell with keypoints ")


def test_left_without_right_needs_runs_without_flips(register):
    register(content(["nose", "left_eye", "right_ear"]))
    error = refusal(keypoint_rcnn())
    assert (error.argument, error.value) == ("INPUT.RANDOM_FLIP", "horizontal")
    assert (
        error.allowed.startswith("none, ")
        and error.allowed.endswith("left_eye, right_ear")
        and "flip_map" in error.hint
    )
    check_datasets(keypoint_rcnn("INPUT.RANDOM_FLIP", "none"), training=True)
    check_datasets(keypoint_rcnn(), training=False)  # an evaluation flips nothing
    register(content(["nose", "left_eye", "right_ear"], flip_map=[["left_eye", "right_ear"]]), name="named")
    check_datasets(keypoint_rcnn("DATASETS.TRAIN", ("named",)), training=True)


@pytest.mark.parametrize("sigmas", [[], [0.05] * 17, [0.05, 0.05], [0.05, 0.05, 0.0], [0.05, 0.05, -1.0]])
def test_sigmas_have_to_fit_what_is_evaluated(register, sigmas):
    register(content())
    cfg = keypoint_rcnn("TEST.KEYPOINT_OKS_SIGMAS", sigmas)
    for training in (True, False):
        error = refusal(cfg, training)
        assert (error.argument, error.value) == ("TEST.KEYPOINT_OKS_SIGMAS", sigmas)
        assert error.allowed == "3 numbers above 0, one per keypoint of dataset kp"
    cfg.DATASETS.TEST = ()
    check_datasets(cfg, training=True)  # nothing is evaluated


def test_cocos_number_of_keypoints_needs_no_sigmas(register):
    person = content(COCO_PERSON_KEYPOINT_NAMES)
    person["annotations"][0]["keypoints"] = [9, 9, 2] * 17
    register(person)
    cfg = keypoint_rcnn("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 17, "TEST.KEYPOINT_OKS_SIGMAS", [])
    check_datasets(cfg, training=True)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 17
    check_datasets(cfg, training=True)
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1] * 3
    assert refusal(cfg).allowed.startswith("17 numbers above 0") and refusal(cfg).allowed.endswith(", or none")


def test_training_datasets_have_the_same_keypoints(register):
    register(content())
    register(content(["a", "c", "b"]), name="other")
    error = refusal(keypoint_rcnn("DATASETS.TRAIN", ("kp", "other")))
    assert (error.argument, error.value) == ("DATASETS.TRAIN", "datasets kp and other with different keypoints")


def test_datasets_registered_in_python_need_their_pairs(register):
    register(content())
    del MetadataCatalog.get("kp").keypoint_flip_map
    error = refusal(keypoint_rcnn("INPUT.RANDOM_FLIP", "none"))
    assert error.argument == "DATASETS.TRAIN" and error.value.startswith("dataset kp without keypoint_flip_map")
    check_datasets(keypoint_rcnn(), training=False)


def test_there_is_no_test_time_augmentation_of_keypoints(register):
    register(content())
    assert refusal(keypoint_rcnn("TEST.AUG.ENABLED", True)).argument == "TEST.AUG.ENABLED"


@pytest.mark.parametrize(
    ("second", "found", "training"),
    [
        ({"keypoints": [1, 2, 3]}, "annotations[1] with keypoints 1, 2, 3", True),
        ({"keypoints": ["x"] * 9}, "annotations[1] with keypoints x, x, x, x, x, ...", True),
        ({"keypoints": [float("inf")] * 9}, "annotations[1] with keypoints inf, inf", True),
        ({"keypoints": "abc"}, "annotations[1] without a list of keypoints", True),
        ({"keypoints": []}, "annotations[1] without keypoints, in an image where others have some", True),
        ({"keypoints": []}, "annotations[1] with keypoints ", False),
        ({"num_keypoints": None}, "annotations[1] without num_keypoints", False),
        ({"iscrowd": 1, "keypoints": None}, "annotations[1] without a list of keypoints", False),
    ],
)
def test_annotations_that_cannot_be_used(register, second, found, training):
    broken = content()
    broken["annotations"].append({**copy.deepcopy(broken["annotations"][0]), "id": 2, **second})
    register(broken)
    cfg = keypoint_rcnn(*(["DATASETS.TEST", ()] if training else []))
    error = refusal(cfg, training)
    assert error.argument == ("DATASETS.TRAIN" if training else "DATASETS.TEST")
    assert error.value.startswith(f"dataset kp: {found}")


def test_annotations_that_detectron2_leaves_out_of_training(register):
    """Crowds, and images of which no object has keypoints; but nothing to learn is refused."""
    partly = content()
    partly["images"].append({**partly["images"][0], "id": 2})
    first = partly["annotations"][0]
    partly["annotations"] += [
        {**first, "id": 2, "image_id": 2, "keypoints": []},
        {**first, "id": 3, "iscrowd": 1, "keypoints": None},
    ]
    register(partly)
    cfg = keypoint_rcnn("DATASETS.TEST", ())
    check_datasets(cfg, training=True)
    mapper = DatasetMapper(cfg, is_train=True)
    assert mapper(DatasetCatalog.get("kp")[0])["instances"].gt_keypoints.tensor.shape == (1, 3, 3)
    invisible = content()
    invisible["annotations"][0]["keypoints"] = [0] * 9
    register(invisible, name="invisible")
    cfg.DATASETS.TRAIN = ("invisible",)
    assert refusal(cfg).value == "dataset invisible: no visible keypoint in any annotation"


def test_a_tiny_keypoint_rcnn_trains_with_a_flip_and_is_evaluated(register, storage, tmp_path):
    register(content(SIDED, skeleton=[[1, 2], [1, 3]]))
    cfg = keypoint_rcnn("INPUT.MIN_SIZE_TRAIN", (64,))
    check_datasets(cfg, training=True)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=[T.RandomFlip(prob=1.0)])
    sample = mapper(DatasetCatalog.get("kp")[0])
    points = sample["instances"].gt_keypoints.tensor[0]
    assert points[:, :2].tolist() == [[64 - 9.5, 9.5], [64 - 30.5, 30.5], [64 - 20.5, 20.5]]  # the eyes are swapped

    torch.manual_seed(0)
    model = build_model(cfg).train()
    head = model.roi_heads.keypoint_head
    with torch.no_grad():  # Detectron2 asserts on the NaN that logits in the hundreds become
        head.score_lowres.weight *= 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = model([sample] * 2)
    assert "loss_keypoint" in losses and losses["loss_keypoint"] > 0
    sum(losses.values()).backward()
    before = copy.deepcopy(head.state_dict())
    optimizer.step()
    assert any(not torch.equal(value, before[key]) for key, value in head.state_dict().items())

    model.roi_heads.box_predictor.test_score_thresh = 0.0
    loader = build_detection_test_loader(cfg, "kp")
    results = inference_on_dataset(model, loader, build_evaluator("kp", str(tmp_path), cfg.TEST.KEYPOINT_OKS_SIGMAS))
    assert 0 <= results["keypoints"]["AP"] <= 100 and "AP" in results["bbox"]


def test_perfect_keypoints_have_an_ap_of_100(register, tmp_path):
    """And the sigmas count: a larger one forgives the same distance."""
    register(content(SIDED))
    entry = DatasetCatalog.get("kp")[0]

    def precision(shift, sigma):
        evaluator = build_evaluator("kp", str(tmp_path), [sigma] * 3)
        points = torch.tensor(entry["annotations"][0]["keypoints"]).reshape(1, 3, 3).float()
        points[..., 0] += shift
        instances = Instances((64, 64))
        instances.pred_boxes, instances.scores = Boxes(torch.tensor([[5.0, 5, 45, 45]])), torch.ones(1)
        instances.pred_classes, instances.pred_keypoints = torch.zeros(1, dtype=torch.int64), points
        evaluator.reset()
        evaluator.process([entry], [{"instances": instances}])
        return evaluator.evaluate()["keypoints"]["AP"]

    assert precision(0.0, 0.05) == pytest.approx(100)
    assert precision(4.0, 0.01) == 0 and precision(4.0, 0.5) == pytest.approx(100)
