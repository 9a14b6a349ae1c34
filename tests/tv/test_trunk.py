"""Trunks from files, frozen stages and norms, and pixel statistics, in whole runs and alone."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

from acam_kd.core.errors import ConfigError
from acam_kd.tv.adapter import adapt
from acam_kd.tv.build import build, evaluate, load_model
from acam_kd.tv.card import read_card
from acam_kd.tv.labels import load_data
from acam_kd.tv.models import build_model
from acam_kd.tv.training import train
from acam_kd.tv.trunk import STAGES, TrunkSettings, describe, freeze, set_pixels, set_up, stages_of, trunk_of

from .conftest import STUDENT, refuses
from .test_training import interrupted, same, student_of

TRUNKS = {
    "fcos_mobilenet_v3_small_fpn64": {"1": 2, "2": 3, "4": 4, "9": 5},
    "fcos_mobilenet_v2_fpn32": {"2": 2, "4": 3, "7": 4, "14": 5},
    "retinanet_resnet18_fpn32": {"layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5},
    "lraspp_mobilenet_v3_large": {"2": 2, "4": 3, "7": 4, "13": 5},  # dilated at the end
    "deeplabv3_resnet50": {"layer1": 2, "layer2": 3, "layer3": 4, "layer4": 5},  # dilated twice
}
MEAN, STD = (0.5, 0.25, 0.75), (0.5, 0.5, 0.25)


def built(name=STUDENT):
    return build_model(name, num_classes=4, size=64)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """The file of a classifier, wrapped as in training programs, and its state."""
    torch.manual_seed(5)
    state = get_model("mobilenet_v3_small").state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    path = tmp_path_factory.mktemp("weights") / "classifier.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    return str(path), state


@pytest.mark.parametrize("name", TRUNKS)
def test_stages_begin_where_the_map_is_halved(name):
    trunk = trunk_of(built(name))
    numbers = stages_of(trunk)
    begins = {part: number for part, number in numbers.items() if number > 1}
    assert {number: next(p for p, n in begins.items() if n == number) for number in begins.values()} == {
        number: part for part, number in TRUNKS[name].items()
    }
    assert list(numbers.values()) == sorted(numbers.values()) and numbers[next(iter(numbers))] == 1


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("stages", [0, 1, 3, 5])
def test_frozen_stages_get_no_gradient_and_their_norms_do_not_move(name, stages):
    model = built(name)
    trunk = trunk_of(model)
    freeze(trunk, stages, "")
    model.train()
    before = {key: value.clone() for key, value in trunk.state_dict().items()}
    total = sum(x.square().mean() for x in trunk(torch.rand(2, 3, 64, 64)).values())
    if stages < STAGES:
        total.backward()
    else:
        assert not total.requires_grad
    for part, number in stages_of(trunk).items():
        module = trunk.get_submodule(part)
        kinds = {type(m) for m in module.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))}
        assert kinds <= {FrozenBatchNorm2d if number <= stages else nn.BatchNorm2d}
        assert all((p.grad is None) == (number <= stages) for p in module.parameters())
        for key, value in module.state_dict().items():
            if "running" in key:
                assert torch.equal(value, before[f"{part}.{key}"]) == (number <= stages)
    assert (f"{stages} of 5 stages" in describe(trunk)) == (stages > 0)


def test_norms_alone():
    model = built()
    trunk = trunk_of(model)
    parameters = sum(p.requires_grad for p in trunk.parameters())
    values = {name: x.clone() for name, x in trunk.state_dict().items()}
    freeze(trunk, None, "frozen")
    norms = [m for m in trunk.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in trunk.modules())
    assert sum(p.requires_grad for p in trunk.parameters()) == parameters - 2 * len(norms)
    assert all(torch.equal(x, values[name]) for name, x in trunk.state_dict().items())
    assert describe(trunk) == f"0 of 5 stages and {len(norms)} of {len(norms)} norms are frozen"
    pyramid = [m for m in model.backbone.fpn.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert not pyramid
    freeze(trunk, 1, "trained")
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in trunk.modules()) == 1  # the stem's
    assert all(torch.equal(x, values[name]) for name, x in trunk.state_dict().items() if "num_b" not in name)


def test_a_norm_gives_the_same_frozen_and_free():
    model = built("retinanet_resnet18_fpn32").eval()
    trunk, images = trunk_of(model), torch.rand(1, 3, 64, 64)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)
            module.eps = 1e-3
    with torch.no_grad():
        before = trunk(images)["0"]
        for norm in ("frozen", "trained"):
            freeze(trunk, None, norm)
            torch.testing.assert_close(trunk(images)["0"], before)


def test_a_file_makes_the_trunk_that_a_name_makes(classifier, caplog):
    path, state = classifier
    model = built()
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        set_up(model, TrunkSettings(path))
    trunk = trunk_of(model)
    values = trunk.state_dict()
    assert all(torch.equal(values[name], state[f"features.{name}"]) for name in values)
    assert "trunk loaded: all 201 tensors by name under 'module.features.', " in caplog.text
    assert "(sha256 " in caplog.text and "trunk: 2 of 5 stages and 33 of 33 norms are frozen" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        set_up(built(), TrunkSettings(path, freeze_stages=0, norm="trained"))
    assert "trunk: nothing is frozen" in caplog.text


def test_a_segmentation_model_is_not_frozen_by_itself(classifier, tmp_path):
    torch.save(get_model("mobilenet_v3_large").state_dict(), tmp_path / "large.pth")
    model = built("lraspp_mobilenet_v3_large")
    set_up(model, TrunkSettings(str(tmp_path / "large.pth")))
    assert describe(trunk_of(model)) == "" and trunk_of(model) is model.network.backbone


def test_ssd_changes_its_trunk(classifier):
    for given, hint in (
        (TrunkSettings(classifier[0]), "a file as {student_backbone_weights}"),
        (TrunkSettings(freeze_stages=1), "{freeze_stages}"),
    ):
        with pytest.raises(ConfigError) as error:
            set_up(built("ssdlite320_mobilenet_v3_large"), given)
        assert error.value.value == "SSD" and hint in error.value.hint
    set_up(built("ssdlite320_mobilenet_v3_large"), TrunkSettings())


@pytest.fixture
def frozen(settings, classifier):
    return replace(
        settings, student_backbone_weights=classifier[0], freeze_stages=3, freeze_norm="trained", pixel_mean=MEAN,
        pixel_std=STD, student_backbone_order="BGR",
    )  # fmt: skip


def test_a_run_with_a_frozen_trunk_leaves_it_and_resumes_bit_for_bit(frozen, classifier, tmp_path):
    train(frozen, tmp_path / "whole")
    interrupted(frozen, tmp_path / "two")
    train(frozen, tmp_path / "two", resume=True)
    student = student_of(tmp_path / "whole")
    assert same(student, student_of(tmp_path / "two"))
    moved = {}
    numbers = stages_of(trunk_of(built()))
    for name, value in classifier[1].items():
        part, _, rest = name.removeprefix("features.").partition(".")
        if part in numbers and name.startswith("features.") and "num_batches" not in name:
            value = value.flip(1) if value.shape[1:2] == (3,) and part == "0" else value
            moved.setdefault(numbers[part], []).append(not torch.equal(student[f"backbone.body.{part}.{rest}"], value))
    assert [any(moved[number]) for number in (1, 2, 3)] == [False] * 3 and all(moved[4]) and all(moved[5])


def test_pixel_statistics_survive_in_the_runs_folder(frozen, tmp_path):
    result = train(frozen, tmp_path / "run")
    assert json.loads((tmp_path / "run/settings.json").read_text())["pixel_mean"] == list(MEAN)
    card, _ = read_card(tmp_path / "run")
    assert (card.pixel_mean, card.pixel_std) == (MEAN, STD)
    model, _ = load_model(str(tmp_path / "run"), "", num_classes=None, size=None, role="teacher")
    assert (tuple(adapt(model).pixels.mean), tuple(adapt(model).pixels.std)) == (MEAN, STD)
    metrics = evaluate(str(tmp_path / "run"), "", frozen.val_split)
    assert metrics["AP"] == pytest.approx(result["metrics"]["AP"])
    again = replace(frozen, student=str(tmp_path / "run"), student_backbone_weights="", student_backbone_order="RGB",
                    pixel_mean=(), pixel_std=())  # fmt: skip
    train(again, tmp_path / "again")
    assert read_card(tmp_path / "again")[0].pixel_std == STD


def test_a_run_resumes_with_the_same_settings_only(frozen, tmp_path):
    train(frozen, tmp_path / "run")
    for name, value in (("pixel_mean", STD), ("freeze_stages", 0), ("freeze_norm", "frozen")):
        with refuses(name, "", f"as in the run in {tmp_path / 'run'}"):
            train(replace(frozen, **{name: value}), tmp_path / "run", resume=True)


@pytest.mark.parametrize("name", ["fcos_mobilenet_v3_small_fpn64", "lraspp_mobilenet_v3_large"])
def test_the_batch_is_normalised_with_the_statistics_given(name):
    from acam_kd.tv.distillation import normalized_batch

    model = built(name)
    set_pixels(model, MEAN, STD)
    batch, _ = normalized_batch(model, [torch.tensor(MEAN).view(3, 1, 1).expand(3, 64, 64) + 0.125])
    torch.testing.assert_close(batch[0, :, 5, 5], 0.125 / torch.tensor(STD))


@pytest.mark.parametrize(
    ("change", "argument", "allowed"),
    [
        ({"pixel_mean": (123.7, 116.3, 103.5)}, "pixel_mean", "three numbers from 0, at most 1"),
        ({"pixel_std": (0.5, 0.0, 0.5)}, "pixel_std", "three numbers above 0"),
        ({"pixel_std": (0.5, float("nan"), 0.5)}, "pixel_std", "three numbers above 0"),
        ({"freeze_stages": 1}, "freeze_stages", "nothing frozen without weights"),
        ({"freeze_norm": "frozen"}, "freeze_norm", "nothing frozen without weights"),
        ({"student_backbone_order": "BGR"}, "student_backbone_order", "RGB without a file"),
        ({"student_backbone_weights": "no/file.pth"}, "student_backbone_weights", "an existing one"),
        ({"student_backbone_weights": "X"}, "student_backbone_weights", "IMAGENET1K_V1, or a file"),
    ],
)
def test_what_cannot_be(settings, change, argument, allowed):
    with refuses(argument, "", allowed):
        build(replace(settings, **change), load_data(settings.train_split, STUDENT, name="training data"))


def test_more_stages_than_there_are(settings, classifier):
    data = load_data(settings.train_split, STUDENT, name="training data")
    with refuses("freeze_stages", "6", "0 to 5"):
        build(replace(settings, student_backbone_weights=classifier[0], freeze_stages=6), data)
    with refuses("student_backbone_weights", "", "none beside weights of the whole student"):
        build(replace(settings, student_backbone_weights=classifier[0], student_weights=classifier[0]), data)
