"""Taps, the reader of a step, and the pairing of levels."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from acam_kd.core import FeatureSpec, ModuleTap, Reader, match_levels
from acam_kd.core.reader import as_mapping, named

from .detectors import refused


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=8, padding=1)

    def forward(self, batch):
        return {"p3": self.conv(batch)}


def pyramid(*strides, channels=256):
    return {f"p{s.bit_length() - 1}": FeatureSpec(channels, s) for s in strides}


def test_tap_gives_the_batch_and_the_features_of_the_step():
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = ModuleTap(backbone, "backbone")
    tap.arm()
    out = backbone(batch)
    call = tap.read()
    assert call.first is batch and as_mapping(call.output, batch)["p3"] is out["p3"] and call.grad
    tap.arm()
    with refused("student", "0 calls of backbone in one training step", "one call", "call it as a module"):
        tap.read()


def test_tap_finds_a_batch_that_is_given_by_name():
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = ModuleTap(backbone, "backbone")
    tap.arm()
    backbone(batch=batch)
    assert tap.read().first is batch


def test_tap_records_when_armed_only_in_whatever_mode():
    """A trunk in evaluation mode, as of a frozen batch normalisation, is distilled too."""
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = ModuleTap(backbone, "backbone")
    backbone(batch)
    with refused("student", "0 calls of backbone"):
        tap.read()
    backbone.eval()
    tap.arm()
    out = backbone(batch)
    assert tap.read().output is out


def test_tap_forgets_when_disarmed_and_stops_on_remove():
    backbone = Backbone()
    tap = ModuleTap(backbone, "backbone")
    tap.arm()
    backbone(torch.randn(1, 3, 16, 16))
    tap.disarm()
    with refused("student", "0 calls"):
        tap.read()
    tap.remove()
    assert not backbone._forward_hooks
    tap.arm()
    backbone(torch.randn(1, 3, 16, 16))
    with refused("student", "0 calls"):
        tap.read()


def test_a_deep_copy_has_its_own_tap():
    class Owner(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()
            self.tap = ModuleTap(self.backbone, "backbone")

    owner, batch = Owner(), torch.randn(1, 3, 16, 16)
    owner.tap.arm()
    owner.backbone(batch)  # a step with a graph: it is left out of the copy
    twin = copy.deepcopy(owner)
    owner.tap.arm(), twin.tap.arm()
    twin.backbone(batch)
    assert twin.tap.read().output["p3"].shape == (1, 4, 2, 2)
    with refused("student", "0 calls"):
        owner.tap.read()


def test_a_module_that_runs_twice_is_an_error_of_that_step_alone():
    backbone, batch = Backbone(), torch.randn(1, 3, 16, 16)
    tap = ModuleTap(backbone, "backbone")
    tap.arm()
    backbone(batch)
    backbone(batch)
    with refused("student", "2 calls of backbone in one training step", "one call"):
        tap.read()
    tap.arm()
    backbone(batch)
    assert tap.read().first is batch


def test_a_backbone_has_named_levels():
    with refused("student", "a Tensor from its backbone", "a mapping from level name", "student_levels={'c4'"):
        as_mapping(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 2, 2))


def test_a_single_map_gets_a_name():
    out = torch.zeros(1, 4, 2, 2)
    assert named("logits")(out, torch.zeros(1, 3, 2, 2)) == {"logits": out}


def test_a_reader_reads_all_taps_of_one_step():
    module, batch = nn.Sequential(Backbone(), nn.Identity()), torch.randn(1, 3, 16, 16)
    backbone, other = ModuleTap(module[0], "backbone"), ModuleTap(module[1], "other")
    head = nn.Conv2d(4, 2, 1)
    logits = ModuleTap(head, "logits")
    reader = Reader([(backbone, as_mapping), (logits, named("logits"))], batch_from=backbone, others=[other])
    reader.arm()
    features = module(batch)
    map_ = head(features["p3"])
    module[1](None)  # a part that is read for targets may run more than once
    step = reader.read((), {})
    assert step.batch is batch and step.features["p3"] is features["p3"] and step.features["logits"] is map_
    assert step.predictions is None and step.call is backbone.read() and reader.read_other(other).first is None
    reader.pause(True)
    module(batch)  # a nested call
    reader.pause(False)
    assert reader.read((), {}).features["p3"] is features["p3"]
    reader.disarm()
    assert not (backbone.times or logits.times or other.times)
    reader.remove()
    assert not any(part._forward_hooks for part in (*module, head))


def test_a_reader_finds_the_batch_among_the_arguments_or_says_that_there_is_none():
    module, batch = nn.Conv2d(3, 4, 1), torch.randn(1, 3, 16, 16)
    reader = Reader([(ModuleTap(module, "c2"), named("c2"))])
    reader.arm()
    module(batch)
    assert reader.read((["x.jpg"],), {"images": batch}).batch is batch
    with refused("student", "no argument of its forward that is a tensor of four dimensions", "(N, C, H, W)"):
        reader.read(([batch],), {"masks": batch[0]})


def test_levels_of_one_stride_are_paired_by_name():
    """A dilated backbone has several."""
    dilated = {"res4": FeatureSpec(64, 8), "res5": FeatureSpec(128, 8)}
    assert match_levels(dilated, {"res5": FeatureSpec(9, 8), "res4": FeatureSpec(9, 8)}) == {
        "res4": "res4",
        "res5": "res5",
    }
    with refused("levels", "several levels of the student with one stride", "one", "name one of them"):
        match_levels(dilated, {"res4": FeatureSpec(9, 8), "res5": FeatureSpec(9, 16)})


def test_logits_are_paired_with_logits_at_any_stride():
    student = {"p3": FeatureSpec(8, 8), "logits": FeatureSpec(19, 8, logits=True)}
    teacher = {"p3": FeatureSpec(8, 8), "out": FeatureSpec(19, 16, logits=True)}
    assert match_levels(student, teacher) == {"p3": "p3", "logits": "out"}
    with refused("teacher", "21 classes at logits", "the student's 19", "by {taps} or another {method}"):
        match_levels(student, {**teacher, "out": FeatureSpec(21, 16, logits=True)})
    with refused("levels", "logits", "levels whose stride the teacher has too"):
        match_levels(student, {"p3": FeatureSpec(19, 8)}, ["p3", "logits"])


def test_levels_are_paired_by_stride_whatever_their_names():
    teacher = {"a": FeatureSpec(8, 32), "b": FeatureSpec(8, 8), "c": FeatureSpec(8, 16)}
    assert match_levels(pyramid(8, 16, 32), teacher) == {"p3": "b", "p4": "c", "p5": "a"}


def test_partial_overlap_pairs_what_it_can_and_levels_choose():
    student, teacher = pyramid(8, 16, 32, 64, 128), pyramid(4, 8, 16, 32, 64)
    assert list(match_levels(student, teacher)) == ["p3", "p4", "p5", "p6"]
    assert match_levels(student, teacher, ["p4"]) == {"p4": "p4"}


def test_pyramids_that_do_not_match_are_both_printed():
    both = "student: p3 (stride 8, 256 channels); teacher: p4 (stride 16, 256 channels)"
    with refused("teacher", "no stride that the student has too", "levels of the same strides", both):
        match_levels(pyramid(8), pyramid(16))
    both = "student: p3 (stride 8, 256 channels), p7 (stride 128, 256 channels); teacher: p2"
    with refused("levels", "p7", "levels whose stride the teacher has too", both) as error:
        match_levels(pyramid(8, 128), pyramid(4, 8), ["p3", "p7"])
    assert error.value.value == "p7"
    with refused("levels", "a partner for 1 of 3 levels", "for most of them", "teacher: p4"):
        match_levels(pyramid(8, 16, 32), pyramid(16))
    assert match_levels(pyramid(8, 16, 32), pyramid(16), ["p4"]) == {"p4": "p4"}
    with refused("levels", "2 levels of the teacher for p3 (stride 8)", "one", "leave it out"):
        match_levels(pyramid(8), {"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8)})
    double = {"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8), "c": FeatureSpec(1, 16)}
    assert match_levels(pyramid(8, 16), double, ["p4"]) == {"p4": "c"}
    with refused("levels", "several levels of the student with one stride", "one", "name one of them"):
        match_levels({"a": FeatureSpec(1, 8), "b": FeatureSpec(1, 8)}, pyramid(8))


def test_unknown_level_lists_the_known():
    with refused("levels", "p9", "levels of the student: p3, p4"):
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
    with refused("levels", "classes", "levels whose stride the teacher has too"):
        match_levels(student, teacher, ["p3"])


@pytest.mark.parametrize("predictions", [SIGMOID, {"logits": FeatureSpec(3, 8, logits=True)}])
def test_levels_that_do_not_name_the_predictions_choose_among_the_features(predictions):
    both = {**pyramid(8, 16, 32), **predictions}
    (name,) = predictions
    assert match_levels(both, both, ["p4"]) == {"p4": "p4", name: name}
    assert match_levels(both, both, [name]) == {name: name}


@pytest.mark.parametrize("classes", [3, 4])
def test_a_sigmoid_for_each_class_does_not_correspond_to_a_softmax_over_all(classes):
    """The channel of the background may make their numbers differ, or not."""
    other = {"classes": FeatureSpec(classes, 0, logits=True)}
    each, one = "a sigmoid for each class (3)", f"one softmax ({classes})"
    for pair, names in (((SIGMOID, other), (one, each)), ((other, SIGMOID), (each, one))):
        found = "at classes {} beside the student's {}".format(*names)
        with refused("teacher", found, "one kind", "by {taps} or another {method}"):
            match_levels(*pair)


def test_other_numbers_of_classes_are_refused():
    with refused("teacher", "5 classes at classes", "the student's 4"):
        match_levels(SOFTMAX, {"classes": FeatureSpec(5, 0, logits=True)})
