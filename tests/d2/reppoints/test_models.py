"""The four published networks, their schedule, and the parts of the backbone."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock, build_resnet_backbone

from acam_kd.d2 import add_distillation_config, add_segmentation_config
from acam_kd.d2.reppoints import DeformConv, EvalBatchNorm, build_reppoints_resnet_fpn_backbone

from ..conftest import ROOT, refused

DCN = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
NETS = {
    "r50": ("acam_reppoints_r50_r101.yaml", [], 36_849_078, 36_623_734),
    "r101": ("reppoints_r101.yaml", [], 55_841_206, 55_615_862),
    "r101 dcn": ("reppoints_r101.yaml", DCN, 57_127_378, 56_902_034),
    "x101 dcn": ("reppoints_x101dcn.yaml", [], 58_041_554, 57_826_194),
}
HEAD, NECK = 5_341_558, 7_999_488


def load(name, *opts):
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / name))
    cfg.merge_from_list(["MODEL.DEVICE", "meta", *opts])
    if cfg.MODEL.META_ARCHITECTURE == "DistillationMetaArch":
        cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    return cfg


def on_meta(name, *opts):
    with torch.device("meta"):
        return build_model(load(name, *opts))


def count(module, *, trained=False):
    """Parameters; scale and shift of a frozen normalisation are buffers here and parameters in the publication."""
    number = sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)
    frozen = [m for m in module.modules() if type(m) is FrozenBatchNorm2d]
    return number + (0 if trained else sum(m.weight.numel() + m.bias.numel() for m in frozen))


@pytest.mark.parametrize("net", NETS)
def test_it_has_the_published_number_of_parameters(net):
    name, opts, total, trained = NETS[net]
    model = on_meta(name, *opts)
    assert count(model) == total and count(model, trained=True) == trained
    assert count(model.head) == HEAD
    assert count(model.backbone.bottom_up) == total - HEAD - NECK


def test_without_normalisation_there_are_biases():
    model = on_meta("acam_reppoints_r50_r101.yaml", "MODEL.FPN.NORM", "", "MODEL.REPPOINTS.NORM", "")
    assert count(model) == 36_845_494 and count(model.head) == 5_340_022


def test_neck_and_head_are_alike_in_all_of_them():
    """So that they can be inherited."""
    shapes = [
        {name: x.shape for name, x in on_meta(net[0], *net[1]).state_dict().items() if "bottom_up" not in name}
        for net in NETS.values()
    ]
    assert all(each == shapes[0] for each in shapes[1:])


@pytest.mark.parametrize("name", ["reppoints_r101.yaml", "reppoints_x101dcn.yaml", "acam_reppoints_r50_x101dcn.yaml"])
def test_the_schedule_is_the_published_one(name):
    cfg = load(name)
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / 117266
    steps = [s * cfg.SOLVER.IMS_PER_BATCH / 117266 for s in cfg.SOLVER.STEPS]
    assert round(epochs, 2) == 24 and [round(s, 2) for s in steps] == [16, 22]
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.GAMMA) == (0.01, 0.9, 0.1)
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM) == (1e-4, 1e-4)
    assert (cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR, cfg.SOLVER.WARMUP_METHOD) == (500, 0.001, "linear")
    assert (cfg.INPUT.FORMAT, *cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN) == ("RGB", 800, 1333)
    assert (35 if name.startswith("acam") else 0) == cfg.DISTILL.MAX_GRADIENT_NORM
    assert cfg.MODEL.PIXEL_MEAN == [123.675, 116.28, 103.53] and cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]


def small(*opts):
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Base-RepPoints.yaml"))
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8,
        "MODEL.RESNETS.WIDTH_PER_GROUP", 4, "MODEL.FPN.OUT_CHANNELS", 64, *opts,
    ])  # fmt: skip
    return cfg


def test_a_new_deformable_net_is_the_plain_one_with_the_same_weights():
    """Its offsets start at zero; names are those of Detectron2."""
    plain_cfg, cfg = small(), small(*DCN)
    torch.manual_seed(0)
    plain = build_reppoints_resnet_fpn_backbone(plain_cfg, ShapeSpec(channels=3)).eval()
    deformable = build_reppoints_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).eval()
    missing, unexpected = deformable.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("conv2_offset" in name for name in missing)
    convs = [m for m in deformable.modules() if isinstance(m, DeformConv)]
    assert len(convs) == 4 + 6 + 3
    x = torch.rand(1, 3, 64, 64)
    for name, expected in plain(x).items():
        torch.testing.assert_close(deformable(x)[name], expected, rtol=1e-4, atol=1e-4)
    stock = small(*DCN, "MODEL.RESNETS.NORM", "FrozenBN")
    with torch.device("meta"):
        names = build_resnet_backbone(stock, ShapeSpec(channels=3)).state_dict()
    assert {k: v.shape for k, v in names.items()} == {k: v.shape for k, v in deformable.bottom_up.state_dict().items()}


@pytest.mark.parametrize("modulated", [False, True])
def test_a_deformable_net_trains_on_a_cpu(modulated):
    cfg = small(*DCN, "MODEL.RESNETS.DEFORM_MODULATED", modulated)
    backbone = build_reppoints_resnet_fpn_backbone(cfg, ShapeSpec(channels=3)).train()
    sum(x.square().sum() for x in backbone(torch.rand(1, 3, 64, 64)).values()).backward()
    blocks = [m for m in backbone.modules() if isinstance(m, DeformBottleneckBlock)]
    assert all(b.conv2.weight.grad.abs().sum() > 0 and b.conv2_offset.bias.grad.abs().sum() > 0 for b in blocks[:4])


def test_statistics_stay_and_scales_are_trained():
    backbone = build_reppoints_resnet_fpn_backbone(small(), ShapeSpec(channels=3)).train()
    norms = [m for m in backbone.modules() if isinstance(m, EvalBatchNorm)]
    frozen = [m for m in backbone.modules() if type(m) is FrozenBatchNorm2d]
    assert len(norms) == 42 and len(frozen) == 10  # the stem and res2
    before = {name: x.clone() for name, x in backbone.named_buffers()}
    sum(x.square().sum() for x in backbone(torch.rand(2, 3, 64, 64)).values()).backward()
    assert all(torch.equal(x, before[name]) for name, x in backbone.named_buffers())
    assert all(m.weight.grad.abs().sum() > 0 and m.bias.grad.abs().sum() > 0 for m in norms)


def test_fixed_statistics_are_those_of_a_frozen_net():
    torch.manual_seed(0)
    ours = build_reppoints_resnet_fpn_backbone(small(), ShapeSpec(channels=3))
    frozen = build_reppoints_resnet_fpn_backbone(small("MODEL.RESNETS.NORM", "FrozenBN"), ShapeSpec(channels=3))
    state = {k: torch.rand_like(v) + 0.5 if "norm" in k else v for k, v in ours.state_dict().items()}
    ours.load_state_dict(state)
    frozen.load_state_dict(state)
    x = torch.rand(1, 3, 64, 64)
    for name, expected in frozen(x).items():
        torch.testing.assert_close(ours(x)[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("TRANSFORM", "mean", "one of moment, minmax, partial_minmax"),
        ("NORM", "BN", "GN, or nothing"),
        ("CONVS_DIM", 48, "a multiple of 32 with NORM GN"),
        ("IOU_THRESHOLDS", [0.5, 0.4], "two of 0 to 1"),
        ("IOU_THRESHOLDS", [0.5], "two of 0 to 1"),
        ("POINTS_PER_OBJECT", 0, ">= 1"),
        ("POINT_SCALE", 0, "> 0"),
        ("SMOOTH_L1_LOSS_BETA", 0.0, "> 0"),
        ("IN_FEATURES", ["p3", "p9"], "levels of the backbone: p3, p4"),
        ("IN_FEATURES", [], "one level or more"),
        ("NUM_CLASSES", 0, ">= 1"),
    ],
)
def test_values_that_cannot_be_built_are_refused(key, value, allowed):
    cfg = small()
    cfg.MODEL.REPPOINTS[key] = value
    with refused(f"MODEL.REPPOINTS.{key}", allowed=allowed):
        build_model(cfg)
