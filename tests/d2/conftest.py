"""Tiny detectors in real Detectron2, and the files around them."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from acam_kd.core import ConfigError, RunError
from acam_kd.d2 import add_distillation_config
from acam_kd.data import shapes

OWN = ["own_train", "own_val"]
"""The names of the datasets of the fixture ``data``."""
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # train_net

TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.NORM", "BN",
    "MODEL.RESNETS.STEM_OUT_CHANNELS", "8", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8",
    "MODEL.RESNETS.WIDTH_PER_GROUP", "4", "MODEL.RETINANET.NUM_CLASSES", "3", "MODEL.ROI_HEADS.NUM_CLASSES", "3",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "10",
    "MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "10",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_MASK_HEAD.CONV_DIM", "8",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.RETINANET.NUM_CONVS", "1",
    "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip
NARROW = ["MODEL.FPN.OUT_CHANNELS", "16"]


def detector_config(base: str, *opts: object) -> CfgNode:
    """A tiny detector of Detectron2's own; ``base`` is a file of configs/."""
    cfg = get_cfg()
    cfg.merge_from_file(str(ROOT / "configs" / base))
    cfg.merge_from_list([*TINY, *NARROW, *opts])
    return cfg


def save_config(cfg: CfgNode, path: Path) -> str:
    path.write_text(cfg.dump())
    return str(path)


def save_weights(cfg: CfgNode, path: Path, seed: int = 7) -> str:
    torch.manual_seed(seed)
    torch.save({"model": build_model(cfg).state_dict()}, path)
    return str(path)


def distillation_config(student: CfgNode, teacher: str, *opts: object, weights: str = "random") -> CfgNode:
    """A distillation config around a student's; ``teacher`` is a config file."""
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_other_cfg(CfgNode(student))
    cfg.DISTILL.STUDENT_META_ARCHITECTURE = cfg.MODEL.META_ARCHITECTURE
    cfg.MODEL.META_ARCHITECTURE = "DistillationMetaArch"
    cfg.DISTILL.TEACHER.CONFIG_FILE = teacher
    cfg.DISTILL.TEACHER.WEIGHTS = weights
    cfg.merge_from_list(list(opts))
    return cfg


def inputs(n: int = 2, size: tuple[int, int] = (64, 96), boxes: bool = True) -> list[dict]:
    """What Detectron2's mapper gives a detector."""
    draw = torch.Generator().manual_seed(1)
    out = []
    for _ in range(n):
        instances = Instances(size)
        corners = torch.tensor([[4.0, 4.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]])
        instances.gt_boxes = Boxes(corners if boxes else corners[:0])
        squares = [[np.array([4.0, 4, 40, 4, 40, 40, 4, 40])], [np.array([20.0, 10, 60, 10, 60, 50, 20, 50])]]
        instances.gt_masks = PolygonMasks(squares if boxes else [])
        instances.gt_classes = torch.tensor([0, 2]) if boxes else torch.zeros(0, dtype=torch.int64)
        image = torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8)
        out.append({"image": image, "instances": instances, "height": size[0], "width": size[1]})
    return out


@pytest.fixture(autouse=True)
def logs_reach_pytest(monkeypatch):
    """Detectron2's setup_logger keeps them from it."""
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)


@pytest.fixture(autouse=True)
def no_handlers_left():
    """Each run has setup_logger add handlers, whose streams pytest closes after the test."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "acam_kd")]
    before = [[*logger.handlers] for logger in loggers]
    yield
    for logger, handlers in zip(loggers, before):
        logger.handlers[:] = handlers
    setup_logger.cache_clear()  # it adds none for arguments that it has seen


@pytest.fixture
def storage():
    with EventStorage(0) as events:
        yield events


@pytest.fixture
def retinanet():
    return detector_config("Base-RetinaNet.yaml")


@pytest.fixture
def rcnn():
    return detector_config("Base-RCNN-FPN.yaml")


@pytest.fixture
def retinanet_teacher(retinanet, tmp_path):
    return save_config(retinanet, tmp_path / "teacher.yaml")


@pytest.fixture
def rcnn_teacher(rcnn, tmp_path):
    return save_config(rcnn, tmp_path / "rcnn_teacher.yaml")


@contextmanager
def refused(argument: str, value: str = "", allowed: str = "", hint: str = "") -> Iterator[None]:
    """Expect a ConfigError of an argument, whose other fields have these patterns."""
    with pytest.raises(ConfigError) as error:
        yield
    found = error.value
    assert found.argument == argument, str(found)
    for pattern, field in ((value, found.value), (allowed, found.allowed), (hint, found.hint)):
        assert re.search(pattern, str(field)), f"{pattern!r} is not in {field!r}"


@contextmanager
def broken(what: str, where: str = "", remedy: str = "") -> Iterator[None]:
    """Expect a RunError whose fields have these patterns."""
    with pytest.raises(RunError) as error:
        yield
    for pattern, field in ((what, error.value.what), (where, error.value.where), (remedy, error.value.remedy)):
        assert re.search(pattern, field), f"{pattern!r} is not in {field!r}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An own dataset: six images of shapes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})
    folder = shapes.make_shapes(tmp_path_factory.mktemp("data"), size=64)
    patch.undo()
    return folder


def forget(*names):
    """Remove datasets that are registered, so that a further run can register them."""
    for name in names:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def forget_datasets():
    yield
    forget(*OWN)


@pytest.fixture
def arguments(data, tmp_path):
    """Makes the command line of a tiny run; more KEY VALUE pairs as arguments."""
    save_config(detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6), tmp_path / "teacher.yaml")
    student = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6)
    cfg = distillation_config(
        student, "teacher.yaml", "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.BASE_LR", 0.001,
        "SOLVER.CHECKPOINT_PERIOD", 2, "DISTILL.LOG_PERIOD", 2, "SEED", 3,
    )  # fmt: skip
    path = save_config(cfg, tmp_path / "run.yaml")
    return lambda *opts, flags=(): [
        "--config-file", path, "--dataset", "own_train", str(data / "train.json"), str(data / "train"),
        "--dataset", "own_val", str(data / "val.json"), str(data / "val"), *flags, *map(str, opts),
    ]  # fmt: skip
