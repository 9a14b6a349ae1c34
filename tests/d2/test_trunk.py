"""Files of torchvision's and timm's classifiers as MODEL.WEIGHTS."""

from __future__ import annotations

import logging
from collections import OrderedDict

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import get_model

from acam_kd.d2 import add_segmentation_config
from acam_kd.d2.trunk import load_classifier

from .conftest import NARROW, ROOT, TINY, detector_config, refused
from .test_segmentation import segmentor

RESNET = [
    "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 64,
    "MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53], "INPUT.FORMAT", "RGB",
]  # fmt: skip
DEPTHS = {18: 64, 50: 256}


def classifier(name, **more):
    torch.manual_seed(4)
    model = get_model(name, **more).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


def resnet_config(path, depth=18, *opts):
    given = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", DEPTHS[depth], "MODEL.WEIGHTS", str(path)]
    return detector_config("Base-RetinaNet.yaml", *RESNET, *given, *opts)


def mobilenet_config(path, *opts):
    names = ["MODEL.BACKBONE.NAME", "build_retinanet_mobilenetv2_fpn_backbone", "MODEL.MOBILENETV2.WIDTH_MULT", 0.25]
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs/Base-RetinaNet.yaml"))
    cfg.merge_from_list([*TINY, *NARROW, *names, "MODEL.WEIGHTS", str(path), *opts])
    return cfg


@pytest.mark.parametrize(
    ("depth", "norm", "order"), [(18, "FrozenBN", "RGB"), (18, "BN", "BGR"), (50, "FrozenBN", "BGR"), (50, "BN", "RGB")]
)
def test_a_resnet_gives_what_torchvisions_gives(depth, norm, order, tmp_path):
    theirs = classifier(f"resnet{depth}")
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "w.pth")
    cfg = resnet_config(tmp_path / "w.pth", depth, "MODEL.RESNETS.NORM", norm, "INPUT.FORMAT", order)
    model = build_model(cfg).eval()
    assert load_classifier(model, cfg)
    theirs, model, images = theirs.double(), model.double(), torch.rand(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        found = model.backbone.bottom_up(images if order == "RGB" else images.flip(1))
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for number in range(1, 5):
            x = getattr(theirs, f"layer{number}")(x)
            if f"res{number + 1}" in found:
                torch.testing.assert_close(found[f"res{number + 1}"], x)
    assert len(found) == 3


def test_log(tmp_path, caplog):
    torch.save(classifier("resnet18").state_dict(), tmp_path / "w.pth")
    for opts, level, words in (
        ([], logging.INFO, "MODEL.PIXEL_MEAN [123.675, 116.28, 103.53]"),
        (["INPUT.FORMAT", "BGR"], logging.WARNING, "torchvision's classifiers have [103.53, 116.28, 123.675]"),
        (["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], logging.WARNING, "MODEL.PIXEL_STD [1.0, 1.0, 1.0], INPUT.FORMAT RGB"),
    ):
        cfg = resnet_config(tmp_path / "w.pth", 18, *opts)
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="detectron2.acam_kd.trunk"):
            assert load_classifier(build_model(cfg), cfg)
        loaded, pixels = caplog.records
        assert "trunk loaded: all 100 tensors by name, 2 others unused, from " in loaded.getMessage()
        assert pixels.levelno == level and words in pixels.getMessage()
        assert ("turned from RGB to BGR" in loaded.getMessage()) == ("BGR" in opts)


@pytest.mark.parametrize("named", [True, False])
def test_a_mobilenet_by_name_or_by_order(named, tmp_path):
    theirs = classifier("mobilenet_v2", width_mult=0.25).state_dict()
    content = (
        theirs if named else OrderedDict((f"x{i}.{k.split('.')[-1]}", v) for i, (k, v) in enumerate(theirs.items()))
    )
    torch.save(content, tmp_path / "w.pth")
    cfg = mobilenet_config(tmp_path / "w.pth")
    model = build_model(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items() if "bottom_up" not in k}
    assert load_classifier(model, cfg)
    here = model.backbone.bottom_up.state_dict()
    turned = cfg.INPUT.FORMAT == "BGR"
    for key, value in here.items():
        wanted = theirs[key].flip(1) if key == "features.0.0.weight" and turned else theirs[key]
        assert torch.equal(value, wanted) or "num_batches" in key
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)


def test_what_is_left_to_detectron2(tmp_path):
    cfg = resnet_config(tmp_path / "w.pth")
    model = build_model(cfg)
    for name, state in (
        ("whole", model.state_dict()),
        ("ddp", {f"module.{k}": v for k, v in model.state_dict().items()}),
    ):
        torch.save({"model": state}, tmp_path / "w.pth")
        assert not load_classifier(model, cfg), name
    for weights in ("", "detectron2://ImageNetPretrained/MSRA/R-50.pkl", f"{tmp_path}/w.pth?matching_heuristics=True"):
        cfg.MODEL.WEIGHTS = weights
        assert not load_classifier(model, cfg)


def test_what_does_not_fit_is_said(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(classifier("resnet18").state_dict(), path)
    for cfg, argument, value, allowed in (
        (mobilenet_config(path), "MODEL.WEIGHTS", "and by order it has conv1.weight", "the weights of this trunk"),
        (resnet_config(path, 18, "MODEL.RESNETS.NORM", "GN"), "MODEL.RESNETS.NORM", "GN", "FrozenBN, BN or SyncBN"),
        (resnet_config(path, 50), "MODEL.WEIGHTS", "missing in the file: ", "the weights of this trunk"),
        (resnet_config(path, 50, "MODEL.RESNETS.STRIDE_IN_1X1", True), "MODEL.RESNETS.STRIDE_IN_1X1", "True", "False"),
    ):
        with refused(argument, value, allowed):
            load_classifier(build_model(cfg), cfg)
    torch.save(classifier("resnet18"), path)
    with refused("MODEL.WEIGHTS", "which holds Python objects"):
        load_classifier(build_model(resnet_config(path)), resnet_config(path))


def test_a_trunk_without_a_pyramid(tmp_path):
    theirs = classifier("resnet18").state_dict()
    torch.save(theirs, tmp_path / "w.pth")
    cfg = segmentor(
        "FPN", "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", *RESNET, "MODEL.RESNETS.DEPTH", 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_TYPE", "basic", "MODEL.RESNETS.RES5_DILATION", 1,
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["res2", "res3", "res4", "res5"], "MODEL.WEIGHTS", str(tmp_path / "w.pth"),
    )  # fmt: skip
    model = build_model(cfg)
    assert load_classifier(model, cfg)
    assert torch.equal(model.backbone.state_dict()["res5.0.shortcut.weight"], theirs["layer4.0.downsample.0.weight"])
