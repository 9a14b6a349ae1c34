"""Semantic segmentation from folders to a mean IoU, as a user of train_net.py gives them."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import SemSegEvaluator
from PIL import Image

import train_net
from acam_kd.core.errors import ConfigError
from acam_kd.d2 import build_evaluator, check_datasets, register_sem_seg_datasets, sem_seg_datasets
from acam_kd.data import shapes

from .conftest import detector_config, distillation_config, forget, save_config

DRAWN = ["acam_shapes_train_sem_seg", "acam_shapes_val_sem_seg"]
CLASSES = "sky,road,car"


@pytest.fixture
def folders(tmp_path):
    """Three pairs of 48 x 64, and the entry of a dataset."""
    draw = np.random.default_rng(0)
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for index in range(3):
        label = np.repeat(np.repeat(draw.integers(0, 3, (6, 8)), 8, 0), 8, 1).astype(np.uint8)
        Image.fromarray(np.stack([label * 80] * 3, 2)).save(tmp_path / f"images/{index}.jpg")
        Image.fromarray(label).save(tmp_path / f"labels/{index}.png")
    yield ["mine", str(tmp_path / "images"), str(tmp_path / "labels"), CLASSES]
    forget("mine")


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The drawn shapes, few, below a folder of the test's."""
    monkeypatch.setattr(shapes, "SPLITS", {"train": 4, "val": 2})
    with monkeypatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
        forget(*DRAWN)
        sem_seg_datasets._register_shapes()
    yield tmp_path / "datasets"
    forget(*DRAWN)
    sem_seg_datasets._register_shapes()


def segmentor(*opts):
    return detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7, "DATASETS.TRAIN", DRAWN[:1], "DATASETS.TEST", DRAWN[1:], *opts,
    )  # fmt: skip


def test_a_registered_dataset_is_detectron2s(folders, tmp_path):
    register_sem_seg_datasets([folders])
    first = DatasetCatalog.get("mine")[0]
    assert first == {
        "file_name": f"{folders[1]}/0.jpg", "sem_seg_file_name": f"{folders[2]}/0.png", "height": 48, "width": 64
    }  # fmt: skip
    metadata = MetadataCatalog.get("mine")
    assert metadata.stuff_classes == ["sky", "road", "car"] and metadata.ignore_label == 255
    assert isinstance(build_evaluator("mine", str(tmp_path)), SemSegEvaluator)
    names = tmp_path / "names.txt"
    names.write_text("sky\nroad\ncar\n\n")
    register_sem_seg_datasets([[*folders[:3], str(names)]])  # the same again is no error
    with pytest.raises(ConfigError) as error:
        register_sem_seg_datasets([[*folders[:3], "sky,road,tram"]])
    assert (error.value.argument, error.value.value) == ("DATASETS.SEM_SEG", "dataset mine, a name that is taken")


@pytest.mark.parametrize(
    ("number", "value", "found", "allowed"),
    [
        (3, "sky,,car", "dataset mine: classes 3 ('sky', '', 'car')", "different names"),
        (3, "sky,car,sky", "dataset mine: classes 3 ('sky', 'car', 'sky')", "different names"),
        (3, "names.txt", "/names.txt", "names"),
        (3, "sky,road", ".png with the values 2", "0 to 1 for the 2 classes"),
        (2, "gone", "/gone", "a folder"),
    ],
)
def test_entries_that_cannot_be(folders, number, value, found, allowed):
    folders[number] = value
    with pytest.raises(ConfigError) as error:
        register_sem_seg_datasets([folders])
    assert error.value.argument == "DATASETS.SEM_SEG" and error.value.value.startswith("dataset mine: ")
    assert found in error.value.value and allowed in error.value.allowed and "\n" not in str(error.value)
    assert "mine" not in DatasetCatalog.list()


@pytest.mark.parametrize(
    "change", [lambda entry: [*entry[:3], ["sky", "road"]], lambda entry: entry[:3], lambda _: "mine"]
)
def test_malformed_entries_are_shown(folders, change):
    entry = change(folders)
    with pytest.raises(ConfigError) as error:
        register_sem_seg_datasets([entry])
    assert (error.value.argument, error.value.value) == ("DATASETS.SEM_SEG", entry)
    assert "[name, image folder, label folder, classes]" in error.value.allowed


def test_only_one_process_looks_into_the_labels(folders, tmp_path):
    Image.fromarray(np.full((48, 64), 9, np.uint8)).save(tmp_path / "labels/1.png")
    register_sem_seg_datasets([folders], check=False)
    assert len(DatasetCatalog.get("mine")) == 3
    with pytest.raises(ConfigError) as error:
        register_sem_seg_datasets([folders])
    assert "1.png with the values 9" in error.value.value


def test_the_head_has_to_fit_the_dataset(folders):
    register_sem_seg_datasets([folders])
    cfg = segmentor("DATASETS.TRAIN", ("mine",))
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=True)
    assert (error.value.argument, error.value.value) == ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    assert error.value.allowed == "3, the classes of dataset mine: sky, road, car"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.DATASETS.TEST = 3, ("mine",)
    check_datasets(cfg, training=True)
    cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 0
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=True)
    assert (error.value.argument, error.value.value) == ("MODEL.SEM_SEG_HEAD.IGNORE_VALUE", 0)
    assert error.value.allowed == "255, the ignored label of dataset mine"
    cfg.DATASETS.TEST = ("acam_shapes_val",)
    with pytest.raises(ConfigError) as error:
        check_datasets(cfg, training=False)
    assert error.value.argument == "DATASETS.TEST" and "labels of semantic segmentation" in error.value.allowed
    assert error.value.value == "dataset acam_shapes_val without stuff_classes in its metadata"


def test_the_drawn_shapes_end_in_a_mean_iou(drawn, tmp_path):
    """Detectron2's own segmentor, from nothing; trained with crops and flips, evaluated on whole images."""
    cfg = segmentor(
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 96],
        "INPUT.MIN_SIZE_TRAIN", (40, 160), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TEST", 0,
        "SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 2,
        "TEST.EXPECTED_RESULTS", [["sem_seg", "mIoU", 50.0, 50.0]], "OUTPUT_DIR", str(tmp_path / "run"),
    )  # fmt: skip
    assert not drawn.exists()
    results = train_net.main(train_net.parser().parse_args(["--config-file", save_config(cfg, tmp_path / "run.yaml")]))
    assert 0 <= results["sem_seg"]["mIoU"] <= 100 and "IoU-barred disc" in results["sem_seg"]
    assert len(list((drawn / "shapes_160_0/train_labels").iterdir())) == 4


def test_own_folders_on_the_command_line(folders, tmp_path):
    """Distilled, with the teacher on the same cropped images, and then evaluated."""
    student = segmentor("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3)
    teacher = save_config(student, tmp_path / "teacher.yaml")
    cfg = distillation_config(
        student, teacher, "DATASETS.TRAIN", "('mine',)", "DATASETS.TEST", "('mine',)", "SOLVER.MAX_ITER", 2,
        "INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [64, 64],
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.STEPS", "()", "OUTPUT_DIR", str(tmp_path / "run"),
    )  # fmt: skip
    command = ["--config-file", save_config(cfg, tmp_path / "run.yaml"), "--sem-seg-dataset", *folders]
    args = train_net.parser().parse_args(command)
    trainer = train_net.Trainer(train_net.setup(args))
    batch = next(iter(trainer.data_loader))
    assert [x["sem_seg"].shape for x in batch] == [x["image"].shape[1:] for x in batch] == [(64, 64)] * 2
    trainer.train()
    assert 0 <= trainer._last_eval_results["sem_seg"]["mIoU"] <= 100
    in_config = ["DATASETS.SEM_SEG", str([folders]), "MODEL.WEIGHTS", str(tmp_path / "run/model_final.pth")]
    evaluated = ["--eval-only", *command[:2], *in_config]
    assert "mIoU" in train_net.main(train_net.parser().parse_args(evaluated))["sem_seg"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        ([], "DATASETS.SEM_SEG: found dataset mine: label "),
        (["INPUT.CROP.ENABLED", True], "INPUT.CROP.TYPE: found relative_range, expected absolute"),
        (
            ["SOLVER.LR_SCHEDULER_NAME", "WarmupPolyLR", "SOLVER.BASE_LR_END", 1.0],
            "SOLVER.BASE_LR_END: found 1.0, expected 0 to SOLVER.BASE_LR",
        ),
    ],
)
def test_bad_input_is_one_line(folders, tmp_path, opts, message):
    if not opts:
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(tmp_path / "labels/1.png")
    cfg = segmentor("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 3, "OUTPUT_DIR", str(tmp_path / "run"), *opts)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("mine",)
    command = ["--config-file", save_config(cfg, tmp_path / "run.yaml"), "--sem-seg-dataset", *folders]
    with pytest.raises(SystemExit) as stop:
        train_net.main(train_net.parser().parse_args(command))
    assert str(stop.value).startswith(f"train_net.py: {message}") and "\n" not in str(stop.value)


def test_help_names_the_option(capsys):
    with pytest.raises(SystemExit):
        train_net.parser().parse_args(["--help"])
    assert "NAME IMAGES LABELS CLASSES" in capsys.readouterr().out
