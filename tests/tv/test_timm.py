"""Networks of timm as trunks: maps, pixels, stages and norms, files of weights, runs, and the networks that cannot be."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from acam_kd.core import BACKBONE
from acam_kd.core.errors import RunError
from acam_kd.tv.adapter import adapt
from acam_kd.tv.build import load_model
from acam_kd.tv.card import read_card
from acam_kd.tv.models import build_model, is_model
from acam_kd.tv.norms import convert_norms, is_frozen, is_norm
from acam_kd.tv.training import train
from acam_kd.tv.trunk import TrunkSettings, describe, freeze, set_up, stages_of, trunk_of

from .conftest import refuses
from .test_class_heads import IMAGES, TARGETS

timm = pytest.importorskip("timm")

SMALL = "mobilenetv3_small_050"
STUDENT = f"fcos_timm:{SMALL}_fpn64"
LITE = "tf_efficientnet_lite0"
HALVES = [0.5, 0.5, 0.5]


def built(name=STUDENT):
    return build_model(name, num_classes=4, size=64)


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        (STUDENT, [8, 16, 32, 64, 128]),
        ("retinanet_timm:resnet10t.c3_in1k_fpn32_bn", [8, 16, 32, 64, 128]),
        ("fasterrcnn_timm:convnext_atto_fpn32", [4, 8, 16, 32, 64]),
        ("fcos_timm:swin_tiny_patch4_window7_224_fpn64", [8, 16, 32, 64, 128]),  # of channels last, trained at one size
    ],
)
def test_a_detector_trains_all_that_it_has(name, strides):
    model = built(name)
    assert is_model(name) and model.training
    sum(model(IMAGES, TARGETS).values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    levels = adapt(model).levels((BACKBONE,)).values()
    assert [level.stride for level in levels] == strides and {level.channels for level in levels} == {
        64 if "fpn64" in name else 32
    }
    assert adapt(model).trunk == "backbone.body."
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.fpn.modules()) == name.endswith("_bn")


def test_the_pyramid_stands_on_timms_own_maps():
    torch.manual_seed(0)
    model = built(f"fcos_timm:{LITE}_fpn64").eval()
    whole = timm.create_model(LITE, features_only=True, out_indices=(2, 3, 4)).eval()
    assert whole.load_state_dict(model.backbone.body.state_dict(), strict=False).missing_keys == []
    seen = []
    model.backbone.fpn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        model.backbone(x)
        for ours, theirs in zip(seen[0].values(), whole(x), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_pixels_are_the_trunks_own_and_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        model = built(f"fcos_timm:{LITE}_fpn64")
    assert adapt(model).pixels.mean == HALVES and adapt(model).pixels.std == HALVES
    assert f"pixels: mean 0.5 0.5 0.5, deviation 0.5 0.5 0.5, of [0, 1], RGB, as timm says of {LITE}" in caplog.text
    assert adapt(built()).pixels.mean == [0.485, 0.456, 0.406]


def test_stages_end_where_timm_says():
    numbers = stages_of(trunk_of(built(f"fcos_timm:{LITE}_fpn64")))
    assert list(numbers.values()) == sorted(numbers.values())
    last = {number: part for part, number in numbers.items() if part.startswith("blocks")}
    assert last == {1: "blocks.0", 2: "blocks.1", 3: "blocks.2", 4: "blocks.4", 5: "blocks.6"}
    assert stages_of(trunk_of(built("fcos_timm:resnet10t_fpn32")))["layer1"] == 2
    assert stages_of(trunk_of(built("fcos_timm:convnext_atto_fpn32")))["stem"] == 2  # there is no map of stride 2


@pytest.mark.parametrize("stages", [0, 2, 5])
def test_frozen_stages_get_no_gradient_and_their_norms_do_not_move(stages):
    model = built()
    trunk = trunk_of(model)
    freeze(trunk, stages, "")
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    sum(model(IMAGES, TARGETS).values()).backward()
    for part, number in stages_of(trunk).items():
        module = trunk.get_submodule(part)
        assert all(is_frozen(m) == (number <= stages) for m in module.modules() if is_norm(m))
        assert all((p.grad is None) == (number <= stages) for p in module.parameters())
        for key, value in module.state_dict().items():
            if "running" in key:
                assert torch.equal(value, before[f"{part}.{key}"]) == (number <= stages)
    assert (f"{stages} of 5 stages" in describe(trunk)) == (stages > 0)


def test_a_norm_with_an_activation_inside_keeps_it():
    norm = timm.layers.BatchNormAct2d(4, eps=1e-3, act_layer=nn.Hardswish).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.weight.data.uniform_(0.5, 2)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = norm(x)
        frozen = convert_norms(norm, frozen=True)
        assert is_frozen(frozen) and not list(frozen.parameters())
        torch.testing.assert_close(frozen(x), expected)
        free = convert_norms(frozen, frozen=False)
        assert isinstance(free, nn.BatchNorm2d) and not free.training
        torch.testing.assert_close(free(x), expected)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_of_timms_is_found_by_name(kind, tmp_path):
    torch.manual_seed(1)
    state = timm.create_model(SMALL).state_dict()
    path = tmp_path / f"classifier.{kind}"
    torch.save(state, path) if kind == "pth" else save_file(state, path)
    model = built()
    set_up(model, TrunkSettings(str(path)))
    trunk = trunk_of(model)
    assert all(torch.equal(x, state[name]) for name, x in trunk.state_dict().items())
    norms = sum(is_norm(m) for m in trunk.modules())
    assert describe(trunk) == f"2 of 5 stages and {norms} of {norms} norms are frozen"


def test_a_file_with_other_names_is_found_by_order(tmp_path, caplog):
    """As those of EfficientNet-Lite0 that a package carries, whose names are not timm's."""
    state = timm.create_model(SMALL).state_dict()
    torch.save({f"tensor{number}": x for number, x in enumerate(state.values()) if x.dim()}, tmp_path / "other.pth")
    model = built()
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        set_up(model, TrunkSettings(str(tmp_path / "other.pth"), freeze_stages=0, norm="trained"))
    assert "tensors by order and shape" in caplog.text
    assert all(torch.equal(x, state[name]) for name, x in trunk_of(model).state_dict().items() if x.dim())


def test_timms_weights_freeze_what_a_file_freezes(monkeypatch):
    asked = []

    def create(name, pretrained, **_):
        asked.append(pretrained)
        return create_model(name)

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", create)  # nothing is downloaded
    model = build_model(STUDENT, num_classes=4, backbone_weights="DEFAULT")
    assert asked == [True] and "2 of 5 stages" in describe(trunk_of(model))
    assert describe(trunk_of(built())) == "" and asked == [True, False]


def test_a_download_that_fails_is_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(timm, "create_model", fails)
    with pytest.raises(RunError) as error:
        build_model(STUDENT, num_classes=4, backbone_weights="DEFAULT")
    assert error.value.what == "the weights cannot be downloaded (no route to host)"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("fcos_timm:rsenet18_fpn", "timm:rsenet18", "as resnet18"),
        ("fcos_timm:resnet18.nothing_fpn", "Invalid pretrained tag", "a network and a tag of timm's"),
        ("fcos_timm:vit_tiny_patch16_224_fpn", "maps of strides 16", "maps of strides 8, 16, 32"),
        ("fasterrcnn_timm:visformer_tiny_fpn", "maps of strides 8, 16, 32", "strides 4, 8, 16, 32"),
        ("fcos_timm:twins_pcpvt_small_fpn", "whose parts and maps timm names differently", "another network"),
        ("fcos_timm:coatnet_nano_rw_224_fpn", "fails on an image of 96x160 (", "images of any size"),
        ("fcos_timm:resnet10t_fpn48", "48 wide", "a multiple of 32"),
    ],
)
def test_networks_that_cannot_be_a_trunk(name, value, allowed):
    with refuses("name", value, allowed):
        built(name)


def test_weights_have_their_names_in_timm():
    with refuses("backbone_weights", "IMAGENET1K_V1 for timm:", "DEFAULT, or a file", "a tag of timm's"):
        build_model(STUDENT, num_classes=4, backbone_weights="IMAGENET1K_V1")


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("name", "timm is not installed", "a trunk of torchvision's", "pip install 'acam-kd[timm]'"):
        built()


def test_it_is_trained_distilled_and_kept_with_its_pixels(settings, tmp_path):
    name = f"fcos_timm:{LITE}_fpn64_bn"
    own = replace(settings, student=name, iterations=1, eval_period=1)
    train(own, tmp_path / "teacher")
    assert read_card(tmp_path / "teacher")[0].pixel_mean == tuple(HALVES)
    taught = replace(settings, student=STUDENT, teacher=str(tmp_path / "teacher"), method="ACAMKD", iterations=2)
    result = train(taught, tmp_path / "student")
    assert "AP" in result["metrics"] and "loss_acam_" in (tmp_path / "student/metrics.jsonl").read_text()
    kept = json.loads((tmp_path / "student/student.json").read_text())
    assert kept["name"] == STUDENT and kept["pixel_std"] == [0.229, 0.224, 0.225]
    model, _ = load_model(str(tmp_path / "teacher"), "", num_classes=None, size=None, role="teacher")
    assert adapt(model).pixels.mean == HALVES
