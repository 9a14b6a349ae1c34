"""MobileNetV2's SSDLite and Mobile DeepLabV3: sizes, layers, trunks from files, whole runs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torchvision.models import mobilenet_v2
from torchvision.ops import FrozenBatchNorm2d

from acam_kd.cli import main
from acam_kd.core import BACKBONE, LOGITS
from acam_kd.tv.adapter import adapt
from acam_kd.tv.build import build, load_model
from acam_kd.tv.labels import load_data
from acam_kd.tv.mobilenets import MOBILE_DEEPLAB, SSDLITE, DefaultBoxes
from acam_kd.tv.models import build_model, is_segmentation, plain
from acam_kd.tv.training import train
from acam_kd.tv.trunk import TrunkSettings, describe, set_up, stages_of, trunk_of

from .conftest import refuses


class Maps(nn.Module):
    """The convolutional part of a model, which fvcore can follow: no boxes, no resizing of images."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        if hasattr(self.model, "head"):
            found = self.model.head(list(self.model.backbone(x).values()))
            return found["cls_logits"], found["bbox_regression"]
        return self.model(x)["out"]


def size_of(model, side):
    """Millions of parameters, and thousands of millions of multiply-adds of the convolutions."""
    counted = FlopCountAnalysis(Maps(model.eval()), torch.zeros(1, 3, side, side)).unsupported_ops_warnings(False)
    return sum(p.numel() for p in model.parameters()) / 1e6, counted.by_operator()["conv"] / 1e9


@pytest.mark.filterwarnings("ignore")
def test_ssdlite_has_the_papers_size():
    """4.3 M and 0.8 G for the 80 classes of COCO and the background; torchvision's ten unused labels add 0.16 M."""
    parameters, operations = size_of(build_model(SSDLITE, num_classes=81), 320)
    assert parameters == pytest.approx(4.3, rel=0.03) and operations == pytest.approx(0.8, rel=0.03)
    unused = 10 * (576 * 3 + (1280 + 512 + 256 + 256 + 128) * 6 + 3 + 5 * 6)
    all_labels, _ = size_of(build_model(SSDLITE, num_classes=None), 320)
    assert all_labels == pytest.approx(parameters + unused / 1e6)


@pytest.mark.filterwarnings("ignore")
def test_mobile_deeplabv3_has_the_papers_size():
    parameters, operations = size_of(plain(build_model(MOBILE_DEEPLAB, num_classes=None)), 513)
    assert parameters == pytest.approx(2.11, rel=0.03) and operations == pytest.approx(2.75, rel=0.03)
    assert round(parameters * 1e6) == 2113557  # 1,811,712 of the trunk and 301,845 of the head


def test_the_trunk_keeps_what_it_computes():
    """The six maps are those of the classifier: block 14's expansion, the last map, and four new ones."""
    classifier = mobilenet_v2().eval()
    model = build_model(SSDLITE, num_classes=4).eval()
    trunk_of(model).load_state_dict(classifier.features.state_dict())
    x = torch.rand(1, 3, 320, 320)
    with torch.no_grad():
        maps = model.backbone(x)
        expansion = classifier.features[14].conv[0](classifier.features[:14](x))
        torch.testing.assert_close(maps["0"], expansion)
        torch.testing.assert_close(maps["1"], classifier.features(x))
    assert [x.shape[1] for x in maps.values()] == [576, 1280, 512, 256, 256, 128]
    assert [spec.stride for spec in adapt(model).levels((BACKBONE,)).values()] == [16, 32, 64, 107, 160, 320]


def test_the_dilated_trunk_at_output_stride_16():
    """Block 14 keeps the map, and from block 15 on the 3x3 convolutions reach twice as far."""
    model = build_model(MOBILE_DEEPLAB, num_classes=4)
    depthwise = [m for m in trunk_of(model).modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert [m.stride[0] for m in depthwise] == [1, 2, 1, 2, 1, 1, 2, *[1] * 10]
    assert [m.dilation[0] for m in depthwise] == [1] * 14 + [2] * 3 and all(m.padding == m.dilation for m in depthwise)
    shapes = adapt(model).levels((BACKBONE, LOGITS))
    assert {name: (s.channels, s.stride) for name, s in shapes.items()} == {"out": (320, 16), LOGITS: (4, 16)}
    assert list(plain(model).classifier._modules) == ["0", "4"] and is_segmentation(MOBILE_DEEPLAB)


def test_the_finest_map_has_the_smallest_boxes():
    pairs = DefaultBoxes()._wh_pairs
    torch.testing.assert_close(pairs[0], torch.tensor([[0.1, 0.1], [0.2 * 2**0.5, 0.2 / 2**0.5], [0.2 / 2**0.5, 0.2 * 2**0.5]]))  # fmt: skip
    assert DefaultBoxes().num_anchors_per_location() == [3, 6, 6, 6, 6, 6]


@pytest.mark.parametrize("name", [SSDLITE, MOBILE_DEEPLAB])
def test_a_classifiers_file_starts_the_trunk(name, tmp_path):
    torch.save(mobilenet_v2().state_dict(), tmp_path / "classifier.pth")
    state = torch.load(tmp_path / "classifier.pth")
    model = build_model(name, num_classes=4)
    trunk = trunk_of(model)
    begins = {number: part for part, number in reversed(stages_of(trunk).items())}
    assert begins == {1: "0", 2: "2", 3: "4", 4: "7", 5: "14"}
    set_up(model, TrunkSettings(str(tmp_path / "classifier.pth")))
    assert all(torch.equal(x, state[f"features.{k}"]) for k, x in trunk.state_dict().items())
    frozen = {SSDLITE: "2 of 5 stages and 52 of 52 norms are frozen", MOBILE_DEEPLAB: ""}
    assert describe(trunk) == frozen[name]


def test_weights_by_name_freeze_what_a_file_freezes(monkeypatch):
    monkeypatch.setattr("acam_kd.tv.models.get", lambda *_, **__: mobilenet_v2())  # nothing is downloaded
    model = build_model(SSDLITE, num_classes=4, backbone_weights="DEFAULT")
    assert describe(trunk_of(model)) == "2 of 5 stages and 52 of 52 norms are frozen"
    assert not any(isinstance(m, FrozenBatchNorm2d) for m in model.backbone.extra.modules())
    model = build_model(MOBILE_DEEPLAB, num_classes=4, backbone_weights="DEFAULT")
    assert describe(trunk_of(model)) == ""


@pytest.mark.parametrize("name", [SSDLITE, MOBILE_DEEPLAB])
def test_weights_of_the_whole_model_are_a_file(name):
    with refuses("weights", "DEFAULT for", "a file, because torchvision has no weights of this model"):
        build_model(name, num_classes=4, weights="DEFAULT")
    with refuses("backbone_weights", "X for mobilenet_v2", "IMAGENET1K_V1"):
        build_model(name, num_classes=4, backbone_weights="X")


def test_deeplab_needs_two_images_of_a_device(settings):
    own = replace(settings, student=MOBILE_DEEPLAB, batch_size=1)
    with refuses("batch_size", "1", "2 images a device at least"):
        build(own, load_data(settings.train_split, MOBILE_DEEPLAB, name="data"))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method"), [(SSDLITE, "ACAMKD"), (MOBILE_DEEPLAB, "CWD"), (MOBILE_DEEPLAB, "MGD")])
def test_it_is_trained_distilled_and_evaluated(name, method, settings, tmp_path):
    own = replace(settings, student=name, iterations=1, eval_period=1)
    train(own, tmp_path / "teacher")
    taught = replace(own, teacher=str(tmp_path / "teacher"), method=method, iterations=2, checkpoint_period=1)
    result = train(taught, tmp_path / "student")
    assert {"AP" if name == SSDLITE else "mIoU"} <= result["metrics"].keys()
    history = (tmp_path / "student/metrics.jsonl").read_text()
    assert f"loss_{method.lower().removesuffix('kd')}_" in history
    load_model(str(tmp_path / "student"), "", num_classes=None, size=None, role="student")


def test_the_help_names_both(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    assert SSDLITE in shown and MOBILE_DEEPLAB in shown
