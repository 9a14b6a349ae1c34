"""Models by name, the criterion of segmentation, pyramids."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch.nn import functional as F  # noqa: N812

from acam_kd.core import BACKBONE, LOGITS
from acam_kd.core.errors import ConfigError, RunError
from acam_kd.tv.adapter import adapt
from acam_kd.tv.distillation import normalized_batch
from acam_kd.tv.models import build_model, plain
from acam_kd.tv.norms import SingleValueGroupNorm
from acam_kd.tv.segmentation import Segmentor

IMAGES = [torch.rand(3, 70, 96), torch.rand(3, 96, 64)]
DETECTORS = [
    ("retinanet_resnet18_fpn32", [8, 16, 32, 64, 128]),
    ("fcos_mobilenet_v3_small_fpn64", [8, 16, 32, 64, 128]),
    ("fasterrcnn_resnet18_fpn32", [4, 8, 16, 32, 64]),
    ("maskrcnn_mobilenet_v2_fpn32", [4, 8, 16, 32, 64]),
    ("ssdlite320_mobilenet_v3_large", [16, 32, 64, 107, 160, 320]),
]
SEGMENTORS = [
    ("deeplabv3_mobilenet_v3_large", [16, 16]),  # the last is that of the logits
    ("lraspp_mobilenet_v3_large", [8, 16, 8]),
    ("fcn_resnet50", [8, 8]),
]


def targets(kind):
    if kind == "semantic":
        return [{"semantic": torch.randint(0, 4, image.shape[1:])} for image in IMAGES]
    boxes = torch.tensor([[5.0, 5, 50, 50], [10, 20, 60, 60]])
    made = [{"boxes": boxes, "labels": torch.tensor([1, 3])} for _ in IMAGES]
    if kind == "masks":
        for target, image in zip(made, IMAGES):
            target["masks"] = torch.ones(2, *image.shape[1:], dtype=torch.uint8)
    return made


@pytest.mark.slow
@pytest.mark.parametrize(("name", "strides"), DETECTORS)
def test_a_detector_gives_losses_and_detections(name, strides):
    model = build_model(name, num_classes=4, size=64)
    losses = model(IMAGES, targets("masks" if name.startswith("mask") else "boxes"))
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert [spec.stride for spec in adapt(model).levels((BACKBONE,)).values()] == strides
    assert model.training and model.backbone.training
    assert {"boxes", "labels", "scores"} <= model.eval()(IMAGES)[0].keys()


@pytest.mark.parametrize(("name", "strides"), SEGMENTORS)
def test_a_segmentation_model_has_its_criterion_here(name, strides):
    model = build_model(name, num_classes=4, size=64)
    losses = model(IMAGES, targets("semantic"))
    assert ("loss_auxiliary" in losses) == (name != "lraspp_mobilenet_v3_large")
    torch.stack(list(losses.values())).sum().backward()
    assert [spec.stride for spec in adapt(model).levels((BACKBONE, LOGITS)).values()] == strides
    for output, image in zip(model.eval()(IMAGES), IMAGES):
        assert output["semantic"].shape == image.shape[1:] and output["semantic"].max() < 4


class Fixed(torch.nn.Module):
    """A network whose logits are its parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.backbone = torch.nn.Parameter(logits), torch.nn.Identity()

    def forward(self, batch):
        return {"out": self.logits, "aux": self.logits}


def test_the_loss_is_the_mean_over_pixels_that_count():
    logits, labels = torch.randn(1, 3, 4, 5), torch.randint(0, 3, (4, 5))
    labels[0] = 255
    losses = Segmentor(Fixed(logits))([torch.rand(3, 4, 5)], [{"semantic": labels}])
    wanted = F.cross_entropy(logits, labels[None], ignore_index=255)
    torch.testing.assert_close(losses["loss_segmentation"], wanted)
    torch.testing.assert_close(losses["loss_auxiliary"], 0.5 * wanted)


def test_an_image_without_labels_that_count_gives_zero_and_not_nan():
    model = Segmentor(Fixed(torch.randn(1, 3, 4, 5)))
    losses = model([torch.rand(3, 4, 5)], [{"semantic": torch.full((4, 5), 255)}])
    losses["loss_segmentation"].backward()
    assert losses["loss_segmentation"] == 0 and not model.network.logits.grad.any()


def test_padding_is_ignored_in_the_loss():
    """Labels of the padded part are IGNORED, so predictions there change nothing."""
    images, labels = [torch.rand(3, 4, 4), torch.rand(3, 8, 8)], [torch.zeros(4, 4).long(), torch.zeros(8, 8).long()]
    logits = torch.randn(2, 3, 8, 8)
    first = Segmentor(Fixed(logits.clone()))(images, [{"semantic": x} for x in labels])
    logits[0, :, 4:] = 50 * torch.randn(3, 4, 8)
    logits[0, :, :, 4:] = 50 * torch.randn(3, 8, 4)
    second = Segmentor(Fixed(logits))(images, [{"semantic": x} for x in labels])
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_a_composed_model_is_torchvisions_own(name, monkeypatch):
    """Built by this project, it has exactly the tensors of torchvision's model of that name."""
    monkeypatch.setattr("acam_kd.tv.models.DETECTION", set())
    ours = build_model(name, num_classes=5)
    theirs = torchvision.models.get_model(name, num_classes=5, weights_backbone=None)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert type(ours) is type(theirs)
    assert [t.shape for t in ours.backbone(torch.zeros(1, 3, 64, 64)).values()] == [
        t.shape for t in theirs.backbone(torch.zeros(1, 3, 64, 64)).values()
    ]


def test_a_pyramid_may_have_batch_normalisation():
    fpn = build_model("fcos_resnet18_fpn64_bn", num_classes=2).backbone.fpn
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in fpn.modules()) == 6
    assert not any(
        isinstance(m, torch.nn.BatchNorm2d)
        for m in build_model("fcos_resnet18_fpn64", num_classes=2).backbone.fpn.modules()
    )


@pytest.mark.parametrize("name", ["ssdlite320_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large"])
def test_what_is_saved_loads_in_plain_torchvision(name):
    state = plain(build_model(name, num_classes=5)).state_dict()
    extra = {"aux_loss": True} if name.startswith("deeplab") else {}
    torchvision.models.get_model(name, num_classes=5, weights_backbone=None, **extra).load_state_dict(state)


@pytest.mark.parametrize("training", [True, False])
def test_fcos_with_one_channel_per_group_takes_one_small_image(training):
    """Its coarsest map is one pixel, which torch's own group norm refuses of one image and takes of two."""
    torch.manual_seed(0)
    model = build_model("fcos_mobilenet_v2_fpn32", num_classes=4, size=64).train(training)
    image, target = torch.rand(3, 64, 64), {"boxes": torch.tensor([[4.0, 4, 40, 40]]), "labels": torch.tensor([1])}
    if training:
        assert all(loss.isfinite() for loss in model([image], [target]).values())
        return
    one, (first, second) = model([image])[0], model([image, image])
    for name, found in one.items():
        torch.testing.assert_close(found, first[name])
        torch.testing.assert_close(first[name], second[name])


def test_a_group_norm_is_torchs_own_and_one_value_becomes_the_bias():
    norm = SingleValueGroupNorm(2, 4)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 4, 2, 5)
    assert torch.equal(norm(x), F.group_norm(x, 2, norm.weight, norm.bias, norm.eps))
    single = SingleValueGroupNorm(4, 4)
    torch.nn.init.normal_(single.bias)
    torch.testing.assert_close(single(torch.randn(1, 4, 1, 1)).flatten(), single.bias)


def test_mobilenet_v2_is_tapped_at_the_last_block_of_each_stride():
    body = build_model("fasterrcnn_mobilenet_v2_fpn", num_classes=2).backbone.body
    assert [x.shape[1] for x in body(torch.zeros(1, 3, 64, 64)).values()] == [24, 32, 96, 320]


def test_images_are_resized_inside_to_the_size_asked_for():
    for name in ("fcos_resnet18_fpn64", "lraspp_mobilenet_v3_large"):
        batch, parts = normalized_batch(build_model(name, num_classes=2, size=48), IMAGES)
        assert [min(part) for part in parts] == [48, 48]
        assert batch.shape[2] >= 72 and batch.shape[3] >= 65  # the longer sides
    assert (
        normalized_batch(build_model("ssdlite320_mobilenet_v3_large", num_classes=2, size=48), IMAGES)[1]
        == [(320, 320)] * 2
    )


@pytest.mark.parametrize(
    ("arguments", "argument", "value", "allowed"),
    [
        ({"name": "fcos_resnet19_fpn"}, "name", "fcos_resnet19_fpn", "one of deeplabv3_"),
        (
            {"name": "resnet19"},
            "name",
            "resnet19",
            "maskrcnn)_TRUNK_fpn[CHANNELS][_bn] with TRUNK timm:NETWORK or one of mobilenet",
        ),
        (
            {"name": "fcos_resnet50_fpn", "weights": "COCO_V9"},
            "weights",
            "COCO_V9 for fcos_resnet50_fpn",
            "one of DEFAULT, COCO_V1, or a file",
        ),
        (
            {"name": "fcos_resnet18_fpn", "weights": "DEFAULT"},
            "weights",
            "DEFAULT for fcos_resnet18_fpn",
            "a file, because torchvision has no weights of this model",
        ),
        ({"name": "fcos_resnet18_fpn48"}, "name", "fcos_resnet18_fpn48, whose pyramid is 48 wide", "a multiple of 32"),
        ({"name": "retinanet_resnet18_fpn0"}, "name", "retinanet_resnet18_fpn0, whose pyramid is 0 wide", "above 0"),
        (
            {"name": "ssdlite320_mobilenet_v3_large", "backbone_weights": "DEFAULT"},
            "backbone_weights",
            "DEFAULT for ssdlite320_mobilenet_v3_large",
            "none, because torchvision gives the backbone another shape then",
        ),
        (
            {"name": "fcos_resnet18_fpn", "backbone_weights": "X"},
            "backbone_weights",
            "X for resnet18",
            "one of DEFAULT, IMAGENET1K_V1",
        ),
        ({"name": "fcos_resnet50_fpn", "backbone_weights": "X"}, "backbone_weights", "X for resnet50", "IMAGENET1K_V2"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(arguments, argument, value, allowed):
    with pytest.raises(ConfigError) as error:
        build_model(num_classes=3, **arguments)
    assert (error.value.argument, error.value.value) == (argument, value) and allowed in error.value.allowed


def test_a_download_that_fails_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr("acam_kd.tv.zoo.get_model", fails)
    with pytest.raises(RunError) as error:
        build_model("fcos_resnet50_fpn", num_classes=3, backbone_weights="DEFAULT")
    assert error.value.where == "fcos_resnet50_fpn"
    assert error.value.what == "the weights cannot be downloaded (no route to host)"


def test_statistics_follow_a_random_start_and_pretrained_ones_are_left_alone(monkeypatch):
    """MobileNetV3's own momentum, 0.01, would spoil the evaluation of a run of some hundred steps."""

    def momenta(model):
        return {module.momentum for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)}

    name = "lraspp_mobilenet_v3_large"
    assert momenta(build_model(name, num_classes=2)) == {0.1}
    untrained = torchvision.models.get_model(name, weights_backbone=None)
    monkeypatch.setattr("acam_kd.tv.models.get", lambda *_, **__: untrained)  # nothing is downloaded
    assert 0.01 in momenta(build_model(name, num_classes=21, backbone_weights="DEFAULT"))
