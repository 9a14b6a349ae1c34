"""The teacher that train_net.py measures before the first iteration."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog

import train_net
from acam_kd.d2 import add_distillation_config, register_coco_datasets
from acam_kd.d2.teacher_check import check_teacher

from .conftest import OWN, detector_config, forget, save_weights
from .running import run


@pytest.fixture
def known_teacher(arguments, tmp_path):
    """The weights of a teacher, which a run does not have to be able to learn from."""
    cfg = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6, "MODEL.WEIGHTS", "")
    return save_weights(cfg, tmp_path / "teacher.pth")


@pytest.mark.slow
def test_the_teacher_is_measured_before_the_first_iteration(arguments, known_teacher, tmp_path):
    def said(run, *opts, flags=()):
        before = (tmp_path / run / "log.txt").read_text() if (tmp_path / run / "log.txt").is_file() else ""
        train_net.main(train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / run, *opts, flags=flags)))
        forget(*OWN)
        lines = (tmp_path / run / "log.txt").read_text().removeprefix(before).splitlines()
        found = [n for n, line in enumerate(lines) if ": the teacher's AP on 3 of 3 images of own_val: " in line]
        start = next(n for n, line in enumerate(lines) if "Starting training" in line)
        assert all(n < start for n in found)
        return len(found)

    weights = ["DISTILL.TEACHER.WEIGHTS", known_teacher]
    assert said("run", *weights, "SOLVER.MAX_ITER", 1) == 1
    assert said("run", *weights, "SOLVER.MAX_ITER", 2, flags=["--resume"]) == 0
    assert said("random", "SOLVER.MAX_ITER", 1) == 0


def test_the_teacher_is_measured_where_it_knows_the_classes(data, known_teacher, tmp_path, arguments):
    """Its number is that of the evaluation of the same weights as a student."""
    register_coco_datasets([["own_val", str(data / "val.json"), str(data / "val")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(arguments()[1])
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", known_teacher, "OUTPUT_DIR", str(tmp_path)])
    found = check_teacher(cfg)
    assert found is not None and found >= 0
    other = cfg.clone()
    other.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASSES", "6"]
    assert check_teacher(other) == found
    for key, value in (("CHECK", False), ("WEIGHTS", "random")):
        other = cfg.clone()
        other.DISTILL.TEACHER[key] = value
        assert check_teacher(other) is None
    other = cfg.clone()
    other.MODEL.META_ARCHITECTURE, other.DISTILL.TEACHER.CONFIG_FILE = "RetinaNet", ""
    assert check_teacher(other) is None
    for kind, classes in (("coco", 2), ("lvis", 6)):
        MetadataCatalog.remove("own_val")
        MetadataCatalog.get("own_val").set(evaluator_type=kind, thing_classes=[*"abcdef"[:classes]])
        assert check_teacher(cfg) is None


def test_a_poor_teacher_is_a_warning(known_teacher, data, arguments, tmp_path, monkeypatch, caplog):
    register_coco_datasets([["own_val", str(data / "val.json"), str(data / "val")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(arguments()[1])
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", known_teacher])
    for poor, warned in ((101.0, 1), (-1.0, 0)):
        caplog.clear()
        monkeypatch.setattr("acam_kd.d2.teacher_check.POOR", poor)
        check_teacher(cfg)
        said = [r for r in caplog.records if r.levelname == "WARNING" and "INPUT.FORMAT belong" in r.getMessage()]
        assert len(said) == warned


def test_measuring_the_teacher_moves_nothing(arguments, known_teacher, tmp_path):
    states = []
    for check in (True, False):
        out = tmp_path / str(check)
        run(arguments("OUTPUT_DIR", out, "DISTILL.TEACHER.WEIGHTS", known_teacher, "DISTILL.TEACHER.CHECK", check,
                      "SOLVER.MAX_ITER", 1))  # fmt: skip
        states.append(torch.load(out / "model_final.pth", weights_only=False)["model"])
        forget(*OWN)
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
