"""MobileNetV2 and the dilated ResNets: shapes, counts, the à trous identity, pretrained files, frozen parts."""

from __future__ import annotations

import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone, build_model
from torch import nn

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import add_segmentation_config

NARROW_RESNET = [
    "MODEL.RESNETS.STEM_OUT_CHANNELS", 8, "MODEL.RESNETS.RES2_OUT_CHANNELS", 8, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.NORM", "BN",
    "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"],
]  # fmt: skip
DILATIONS = {32: (1, 1), 16: (1, 2), 8: (2, 4)}
RES5 = ["MODEL.MOBILENETV2.OUT_FEATURES", ["res5"], "MODEL.RESNETS.OUT_FEATURES", ["res5"]]


def config(name, *opts):
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "cpu", name, 0
    cfg.merge_from_list(list(opts))
    return cfg


def mobilenet(stride=32, *opts):
    opts = ("MODEL.MOBILENETV2.WIDTH_MULT", 0.25, "MODEL.MOBILENETV2.NORM", "BN", *opts)
    return build_backbone(config("build_mobilenetv2_backbone", "MODEL.MOBILENETV2.OUTPUT_STRIDE", stride, *opts))


def resnet(stride=32, depth=18, *opts):
    res4, res5 = DILATIONS[stride]
    opts = ("MODEL.RESNETS.RES4_DILATION", res4, "MODEL.RESNETS.RES5_DILATION", res5, *opts)
    return build_backbone(config("build_dilated_resnet_backbone", *NARROW_RESNET, "MODEL.RESNETS.DEPTH", depth, *opts))


def settle(*nets):
    """The same random weights and statistics for all, in float64 and eval mode."""
    draw = torch.Generator().manual_seed(3)
    for norm in (m for m in nets[0].modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.copy_(0.1 * torch.randn(norm.num_features, generator=draw))
        norm.running_var.copy_(0.5 + torch.rand(norm.num_features, generator=draw))
    for net in nets:
        net.load_state_dict(nets[0].state_dict())
        net.double().eval()


def count(net):
    return sum(p.numel() for p in net.parameters())


def meta(name, *opts):
    with torch.device("meta"):
        return build_backbone(config(name, *RES5, *opts))


def test_mobilenets_trunk_has_its_parameters():
    net = meta("build_mobilenetv2_backbone", "MODEL.MOBILENETV2.NORM", "BN")
    assert count(net) == 1_811_712
    blocks = [count(block) for block in net.features]
    assert blocks == [928, 896, 5136, 8832, 10000, *[14848] * 2, 21056, *[54272] * 3, 66624, *[118272] * 2, 155264,
                      *[320000] * 2, 473920]  # fmt: skip


@pytest.mark.parametrize(("depth", "width", "expected"), [(18, 64, 11_324_992), (101, 256, 42_623_936)])
def test_resnets_with_the_deep_stem_have_their_parameters(depth, width, expected):
    opts = ("MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 128, "MODEL.RESNETS.DEPTH", depth)
    assert count(meta("build_dilated_resnet_backbone", *opts, "MODEL.RESNETS.RES2_OUT_CHANNELS", width)) == expected


@pytest.mark.parametrize("stride", [32, 16, 8])
def test_mobilenets_outputs_are_as_declared(stride):
    net = mobilenet(stride, "MODEL.MOBILENETV2.OUT_FEATURES", ["stem", "res2", "res3", "res4", "res5"]).eval()
    outputs = net(torch.zeros(1, 3, 64, 96))
    assert list(outputs) == ["stem", "res2", "res3", "res4", "res5"]
    strides = [min(s, stride) for s in (2, 4, 8, 16, 32)]
    for (name, out), expected in zip(outputs.items(), strides):
        shape = net.output_shape()[name]
        assert shape.stride == expected and out.shape == (1, shape.channels, 64 // expected, 96 // expected)
    assert net.size_divisibility == 0 and net.padding_constraints == {"size_divisibility": stride}


def test_mobilenets_channels_at_full_width():
    with torch.device("meta"):
        shapes = build_backbone(config("build_mobilenetv2_backbone")).output_shape()
    assert {k: (s.channels, s.stride) for k, s in shapes.items()} == {
        "res2": (24, 4), "res3": (32, 8), "res4": (96, 16), "res5": (320, 32)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("stride", "expected"),
    [
        (16, [(2, 1), (1, 1), (2, 1), (1, 1), (1, 1), (2, 1), *[(1, 1)] * 6, (1, 1), *[(1, 2)] * 3]),
        (8, [(2, 1), (1, 1), (2, 1), (1, 1), (1, 1), (1, 1), *[(1, 2)] * 6, (1, 2), *[(1, 4)] * 3]),
    ],
)
def test_mobilenets_strides_and_dilations_are_the_literatures(stride, expected):
    net = mobilenet(stride)
    depthwise = [m for m in net.features[2:].modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [(m.stride[0], m.dilation[0]) for m in depthwise] == expected
    assert all(m.padding == m.dilation for m in depthwise)
    assert [b.use_res_connect for b in net.features[1:]] == [b.use_res_connect for b in mobilenet().features[1:]]


def test_blocks_that_no_output_needs_are_left_out():
    net = mobilenet(16, "MODEL.MOBILENETV2.OUT_FEATURES", ["res3", "res2"])
    assert len(net.features) == 7 and net.padding_constraints == {"size_divisibility": 8}
    net(torch.zeros(2, 3, 32, 32))["res3"].sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("size", [(64, 96), (75, 91)])
@pytest.mark.parametrize("stride", [16, 8])
@pytest.mark.parametrize("build", [mobilenet, resnet, lambda s: resnet(s, 50), lambda s: resnet(
    s, 50, "MODEL.RESNETS.STRIDE_IN_1X1", True)], ids=["mobilenet", "basic", "bottleneck", "stride_in_1x1"])  # fmt: skip
def test_a_dilated_net_is_the_strided_one_with_the_cells_between_filled_in(build, stride, size):
    """Exactly, borders too: which shows every kernel's place, and that the same checkpoints fit."""
    strided, dilated = build(32), build(stride)
    assert list(strided.state_dict()) == list(dilated.state_dict())
    settle(strided, dilated)
    image = torch.randn(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, coarse in strided(image).items():
            step = strided.output_shape()[name].stride // dilated.output_shape()[name].stride
            fine = dilated(image)[name]
            assert fine.shape[-2] == -(-size[0] // dilated.output_shape()[name].stride)
            torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-10, atol=1e-10)
    assert step == 32 // stride


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_undilated_resnets_have_detectron2s_names(depth):
    width = 64 if depth < 50 else 256
    opts = ["MODEL.RESNETS.DEPTH", depth, "MODEL.RESNETS.RES2_OUT_CHANNELS", width, "MODEL.RESNETS.STEM_TYPE", "basic"]
    ours, theirs = (
        meta(name, *opts).state_dict() for name in ("build_dilated_resnet_backbone", "build_resnet_backbone")
    )
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_resnets_first_blocks_have_half_the_dilation():
    for depth, conv in ((18, "conv1"), (50, "conv2")):
        net = resnet(8, depth)
        assert [[getattr(b, conv).dilation[0] for b in stage][:2] for stage in net.stages[2:]] == [[1, 2], [2, 4]]
    assert [b.conv2.dilation[0] for b in resnet(8).res4] == [2, 2]
    assert {k: s.stride for k, s in resnet(8, 18, "MODEL.RESNETS.OUT_FEATURES", ["res3", "res5"]).output_shape().items()
            } == {"res3": 8, "res5": 8}  # fmt: skip


@pytest.mark.parametrize("build", [mobilenet, resnet], ids=["mobilenet", "resnet"])
@pytest.mark.parametrize("freeze_at", [0, 1, 2, 5])
def test_frozen_stages_have_no_gradients_and_frozen_norms(build, freeze_at):
    net = build(32, *([] if build is mobilenet else [18]), "MODEL.BACKBONE.FREEZE_AT", freeze_at, *RES5)
    if build is mobilenet:
        stages = [net.features[a:b] for a, b in [(0, 2), (2, 4), (4, 7), (7, 14), (14, 18)]]
    else:
        stages = [net.stem, *net.stages]
    for number, stage in enumerate(stages, start=1):
        assert all(p.requires_grad == (number > freeze_at) for p in stage.parameters())
        kind = FrozenBatchNorm2d if number <= freeze_at else nn.BatchNorm2d
        norms = [m for m in stage.modules() if "BatchNorm" in type(m).__name__]
        assert norms and all(isinstance(m, kind) for m in norms)


def test_detectron2s_default_freezes_stem_and_res2():
    cfg = get_cfg()
    add_segmentation_config(cfg)
    net = BACKBONE_REGISTRY.get("build_mobilenetv2_backbone")(cfg, ShapeSpec(channels=3))
    assert [all(p.requires_grad for p in b.parameters()) for b in net.features] == [False] * 4 + [True] * 14


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@pytest.mark.parametrize("place", ["backbone", "backbone.bottom_up"])
def test_torchvisions_imagenet_file_arrives_whole(tmp_path, norm, place):
    """Through MODEL.WEIGHTS with the query that Detectron2 itself has for foreign names; without it see test_trunk.py."""
    torch.manual_seed(5)
    there = torchvision.models.mobilenet_v2(width_mult=0.25)
    torch.save(there.state_dict(), tmp_path / "mobilenet_v2.pth")
    fpn = place.endswith("bottom_up")
    cfg = config(
        "build_mobilenetv2_fpn_backbone" if fpn else "build_mobilenetv2_backbone",
        "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.MOBILENETV2.WIDTH_MULT", 0.25,
        "MODEL.MOBILENETV2.NORM", norm, "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.SEM_SEG_HEAD.NORM", "BN",
        "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.CONVS_DIM", 8,
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.IN_FEATURES", ["p2", "p3", "p4", "p5"] if fpn else ["res5"],
    )  # fmt: skip
    model = build_model(cfg)
    DetectionCheckpointer(model).load(f"{tmp_path / 'mobilenet_v2.pth'}?matching_heuristics=True")
    here, there = model.state_dict(), there.state_dict()
    wanted = [k for k in there if k.startswith("features.") and not k.startswith("features.18.")]
    if norm == "FrozenBN":
        wanted = [k for k in wanted if "num_batches" not in k]
    assert len(wanted) > 200
    assert all(torch.equal(here[f"{place}.{k}"], there[k]) for k in wanted)
    assert {k for k in here if k.startswith(f"{place}.features")} == {f"{place}.{k}" for k in wanted}


STAGES = "some of stem, res2, res3, res4, res5"


@pytest.mark.parametrize(
    ("name", "opts", "value", "allowed"),
    [
        ("mobilenetv2", ["MODEL.MOBILENETV2.OUTPUT_STRIDE", 4], 4, "one of 32, 16, 8"),
        ("mobilenetv2", ["MODEL.MOBILENETV2.NORM", "GN"], "GN", "one of FrozenBN, BN, SyncBN, naiveSyncBN"),
        ("mobilenetv2", ["MODEL.MOBILENETV2.WIDTH_MULT", 0.0], 0.0, "> 0"),
        ("mobilenetv2", ["MODEL.MOBILENETV2.OUT_FEATURES", ["p2"]], ["p2"], STAGES),
        ("mobilenetv2", ["MODEL.PIXEL_MEAN", [0.0]], "[0.0], which is 1 channels", "3 channels, the images of MobileNetV2"),
        ("dilated_resnet", ["MODEL.RESNETS.DEPTH", 20], 20, "one of 18, 34, 50, 101, 152"),
        ("dilated_resnet", ["MODEL.RESNETS.RES4_DILATION", 2], "2 with MODEL.RESNETS.RES5_DILATION 1",
         "1 with 1 (output stride 32), 1 with 2 (16) or 2 with 4 (8)"),
        ("dilated_resnet", ["MODEL.RESNETS.STEM_TYPE", "deep"], "deep", "one of basic, deeplab"),
        ("dilated_resnet", ["MODEL.RESNETS.OUT_FEATURES", ["res6"]], ["res6"], STAGES),
        ("dilated_resnet", ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [True] * 4], [True] * 4,
         "False for every stage of build_dilated_resnet_backbone"),
        ("dilated_resnet", ["MODEL.RESNETS.NUM_GROUPS", 2, "MODEL.RESNETS.DEPTH", 18], 2, "1 for depth 18"),
    ],
)  # fmt: skip
def test_wrong_values_are_named_with_their_key(name, opts, value, allowed):
    with torch.device("meta"), pytest.raises(ConfigError) as error:
        build_backbone(config(f"build_{name}_backbone", *opts))
    assert (error.value.argument, error.value.value, error.value.allowed) == (opts[0], value, allowed)
