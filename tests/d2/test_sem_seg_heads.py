"""The heads of the Cityscapes benchmark: parameter counts, losses by hand, shapes, what a user can get wrong."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from torch import nn

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import add_segmentation_config
from acam_kd.d2.sem_seg_heads import ASPPHead, PSPHead, segmentation_loss

SHAPES = {"res4": ShapeSpec(channels=8, stride=8), "res5": ShapeSpec(channels=12, stride=8)}
HEADS = [ASPPHead, PSPHead]
RESNET = [
    "MODEL.BACKBONE.NAME", "build_dilated_resnet_backbone", "MODEL.RESNETS.STEM_OUT_CHANNELS", 128,
    "MODEL.RESNETS.NORM", "BN", "MODEL.RESNETS.STRIDE_IN_1X1", False, "MODEL.RESNETS.RES4_DILATION", 2,
    "MODEL.RESNETS.RES5_DILATION", 4, "MODEL.RESNETS.OUT_FEATURES", ["res4", "res5"],
]  # fmt: skip
NETS = {
    "R18": [*RESNET, "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64],
    "R101": [*RESNET, "MODEL.RESNETS.DEPTH", 101],
    "MBV2": [
        "MODEL.BACKBONE.NAME", "build_mobilenetv2_backbone", "MODEL.MOBILENETV2.NORM", "BN",
        "MODEL.MOBILENETV2.OUTPUT_STRIDE", 8, "MODEL.MOBILENETV2.OUT_FEATURES", ["res4", "res5"],
    ],
    "tiny": [
        "MODEL.BACKBONE.NAME", "build_mobilenetv2_backbone", "MODEL.MOBILENETV2.NORM", "BN",
        "MODEL.MOBILENETV2.OUTPUT_STRIDE", 8, "MODEL.MOBILENETV2.OUT_FEATURES", ["res4", "res5"],
        "MODEL.MOBILENETV2.WIDTH_MULT", 0.25,
    ],
}  # fmt: skip


def config(net, head, dims, *opts):
    cfg = get_cfg()
    add_segmentation_config(cfg)
    node = cfg.MODEL.SEM_SEG_HEAD
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.DEVICE = "SemanticSegmentor", 0, "cpu"
    node.NAME, node.IN_FEATURES, node.NUM_CLASSES, node.NORM = head, ["res5"], 19, "BN"
    node.CONVS_DIM, node.ASPP_DILATIONS = dims, [12, 24, 36]
    cfg.merge_from_list([*NETS[net], *opts])
    return cfg


def make(head, **changes):
    arguments = {"in_features": ["res5"], "num_classes": 3, "conv_dims": 8, "norm": "BN", **changes}
    if head is ASPPHead:
        arguments["dilations"] = (1, 2, 3)
    torch.manual_seed(2)
    return head(SHAPES, **arguments)


def features(n=2, size=(6, 9)):
    draw = torch.Generator().manual_seed(4)
    return {k: torch.randn(n, s.channels, *size, generator=draw, requires_grad=True) for k, s in SHAPES.items()}


def labels(n=2, size=(48, 72)):
    out = torch.randint(0, 3, (n, *size), generator=torch.Generator().manual_seed(5))
    out[:, :5] = 255
    return out


@pytest.mark.parametrize(
    ("net", "head", "dims", "aux", "expected"),
    [
        ("R101", "ASPPHead", 256, "", 58_754_259),
        ("R101", "ASPPHead", 256, "res4", 61_118_950),
        ("R18", "ASPPHead", 128, "", 13_459_155),
        ("R18", "ASPPHead", 128, "res4", 13_607_974),
        ("MBV2", "ASPPHead", 128, "", 3_233_171),
        ("R101", "PSPHead", 512, "", 65_707_475),
        ("R101", "PSPHead", 512, "res4", 68_072_166),
        ("R18", "PSPHead", 128, "", 12_770_515),
        ("R18", "PSPHead", 128, "res4", 12_919_334),
        ("MBV2", "PSPHead", 128, "", 2_654_739),
    ],
)
def test_whole_networks_have_the_benchmarks_parameters(net, head, dims, aux, expected):
    cfg = config(net, head, dims, "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE", aux, "MODEL.DEVICE", "meta")
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(cfg).parameters()) == expected


@pytest.mark.parametrize("head", HEADS)
def test_logits_at_the_features_size_and_results_at_the_images(head):
    made = make(head).eval()
    seen = []
    made.predictor.register_forward_hook(lambda m, a, out: seen.append(out))
    results, losses = made(features())
    logits = made.layers(features())
    assert logits.shape == (2, 3, 6, 9) and results.shape == (2, 3, 48, 72) and losses == {}
    assert made.common_stride == 8 and torch.equal(seen[0], logits)
    for corner in ((0, 0), (0, -1), (-1, 0), (-1, -1)):  # corners on corners
        torch.testing.assert_close(results[(..., *corner)], logits[(..., *corner)])


@pytest.mark.parametrize("head", ["ASPPHead", "PSPHead"])
@pytest.mark.parametrize("stride", [16, 8])
def test_in_detectron2s_segmentor(head, stride):
    """Images that no stride divides; every parameter gets a gradient; evaluation leaves no trace."""
    opts = ["MODEL.MOBILENETV2.OUTPUT_STRIDE", stride, "MODEL.SEM_SEG_HEAD.AUX_IN_FEATURE", "res4"]
    model = build_model(config("tiny", head, 8, *opts)).train()
    image = torch.randint(0, 256, (3, 40, 51), generator=torch.Generator().manual_seed(6), dtype=torch.uint8)
    inputs = [{"image": image, "sem_seg": labels(1, (40, 51))[0], "height": 80, "width": 102}] * 2
    losses = model(inputs)
    assert set(losses) == {"loss_sem_seg", "loss_sem_seg_aux"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        results = model.eval()(inputs)
    assert [r["sem_seg"].shape for r in results] == [(19, 80, 102)] * 2
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_the_loss_by_hand():
    """Two cells in a row become three pixels: the middle one is their mean; the last is ignored."""
    logits = torch.tensor([[[[0.0, 2.0]], [[1.0, -1.0]]]])
    targets = torch.tensor([[[0, 1, 255]]])
    rows = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    expected = -(rows[0].log_softmax(0)[0] + rows[1].log_softmax(0)[1]) / 2
    torch.testing.assert_close(segmentation_loss(logits, targets, 255), expected)


def test_the_loss_is_torchs_mean_over_counted_pixels():
    logits = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(7))
    scaled = F.interpolate(logits, size=(48, 72), mode="bilinear", align_corners=True)
    expected = F.cross_entropy(scaled, labels(), ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, labels(), 255), expected)


@pytest.mark.parametrize("head", HEADS)
def test_nothing_to_count_is_zero_with_a_graph(head):
    made = make(head, aux_in_feature="res4").train()
    _, losses = made(features(), torch.full((2, 48, 72), 255))
    assert all(loss == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_the_losses_and_the_ignored_label(head):
    def losses(**changes):
        torch.manual_seed(8)
        made = make(head, aux_in_feature="res4", **changes).train()
        torch.manual_seed(9)  # dropout
        return made(features(), labels())[1]

    plain, changed = losses(), losses(loss_weight=2.0, aux_loss_weight=1.0)
    torch.testing.assert_close(changed["loss_sem_seg"], 2 * plain["loss_sem_seg"])
    torch.testing.assert_close(changed["loss_sem_seg_aux"], 2 / 0.4 * plain["loss_sem_seg_aux"])
    ignoring = make(head, ignore_value=1).train()
    assert ignoring(features(), torch.ones(2, 48, 72, dtype=torch.int64))[1]["loss_sem_seg"] == 0


@pytest.mark.parametrize("head", HEADS)
def test_the_auxiliary_classifier_is_trained_but_not_evaluated(head):
    made = make(head, aux_in_feature="res4")
    calls = []
    made.auxiliary.register_forward_hook(lambda *a: calls.append(1))
    made.eval()(features())
    assert not calls
    made.train()(features(), labels())
    assert calls and made.auxiliary[0].out_channels == 2
    assert make(head).auxiliary is None


@pytest.mark.parametrize("head", HEADS)
def test_autocast_and_gradients_of_the_input(head):
    made, given = make(head, aux_in_feature="res4").train(), features()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = made(given, labels())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() and x.grad.abs().sum() > 0 for x in given.values())


def test_psp_pools_means_and_keeps_the_feature():
    head = make(PSPHead, norm="").eval()
    x = features()["res5"]
    out = head.context(x)
    assert torch.equal(out[:, :12], x) and out.shape[1] == 12 + 4 * 3
    expected = F.relu(head.context.branches[0](x.mean((2, 3), keepdim=True))).expand(-1, -1, 6, 9)
    torch.testing.assert_close(out[:, 12:15], expected)


def test_aspp_has_the_dilations_and_both_dropouts():
    cfg = config("tiny", "ASPPHead", 8)
    head = SEM_SEG_HEADS_REGISTRY.get("ASPPHead")(cfg, SHAPES)
    assert [b.dilation[0] for b in head.context.branches] == [1, 12, 24, 36]
    assert [b.padding[0] for b in head.context.branches] == [0, 12, 24, 36]
    assert (head.context.dropout.p, head.dropout.p) == (0.5, 0.1)
    assert all(c.bias is None for c in head.context.modules() if isinstance(c, nn.Conv2d))


@pytest.mark.parametrize("head", HEADS)
def test_one_image_alone_needs_another_norm(head):
    with pytest.raises(ConfigError) as error:
        make(head).train()(features(1), labels(1))
    assert error.value.argument == "SOLVER.IMS_PER_BATCH" and error.value.value == "1 image per process"
    assert "at least 2 images" in error.value.allowed and "MODEL.SEM_SEG_HEAD.NORM to GN" in error.value.hint
    make(head).eval()(features(1))
    for norm in ("", "FrozenBN"):
        make(head, norm=norm).train()(features(1), labels(1))


@pytest.mark.parametrize(
    ("changes", "key", "value"),
    [
        ({"in_features": ["res4", "res5"]}, "IN_FEATURES", "res4, res5"),
        ({"in_features": ["p3"]}, "IN_FEATURES", "p3"),
        ({"in_features": []}, "IN_FEATURES", ""),
        ({"aux_in_feature": "res3"}, "AUX_IN_FEATURE", "res3"),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_features_that_do_not_exist_are_named(head, changes, key, value):
    with pytest.raises(ConfigError) as error:
        make(head, **changes)
    assert error.value.argument == f"MODEL.SEM_SEG_HEAD.{key}" and error.value.value == value
    assert error.value.allowed == "one of res4, res5"


def test_other_errors_are_named():
    with pytest.raises(ConfigError) as error:
        ASPPHead(SHAPES, in_features=["res5"], num_classes=3, conv_dims=8, norm="BN", dilations=(1, 2))
    assert error.value.argument == "MODEL.SEM_SEG_HEAD.ASPP_DILATIONS" and error.value.value == [1, 2]
    with pytest.raises(ConfigError) as error:
        make(PSPHead).train()(features())
    assert error.value.argument == "DATASETS.TRAIN" and "sem_seg" in error.value.value
