"""Every YAML builds; the keys are the methods' arguments."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from acam_kd.compare import read_plan
from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.d2 import add_distillation_config
from acam_kd.methods import ACAMKD
from acam_kd.methods.recipes import RECIPES

from .conftest import ROOT, refused

NO_MODEL = ("Base-ACAM.yaml", "Base-ACAM-SemSeg.yaml")  # added to others
OTHERS = ("compare",)
CONFIGS = sorted(
    p for p in (ROOT / "configs").rglob("*.yaml") if p.name not in NO_MODEL and p.parent.name not in OTHERS
)
LEAVES = [p for p in CONFIGS if not p.name.startswith("Base-")]


def device_of(path):
    """The meta device, where nothing is computed and nothing is allocated; Detectron2's transformers cannot use it."""
    return "cpu" if re.search("swin|vitdet", path.name) else "meta"


def load(path):
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_it_builds(path):
    cfg = load(path)
    cfg.MODEL.DEVICE = "meta"
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    with torch.device(device_of(path)):
        model = build_model(cfg)
    if cfg.MODEL.META_ARCHITECTURE == "DistillationMetaArch" and cfg.DISTILL.METHOD:
        segments = cfg.DISTILL.STUDENT_META_ARCHITECTURE == "SemanticSegmentor"
        assert model.distillation.levels == {"logits": "logits"} if segments else len(model.distillation.levels) >= 4
        assert "+".join(type(method).__name__ for method in model.distillation.method.parts()) == cfg.DISTILL.METHOD


def on_meta(path, *opts):
    cfg = load(path)
    cfg.merge_from_list(list(opts))
    cfg.MODEL.DEVICE = "meta"
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    with torch.device("meta"):
        return build_model(cfg)


def test_methods_are_combined():
    distiller = on_meta(ROOT / "configs" / "pkd_dkd_r50_r101.yaml").distillation.method
    pkd, dkd = distiller.parts()
    assert (pkd.alpha, pkd.levels) == (6.0, ["p2", "p3", "p4", "p5"]) and (dkd.beta, dkd.levels) == (0.25, ["classes"])
    assert distiller.needs == ("labels",)


@pytest.mark.parametrize("path", LEAVES, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_it_opens_with_a_comment_and_its_true_command(path):
    text = path.read_text()
    assert text.startswith("# ")
    for named in re.findall(r"--config-file (\S+)", text):
        assert (ROOT / named) == path


@pytest.mark.parametrize("name", [name for name, _ in DISTILLER_REGISTRY])
def test_keys_are_the_constructors_arguments_and_open(name):
    cfg = get_cfg()
    add_distillation_config(cfg)
    parameters = inspect.signature(DISTILLER_REGISTRY.get(name)).parameters
    arguments = [p.upper() for p, v in parameters.items() if v.kind is inspect.Parameter.KEYWORD_ONLY]
    assert dict(cfg.DISTILL[name.upper()]) == dict.fromkeys([*arguments, "LEVELS", "TAPS"])


FAMILIES = {
    "retinanet": "acam_retinanet_r50_r101.yaml",
    "rcnn": "acam_r50_r101.yaml",
    "semseg": "acam_deeplabv3_r18_r101.yaml",
}


@pytest.mark.parametrize(
    ("family", "method", "levels"),
    [
        ("retinanet", "PKD", ["p3", "p4", "p5", "p6"]),
        ("retinanet", "FGD", ["p3", "p4", "p5", "p6", "p7"]),
        ("rcnn", "FGD", ["p2", "p3", "p4", "p5"]),
        ("rcnn", "MasKD", ["p2", "p3", "p4", "p5", "p6"]),
        ("semseg", "MGD", ["res5"]),
        ("semseg", "AT", ["res5"]),
        ("semseg", "CWD", ["logits"]),
    ],
)
def test_a_recipe_is_used_where_nothing_is_said(family, method, levels):
    built = on_meta(ROOT / "configs" / FAMILIES[family], "DISTILL.METHOD", method).distillation.method
    assert built.levels == levels
    for argument, value in RECIPES[method][family].arguments.items():
        if argument in ("alpha", "temperature", "lambda_mask"):
            assert getattr(built, argument, value) == value


def test_a_key_overrides_the_recipe():
    opts = ["DISTILL.METHOD", "PKD", "DISTILL.PKD.ALPHA", 2, "DISTILL.PKD.LEVELS", ["p4"]]
    built = on_meta(ROOT / "configs" / FAMILIES["rcnn"], *opts).distillation.method
    assert (built.alpha, built.levels) == (2.0, ["p4"])
    opts = ["DISTILL.METHOD", "PKD", "DISTILL.LEVELS", ["p3", "p4"]]
    built = on_meta(ROOT / "configs" / FAMILIES["rcnn"], *opts).distillation.method
    assert (built.alpha, built.levels) == (6.0, ["p3", "p4"])


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        (
            "configs/methods/pkd_rcnn.yaml",
            "set DISTILL.METHOD to PKD: the weights for each detector are recipes now",
        ),
        ("configs/ablations/uniform.yaml", "it is a row of configs/compare/ablations_coco.yaml now"),
    ],
)
def test_a_config_that_is_gone_says_what_to_write(path, hint, tmp_path):
    with refused("--config-file", "no file", "an existing one", hint):
        load(ROOT / path)
    (tmp_path / "c.yaml").write_text(f"_BASE_: [{ROOT / 'configs/acam_r50_r101.yaml'}, {ROOT / path}]\n")
    with refused("--config-file", "which does not exist", "existing files", hint):
        load(tmp_path / "c.yaml")


def test_the_plan_of_ablations_names_known_keys():
    (setting,) = read_plan(ROOT / "configs/compare/ablations_coco.yaml")
    assert len(setting.rows) == 12
    for row in setting.rows.values():
        on_meta(ROOT / "configs/acam_retinanet_r50_r101.yaml", *row)


def test_every_key_of_a_method_reaches_it():
    cfg = load(ROOT / "configs/quick_schedules/acam_instant.yaml")
    cfg.DISTILL.ACAMKD.merge_from_list(
        [
            "ALPHA",
            2.0,
            "LAMBDA_DIV",
            0.5,
            "NUM_MASKS",
            3,
            "MASK_GRADIENT",
            "full",
            "DIVERSITY",
            "ratio",
            "STANDARDIZE_FUSED",
            True,
            "QUERY",
            "student",
        ]
    )
    method = build_model(cfg).distillation.method
    assert isinstance(method, ACAMKD)
    assert (method.alpha, method.lambda_div, method.mask_gradient, method.diversity) == (2.0, 0.5, "full", "ratio")
    assert method.standardize_fused is True
    assert method.masking["spatial"]["p3"].units.shape[0] == 3 and method.fusion["p3"].query_from == "student"


def test_the_flagship_is_the_papers_schedule():
    cfg = load(ROOT / "configs/acam_r50_r101.yaml")
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / 117266
    steps = [s * cfg.SOLVER.IMS_PER_BATCH / 117266 for s in cfg.SOLVER.STEPS]
    assert round(epochs, 2) == 24 and [round(s, 2) for s in steps] == [16, 22]
    assert (cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR) == (0.9, 1e-4, 0.02)
    assert cfg.DISTILL.MAX_GRADIENT_NORM == 35 and cfg.DISTILL.ACAMKD.NUM_MASKS is None  # 6 on features
    assert load(ROOT / "configs/acam_retinanet_r50_r101.yaml").SOLVER.BASE_LR == 0.01


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deeplabv3_r101.yaml", 61_118_950),
        ("acam_deeplabv3_r18_r101.yaml", 13_607_974),
        ("acam_deeplabv3_mbv2_r101.yaml", 3_233_171),
        ("acam_pspnet_r18_r101.yaml", 12_919_334),
    ],
)
def test_the_segmentors_are_those_of_the_literature(name, parameters):
    """CIRKD's and MasKD's networks, with the auxiliary heads of training, and their recipe."""
    cfg = load(ROOT / "configs" / name)
    cfg.MODEL.DEVICE, cfg.DISTILL.TEACHER.WEIGHTS = "meta", "random"
    with torch.device("meta"):
        model = build_model(cfg)
    own = (p.numel() for name, p in model.named_parameters() if not name.startswith("distillation."))
    assert sum(own) == parameters
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (16, 40000, 0.02)
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM, cfg.SOLVER.BASE_LR_END) == (5e-4, 5e-4, 1e-4)
    assert [*cfg.INPUT.MIN_SIZE_TRAIN, *cfg.INPUT.CROP.SIZE] == [512, 2048, 512, 1024]
    if name != "deeplabv3_r101.yaml":
        assert model.distillation.method.masking["spatial"]["logits"].units.shape == (19, 19)
