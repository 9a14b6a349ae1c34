"""The segmentation networks' keys: what the student's file keeps of them, and what a teacher starts from."""

from __future__ import annotations

import pytest
import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.projects.deeplab import add_deeplab_config

from acam_kd.d2 import add_distillation_config, add_segmentation_config, exported_student_config, student_config
from acam_kd.d2.teacher import teacher_config

from .conftest import detector_config, distillation_config, inputs, save_config

TINY_MOBILENET = [
    "MODEL.BACKBONE.NAME", "build_retinanet_mobilenetv2_fpn_backbone", "MODEL.MOBILENETV2.WIDTH_MULT", 0.25,
    "MODEL.MOBILENETV2.OUT_FEATURES", ["res3", "res4", "res5"],
]  # fmt: skip


def plain(cfg):
    return yaml.safe_load(cfg.dump())


def test_a_plain_students_file_has_none_of_our_keys(retinanet, retinanet_teacher, tmp_path):
    cfg = distillation_config(retinanet, retinanet_teacher)
    before = cfg.dump()
    exported = exported_student_config(cfg)
    assert "MOBILENETV2" not in exported.MODEL and "POLY_LR_POWER" not in exported.SOLVER
    assert set(exported.MODEL.SEM_SEG_HEAD) == set(get_cfg().MODEL.SEM_SEG_HEAD)
    stock = get_cfg()
    stock.merge_from_file(save_config(exported, tmp_path / "student.yaml"))
    assert plain(stock) == plain(exported) and cfg.dump() == before


def test_our_students_file_loads_with_our_keys(retinanet, retinanet_teacher, tmp_path):
    cfg = distillation_config(
        retinanet, retinanet_teacher, *TINY_MOBILENET, "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE", "res4"
    )
    exported = exported_student_config(cfg)
    assert set(exported.MODEL.MOBILENETV2) == {"WIDTH_MULT", "OUT_FEATURES"}
    loaded = get_cfg()
    add_segmentation_config(loaded)
    loaded.merge_from_file(save_config(exported, tmp_path / "student.yaml"))
    assert plain(loaded) == plain(student_config(cfg))


def test_a_students_own_key_of_another_project_stays(retinanet, retinanet_teacher):
    cfg = distillation_config(retinanet, retinanet_teacher)
    cfg.MY_PROJECT = CfgNode({"WIDTH": 1})
    assert exported_student_config(cfg).MY_PROJECT.WIDTH == 1


@pytest.mark.parametrize("add", [add_segmentation_config, add_distillation_config])
def test_detectron2s_own_deeplab_can_be_configured(add):
    cfg = get_cfg()
    add(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "SemanticSegmentor", "meta"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SEM_SEG_HEAD.NAME = "build_resnet_deeplab_backbone", "DeepLabV3Head"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res4"]
    with torch.device("meta"):
        assert type(build_model(cfg).sem_seg_head).__name__ == "DeepLabV3Head"


def test_a_teachers_silence_means_the_defaults_not_the_students_values(retinanet, retinanet_teacher):
    """Its file is Detectron2's own and leaves our keys out."""
    cfg = distillation_config(
        retinanet, retinanet_teacher, *TINY_MOBILENET, "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE", "res4",
        "MODEL.RESNETS.RES4_DILATION", 2,
    )  # fmt: skip
    teacher = teacher_config(cfg)
    assert (teacher.MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE, teacher.MODEL.MOBILENETV2.WIDTH_MULT) == ("", 1.0)
    assert teacher.MODEL.RESNETS.RES4_DILATION == 1


def test_a_teachers_file_may_set_our_keys(retinanet, retinanet_teacher, tmp_path):
    written = exported_student_config(distillation_config(retinanet, retinanet_teacher, *TINY_MOBILENET))
    path = save_config(written, tmp_path / "mobilenet.yaml")
    teacher = teacher_config(distillation_config(retinanet, path))
    assert (teacher.MODEL.MOBILENETV2.WIDTH_MULT, teacher.MODEL.MOBILENETV2.NORM) == (0.25, "FrozenBN")


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
def test_a_step_of_a_mobilenet_distilled_from_a_resnet(retinanet, retinanet_teacher, storage, norm):
    cfg = distillation_config(retinanet, retinanet_teacher, *TINY_MOBILENET, "MODEL.MOBILENETV2.NORM", norm)
    model = build_model(cfg).train()
    assert list(model.distillation.levels) == ["p3", "p4", "p5", "p6", "p7"]
    losses = model(inputs())
    assert {"loss_cls", "loss_box_reg"} < set(losses) and any("acam" in name for name in losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        assert len(model.eval()(inputs())) == 2


def test_a_mobilenet_can_teach(retinanet, tmp_path, storage):
    teacher = get_cfg()
    add_segmentation_config(teacher)
    teacher.merge_from_other_cfg(detector_config("Base-RetinaNet.yaml"))
    teacher.merge_from_list(TINY_MOBILENET)
    losses = build_model(distillation_config(retinanet, save_config(teacher, tmp_path / "t.yaml"))).train()(inputs())
    assert all(loss.isfinite() for loss in losses.values())


def test_keys_that_are_there_keep_their_values():
    """Somebody's own DeepLab settings, made before ours are added."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.SOLVER.POLY_LR_POWER = 0.5
    add_distillation_config(cfg)
    assert cfg.SOLVER.POLY_LR_POWER == 0.5 and cfg.MODEL.MOBILENETV2.OUTPUT_STRIDE == 32


def test_keys_of_training_and_of_other_backbones_do_not_reach_the_students_file(tmp_path):
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.SOLVER.POLY_LR_POWER, cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.5, 0.75
    cfg.MODEL.MOBILENETV2.OUTPUT_STRIDE = 16
    (tmp_path / "student.yaml").write_text(exported_student_config(cfg).dump())
    get_cfg().merge_from_file(str(tmp_path / "student.yaml"))
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_backbone"
    assert exported_student_config(cfg).MODEL.MOBILENETV2 == {"OUTPUT_STRIDE": 16}
