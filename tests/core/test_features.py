"""The tap, and the pairing of levels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from acam_kd.core import FeatureSpec, FeatureTap, match_levels


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=8, padding=1)

    def forward(self, batch):
        return {"p3": self.conv(batch)}


def pyramid(*strides, channels=256):
    return {f"p{s.bit_length() - 1}": FeatureSpec(channels, s) for s in strides}


def test_tap_gives_the_batch_and_the_features_once():
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = FeatureTap(backbone)
    out = backbone(batch)
    seen, features = tap.pop()
    assert seen is batch and features["p3"] is out["p3"]
    with pytest.raises(RuntimeError, match="did not run in training"):
        tap.pop()


def test_tap_records_in_training_only():
    backbone = Backbone().eval()
    tap = FeatureTap(backbone)
    backbone(torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError):
        tap.pop()


def test_tap_forgets_on_clear_and_stops_on_remove():
    backbone = Backbone()
    tap = FeatureTap(backbone)
    backbone(torch.randn(1, 3, 16, 16))
    tap.clear()
    with pytest.raises(RuntimeError):
        tap.pop()
    tap.remove()
    backbone(torch.randn(1, 3, 16, 16))
    with pytest.raises(RuntimeError):
        tap.pop()


def test_a_deep_copy_has_its_own_tap():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()
            self.tap = FeatureTap(self.backbone)

    owner = Owner()
    twin = copy.deepcopy(owner)
    twin.backbone(torch.randn(1, 3, 16, 16))
    assert twin.tap.pop()[1]["p3"].shape == (1, 4, 2, 2)
    with pytest.raises(RuntimeError):
        owner.tap.pop()


def test_a_module_that_runs_twice_is_an_error_once():
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = FeatureTap(backbone)
    backbone(batch)
    backbone(batch)
    with pytest.raises(RuntimeError, match="ran 2 times in one step"):
        tap.pop()
    backbone(batch)
    assert tap.pop()[0] is batch


def test_tap_wants_named_levels():
    module = nn.Conv2d(3, 4, 1)
    FeatureTap(module)
    with pytest.raises(TypeError, match="Conv2d returned Tensor; a mapping"):
        module(torch.randn(1, 3, 2, 2))


def test_tap_names_a_single_map():
    module = nn.Conv2d(3, 4, 1)
    tap, batch = FeatureTap(module, level="logits"), torch.randn(1, 3, 2, 2)
    out = module(batch)
    assert tap.pop()[1]["logits"] is out


def test_levels_of_one_stride_are_paired_by_name():
    """A dilated backbone has several."""
    dilated = {"res4": FeatureSpec(64, 8), "res5": FeatureSpec(128, 8)}
    assert match_levels(dilated, {"res5": FeatureSpec(9, 8), "res4": FeatureSpec(9, 8)}) == {
        "res4": "res4",
        "res5": "res5",
    }
    with pytest.raises(ValueError, match="two levels of the student have the same stride"):
        match_levels(dilated, {"res4": FeatureSpec(9, 8), "res5": FeatureSpec(9, 16)})


def test_logits_are_paired_with_logits_at_any_stride():
    student = {"p3": FeatureSpec(8, 8), "logits": FeatureSpec(19, 8, logits=True)}
    teacher = {"p3": FeatureSpec(8, 8), "out": FeatureSpec(19, 16, logits=True)}
    assert match_levels(student, teacher) == {"p3": "p3", "logits": "out"}
    with pytest.raises(ValueError, match="the student predicts 19 classes, the teacher 21, .*key: DISTILL.TAPS"):
        match_levels(student, {**teacher, "out": FeatureSpec(21, 16, logits=True)})
    with pytest.raises(ValueError, match="no level for logits"):
        match_levels(student, {"p3": FeatureSpec(19, 8)}, ["p3", "logits"])


def test_levels_are_paired_by_stride_whatever_their_names():
    teacher = {"a": FeatureSpec(8, 32), "b": FeatureSpec(8, 8), "c": FeatureSpec(8, 16)}
    assert match_levels(pyramid(8, 16, 32), teacher) == {"p3": "b", "p4": "c", "p5": "a"}


def test_partial_overlap_pairs_what_it_can_and_levels_choose():
    student, teacher = pyramid(8, 16, 32, 64, 128), pyramid(4, 8, 16, 32, 64)
    assert list(match_levels(student, teacher)) == ["p3", "p4", "p5", "p6"]
    assert match_levels(student, teacher, ["p4"]) == {"p4": "p4"}


def test_pyramids_that_do_not_match_are_both_printed():
    with pytest.raises(
        ValueError, match=r"share no stride.*student: p3 \(stride 8, 256 channels\).*teacher: p4 \(stride 16"
    ):
        match_levels(pyramid(8), pyramid(16))
    with pytest.raises(ValueError, match="teacher has no level for p7.*stride 128.*teacher: p2"):
        match_levels(pyramid(8, 128), pyramid(4, 8), ["p3", "p7"])
    with pytest.raises(ValueError, match="most levels of the student have no partner.*teacher: p4"):
        match_levels(pyramid(8, 16, 32), pyramid(16))
    assert match_levels(pyramid(8, 16, 32), pyramid(16), ["p4"]) == {"p4": "p4"}
    with pytest.raises(ValueError, match="two levels of the teacher have stride 8"):
        match_levels(pyramid(8), {"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8)})
    double = {"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8), "c": FeatureSpec(1, 16)}
    assert match_levels(pyramid(8, 16), double, ["p4"]) == {"p4": "c"}
    with pytest.raises(ValueError, match="two levels of the student"):
        match_levels({"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8)}, pyramid(8))


def test_unknown_level_lists_the_known():
    with pytest.raises(KeyError, match="unknown level 'p9'; the student has: p3, p4"):
        match_levels(pyramid(8, 16), pyramid(8, 16), ["p9"])


SIGMOID = {"classes": FeatureSpec(3, 0, logits=True, sigmoid=True)}
SOFTMAX = {"classes": FeatureSpec(4, 0, logits=True)}


def test_the_spec_knows_its_tap():
    assert FeatureSpec(9, 8).tap == "backbone" and SIGMOID["classes"].tap == "classes"
    assert FeatureSpec(9, 8, logits=True).tap == "logits"


def test_classes_are_paired_with_classes_only():
    student = {**pyramid(8, 16), **SIGMOID}
    assert match_levels(student, {**pyramid(8, 16), **SIGMOID}) == {"p3": "p3", "p4": "p4", "classes": "classes"}
    teacher = {**pyramid(8, 16), "map": FeatureSpec(3, 8, logits=True)}
    assert match_levels(student, teacher) == {"p3": "p3", "p4": "p4"}
    with pytest.raises(ValueError, match="the teacher has no level for classes"):
        match_levels(student, teacher, ["p3"])


@pytest.mark.parametrize("predictions", [SIGMOID, {"logits": FeatureSpec(3, 8, logits=True)}])
def test_levels_that_do_not_name_the_predictions_choose_among_the_features(predictions):
    both = {**pyramid(8, 16, 32), **predictions}
    (name,) = predictions
    assert match_levels(both, both, ["p4"]) == {"p4": "p4", name: name}
    assert match_levels(both, both, [name]) == {name: name}


@pytest.mark.parametrize("classes", [3, 4])
def test_a_sigmoid_for_each_class_does_not_correspond_to_a_softmax_over_all(classes):
    """Whether or not the channel of the background makes their numbers differ."""
    other = {"classes": FeatureSpec(classes, 0, logits=True)}
    for pair in ((SIGMOID, other), (other, SIGMOID)):
        with pytest.raises(ValueError, match="one class head predicts each class on its own, .*DISTILL.METHOD"):
            match_levels(*pair)


def test_other_numbers_of_classes_are_refused():
    with pytest.raises(ValueError, match="the student predicts 4 classes, the teacher 5"):
        match_levels(SOFTMAX, {"classes": FeatureSpec(5, 0, logits=True)})
