"""Common classes by name: hand values, gradients, labels, and what is refused."""

from __future__ import annotations

import copy
import logging
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import acam_kd
from acam_kd.core import CLASSES, Adapter, FeatureSpec, Targets
from acam_kd.core.class_names import BACKGROUND, UNUSED, check_class_names, read_class_map
from acam_kd.core.classes import CommonClasses, common_classes, foreign_class_layers
from acam_kd.core.pairing import paired, sized_targets
from acam_kd.methods.kd import binary_kd_loss, kd_loss
from acam_kd.methods.nkd import NKD

from .detectors import refused

LOGGER = logging.getLogger("acam_kd")


class Named(Adapter):
    """Predictions with names; ``place`` is that of a background without one."""

    def __init__(self, *names, place=None):
        super().__init__(nn.Identity())
        self.class_names, self.place = names, place
        self.class_layers = ("head.",)

    def background(self, spec):
        return spec.channels - 1 if self.place == -1 else self.place


def match(student, teacher, class_map=None, *, sigmoid=False, stride=0):
    """Match two ``Named``; return the reduced shapes and the common classes of the only level."""
    shapes = {}
    for role, model in (("student", student), ("teacher", teacher)):
        channels = len(model.class_names) + (model.place is not None)
        shapes[role] = {"classes": FeatureSpec(channels, stride, logits=True, sigmoid=sigmoid), "p3": FeatureSpec(9, 8)}
    reduced, common = common_classes(student, teacher, shapes, class_map or {}, LOGGER)
    return reduced, common.get("classes")


def logits(*probabilities):
    return torch.tensor([probabilities]).log()


# Hand values.


def test_a_softmax_with_the_background_first_is_renormalised():
    """The teacher's 0.1, 0.2, 0.3, 0.4 of background, x, b, a: without x they are 1/8, 3/8, 4/8."""
    reduced, common = match(Named("a", "b", place=0), Named("x", "b", "a", place=0))
    assert common == CommonClasses(student=(0, 1, 2), teacher=(0, 3, 2), channels=(3, 4))
    assert reduced["teacher"]["classes"] == FeatureSpec(3, 0, logits=True) == reduced["student"]["classes"]
    assert reduced["teacher"]["p3"] == FeatureSpec(9, 8)
    selected = common.of_teacher(logits(0.1, 0.2, 0.3, 0.4))
    torch.testing.assert_close(selected.softmax(1), torch.tensor([[1 / 8, 4 / 8, 3 / 8]]))
    entropy = -sum(p * math.log(p) for p in (1 / 8, 4 / 8, 3 / 8))
    torch.testing.assert_close(kd_loss(torch.zeros(1, 3), selected), torch.tensor(math.log(3) - entropy))


def test_a_softmax_with_the_background_last():
    _, common = match(Named("a", "b", place=-1), Named("x", "b", "a", place=-1))
    assert common == CommonClasses(student=(0, 1, 2), teacher=(2, 1, 3), channels=(3, 4))
    selected = common.of_teacher(logits(0.2, 0.3, 0.4, 0.1))
    torch.testing.assert_close(selected.softmax(1), torch.tensor([[4 / 8, 3 / 8, 1 / 8]]))


def test_sigmoids_stand_alone():
    _, common = match(Named("a", "b"), Named("x", "b", "y", "a"), sigmoid=True)
    assert common == CommonClasses(student=(0, 1), teacher=(3, 1), channels=(2, 4))
    student, teacher = torch.randn(2, 2, 5, 1), torch.randn(2, 4, 5, 1)
    found = binary_kd_loss(common.of_student(student), common.of_teacher(teacher))
    assert torch.equal(found, binary_kd_loss(student, torch.stack([teacher[:, 3], teacher[:, 1]], 1)))


def test_a_segmentation_map_has_no_background_of_its_own():
    _, common = match(Named("sky", "car", "sea"), Named("sea", "road", "sky"), stride=8)
    assert common == CommonClasses(student=(0, 2), teacher=(2, 0), channels=(3, 3))
    x = torch.arange(6.0).view(1, 3, 1, 2)
    assert common.of_teacher(x).flatten().tolist() == [4, 5, 0, 1] and common.of_student(x).shape == (1, 2, 1, 2)


def test_the_same_classes_in_another_order_and_only_there():
    _, common = match(Named("a", "b", "c"), Named("c", "a", "b"), sigmoid=True)
    assert common == CommonClasses(student=(0, 1, 2), teacher=(1, 2, 0), channels=(3, 3))
    x = torch.randn(2, 3, 4, 1)
    assert common.of_student(x) is x  # not even a copy
    assert match(Named("a", "b", "c"), Named("a", "b", "c"))[1] is None
    assert match(Named("a", UNUSED, "b", UNUSED, place=0), Named("a", UNUSED, "b", UNUSED, place=0))[1] is None
    assert match(Named("door", "door"), Named("door", "door"))[1] is None  # as in ADE20K: nothing is looked up


def test_gaps_in_the_labels_are_no_classes():
    _, common = match(Named("a", UNUSED, "c", place=0), Named("c", UNUSED, UNUSED, "a", place=0))
    assert common == CommonClasses(student=(0, 1, 3), teacher=(0, 4, 1), channels=(4, 5))


def test_a_mapping_translates_and_names_that_are_not_in_it_stay():
    _, common = match(Named("pedestrian", "car"), Named("car", "person", "dog"), {"pedestrian": "person"})
    assert common == CommonClasses(student=(0, 1), teacher=(1, 0), channels=(2, 3))
    assert match(Named("pedestrian", "car"), Named("person", "car"), {"pedestrian": "person"})[1] is None
    _, common = match(Named("background", "car"), Named("car", "bus", place=0), {"background": BACKGROUND})
    assert common == CommonClasses(student=(0, 1), teacher=(0, 1), channels=(2, 3))


def test_labels_are_renumbered_and_those_of_other_classes_ignored():
    common = CommonClasses(student=(0, 2), teacher=(4, 1), channels=(3, 6))
    labels = torch.tensor([[0, 1], [2, 3], [-1, -2]])
    assert common.labels(labels).tolist() == [[0, -1], [1, 2], [-1, -1]]  # 3 is the background of sigmoids
    last = CommonClasses(student=(1, 2), teacher=(4, 1), channels=(3, 6))  # 2 is the background of a softmax
    assert last.labels(torch.tensor([0, 1, 2])).tolist() == [-1, 0, 1]


def test_only_kept_logits_of_the_student_get_a_gradient():
    common = CommonClasses(student=(0, 2), teacher=(4, 1), channels=(3, 6))
    student, teacher = torch.randn(2, 3, 5, 1, requires_grad=True), torch.randn(2, 6, 5, 1)
    kd_loss(common.of_student(student), common.of_teacher(teacher)).backward()
    assert student.grad[:, [0, 2]].abs().min() > 0 and student.grad[:, 1].abs().max() == 0


def test_positions_of_a_class_that_only_the_student_knows_count_for_no_method_with_labels():
    common = {CLASSES: CommonClasses(student=(0, 2), teacher=(4, 1), channels=(3, 6))}
    student, teacher = torch.randn(4, 3, 1, 1), torch.randn(4, 6, 1, 1)
    labels = torch.tensor([0, 1, 2, 1]).view(4, 1, 1)
    pair = paired({CLASSES: student}, {CLASSES: teacher}, {CLASSES: CLASSES}, common)
    targets = sized_targets(Targets(labels={CLASSES: labels}), pair[0], None, common)
    spec = {CLASSES: FeatureSpec(2, 0, logits=True)}
    found = NKD(spec, spec)(*pair, targets)
    kept = [x[[0, 2]] for x in (student[:, [0, 2]], teacher[:, [4, 1]])]
    wanted = NKD(spec, spec)(*({CLASSES: x} for x in kept), Targets(labels={CLASSES: torch.tensor([[[0]], [[1]]])}))
    assert found.keys() == wanted.keys()
    for name in found:
        torch.testing.assert_close(found[name], wanted[name])


def test_an_index_made_in_inference_mode_serves_training():
    common = CommonClasses(student=(0, 2), teacher=(5, 1), channels=(3, 6))
    with torch.inference_mode():
        common.of_student(torch.randn(1, 3))
    x = torch.randn(1, 3, requires_grad=True)
    common.of_student(x).sum().backward()
    assert x.grad.tolist() == [[1, 0, 1]]


def test_logits_with_other_channels_than_declared_are_refused():
    common = CommonClasses(student=(0, 2), teacher=(5, 1), channels=(3, 6))
    with refused("teacher", "7 channels at level logits", "the 6 that it declares"):
        common.of_teacher(torch.zeros(1, 7))
    with refused("student", "2 channels at level classes", "the 3 that it declares"):
        common.of_student(torch.zeros(1, 2), "classes")


# Logs and errors.


def test_the_log_names_what_was_matched_and_what_was_left_out(caplog):
    caplog.set_level(logging.INFO)
    match(Named("pedestrian", "car", "tram", place=-1), Named("car", "person", "dog", "cat", place=-1),
          {"pedestrian": "person"})  # fmt: skip
    assert caplog.messages == [
        "classes: 2 of the student's 3 are among the teacher's 4: pedestrian (person), car; left out, as the teacher "
        "does not know them: tram"
    ]
    caplog.clear()
    match(Named("a", "b", place=0), Named("b", "a", place=0))
    match(Named("a", "b", place=0), Named("a", "b", place=0))
    assert caplog.messages == ["classes: 2 of the student's 2 are among the teacher's 2: a, b"]


def test_no_common_class_lists_both_and_names_the_mapping():
    with refused(
        "teacher", "the classes cat, dog", "some of the student's Katze, Hund", "by {class_map}, as NAME=NAME"
    ):
        match(Named("Katze", "Hund", place=0), Named("cat", "dog", place=0))
    many = [f"c{i}" for i in range(140)]
    with refused("teacher", "c99, and 40 more", "some of the student's x"):
        match(Named("x", UNUSED), Named(*many))


@pytest.mark.parametrize(
    ("class_map", "value", "allowed"),
    [
        ({"z": "a"}, "z=a", "a class of the student: a, b"),
        ({"b": "z"}, "b=z", "a class of the teacher: a, c"),
        ({"b": "a"}, "a, b for the teacher's a", "one class of the student for each"),
    ],
)
def test_a_mapping_that_does_not_fit_is_refused(class_map, value, allowed):
    with refused("class_map", value, allowed):
        match(Named("a", "b"), Named("a", "c"), class_map)


def test_names_that_do_not_fit_are_refused():
    with refused("teacher_class_names", "2 classes called a", "different names"):
        match(Named("a", "b"), Named("a", "c", "a"))
    shapes = {role: {"classes": FeatureSpec(4, 0, logits=True)} for role in ("student", "teacher")}
    with refused("student_class_names", "2 names, the background among them", "4, one for each class that the student"):
        common_classes(Named("a", place=0), Named("a", "b", "c", place=0), shapes, {}, LOGGER)
    with refused("teacher_class_names", "3 names", "4, one for each class that the teacher predicts"):
        common_classes(Named(), Named("a", "b", "c"), shapes, {}, LOGGER)
    for names in ("a,b", 3, ["a", 2]):
        with refused("teacher_class_names", repr(names), "a list of names"):
            check_class_names("teacher_class_names", names)


def test_unknown_names_matter_where_the_numbers_differ_or_a_mapping_is_given():
    def shapes(*channels):
        return {r: {"classes": FeatureSpec(n, 0, logits=True)} for r, n in zip(("student", "teacher"), channels)}

    hint = "name the classes by {teacher_class_names}, and the common ones are compared; or distil the features"
    with refused("teacher", "80 classes at classes", "the student's 3", hint):
        common_classes(Named("a", "b", "c"), Named(), shapes(3, 80), {}, LOGGER)
    with refused("teacher", "80 classes", "3", "by {student_class_names} and {teacher_class_names}, and"):
        common_classes(Named(), Named(), shapes(3, 80), {}, LOGGER)
    assert common_classes(Named("a", "b", "c"), Named(), shapes(3, 3), {}, LOGGER) == (shapes(3, 3), {})
    with refused("class_map", "a=x, b=y", "names of classes that are known", "give {teacher_class_names} too"):
        common_classes(Named("a", "b", "c"), Named(), shapes(3, 3), {"a": "x", "b": "y"}, LOGGER)


def test_predictions_of_two_kinds_are_left_to_the_check_of_levels_and_features_have_no_classes(caplog):
    specs = FeatureSpec(3, 0, logits=True, sigmoid=True), FeatureSpec(4, 0, logits=True)
    shapes = {"student": {"classes": specs[0]}, "teacher": {"classes": specs[1]}}
    assert common_classes(Named("a", "b", "c"), Named("x", "y", "z"), shapes, {}, LOGGER) == (shapes, {})
    features = {"student": {"p3": FeatureSpec(8, 8)}, "teacher": {"p3": FeatureSpec(9, 8)}}
    assert common_classes(Named("a"), Named("x"), features, {}, LOGGER) == (features, {}) and not caplog.messages
    common_classes(Named("a"), Named("x"), features, {"a": "x"}, LOGGER)
    assert caplog.messages == ["the mapping of class names is not used: no predictions are distilled"]


@pytest.mark.parametrize(("pairs", "wrong"), [(["a"], "a"), (["=b"], "=b"), (["a="], "a="), (["a=b", "a=c"], "a=c")])
def test_pairs_of_names(pairs, wrong):
    assert read_class_map(["a = b", "traffic light=light"]) == {"a": "b", "traffic light": "light"}
    with refused("class_map", wrong, "NAME=NAME"):
        read_class_map(pairs)


def test_class_layers_are_foreign_where_names_are_known_to_differ():
    def foreign(*names, class_map=None):
        return foreign_class_layers(*(Named(*n) for n in names), class_map or {}, LOGGER)

    assert foreign(("a", "b"), ("b", "a")) == ["head."] and foreign(("a", "b"), ("a", "c")) == ["head."]
    assert foreign(("a", "b"), ("a", "b")) == foreign((), ("a", "b")) == foreign(("a", "b"), ()) == []
    assert foreign(("x", "b"), ("a", "b"), class_map={"x": "a"}) == []
    assert foreign(("a", "b"), (BACKGROUND, "a", "b")) == []


# Attached: maps of logits of any two modules.


class Segmentor(nn.Module):
    """Logits of stride 8 for so many classes, without losses of its own."""

    def __init__(self, classes):
        super().__init__()
        self.head = nn.Conv2d(3, classes, 8, stride=8)

    def forward(self, batch):
        return self.head(batch)


LEVELS = {"student_levels": {"logits": "head"}, "teacher_levels": {"logits": "head"}}
NAMES = {"student_class_names": ["sky", "tram", "car"], "teacher_class_names": ["car", "road", "sky", "sea"]}


@pytest.fixture
def pair():
    torch.manual_seed(0)
    return Segmentor(3), Segmentor(4)


BATCH = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_attached_a_map_of_logits_is_compared_on_the_common_classes(pair):
    student, teacher = pair
    acam_kd.distill(student, teacher, method="KD", **LEVELS, **NAMES)
    assert student.distillation.classes["logits"] == CommonClasses((0, 2), (2, 0), (3, 4))
    out = student(BATCH)
    assert out.shape[1] == 3  # the student's own output is whole
    loss = student.distillation.losses["loss_kd_kl"]
    with torch.no_grad():
        wanted = kd_loss(out[:, [0, 2]], teacher(BATCH)[:, [2, 0]])
    torch.testing.assert_close(loss.detach(), wanted)
    loss.backward()
    assert student.head.weight.grad[1].abs().max() == 0 and student.head.weight.grad[[0, 2]].abs().amin(0).max() > 0


@pytest.mark.parametrize("method", ["CWD", "Mimic", "MasKD", "ACAMKD", "DKD", "NKD"])
def test_every_method_for_logits_gets_the_common_classes(pair, method):
    student, teacher = pair
    labels = torch.tensor([0, 1, 2, -1] * 32).view(2, 8, 8)
    acam_kd.distill(
        student, teacher, method=method, targets=lambda x: Targets(labels={"logits": labels}), **LEVELS, **NAMES
    )
    seen = []
    student.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args))
    student(BATCH)
    loss = sum(student.distillation.losses.values())
    (ours, theirs, targets), *_ = seen
    assert ours["logits"].shape == theirs["logits"].shape == (2, 2, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs["logits"], teacher(BATCH)[:, [2, 0]])
    if method in ("DKD", "NKD"):
        assert targets.labels["logits"].unique().tolist() == [-1, 0, 1]
        assert (targets.labels["logits"] == 1).equal(labels == 2)
        assert student.distillation.metrics()["logits/positions"] == 64
    loss.backward()
    assert loss.isfinite() and student.head.weight.grad[1].abs().max() == 0


def test_attached_another_order_gives_the_loss_of_the_same_order(pair):
    student, teacher = pair
    twin, sorted_teacher = copy.deepcopy(student), Segmentor(4)
    order = [2, 0, 3, 1]
    with torch.no_grad():
        sorted_teacher.head.weight.copy_(teacher.head.weight[order])
        sorted_teacher.head.bias.copy_(teacher.head.bias[order])
    names = NAMES["teacher_class_names"]
    losses = []
    for one, other, theirs in ((student, teacher, names), (twin, sorted_teacher, [names[i] for i in order])):
        acam_kd.distill(one, other, method="CWD", **LEVELS, **{**NAMES, "teacher_class_names": theirs})
        one(BATCH)
        losses.append(one.distillation.losses["loss_cwd_kl"].detach())
    torch.testing.assert_close(*losses)


def test_identical_classes_change_nothing(pair):
    student, twin, teacher = pair[0], copy.deepcopy(pair[0]), Segmentor(3)
    for one, names in ((student, {}), (twin, dict.fromkeys(NAMES, ["a", "b", "c"]))):
        acam_kd.distill(one, teacher, method="KD", **LEVELS, **names)
        one(BATCH)
        assert one.distillation.classes == {}
    ours, theirs = (x.distillation.losses["loss_kd_kl"] for x in (student, twin))
    assert torch.equal(ours, theirs)


def test_one_common_class_of_a_softmax_is_refused_and_of_maps_it_is_not(pair):
    student, teacher = pair
    names = {**NAMES, "teacher_class_names": ["sky", "x", "y", "z"]}
    for method in ("KD", "DKD", "NKD"):
        with refused(f"{method}.levels", "logits with 1 class", "2 classes or more"):
            acam_kd.distill(student, teacher, method=method, **LEVELS, **names)
    acam_kd.distill(student, teacher, method="CWD", **LEVELS, **names)
    student(BATCH)
    assert student.distillation.losses["loss_cwd_kl"] > 0


def test_a_step_of_logits_of_two_strides_is_reduced_and_resized(pair):
    student, teacher = pair
    teacher.head = nn.Conv2d(3, 4, 4, stride=4)
    acam_kd.distill(student, teacher, method="Mimic", **LEVELS, **NAMES)
    out = student(BATCH)
    with torch.no_grad():
        resized = F.interpolate(teacher(BATCH)[:, [2, 0]], (8, 8), mode="bilinear", align_corners=True)
    wanted = (out[:, [0, 2]] - resized).square().mean()
    torch.testing.assert_close(student.distillation.losses["loss_mimic_mse"], wanted)


def test_copies_pickles_and_observing_keep_the_common_classes(pair):
    student, teacher = pair
    acam_kd.distill(student, teacher, method="ACAMKD", **LEVELS, **NAMES)
    for twin in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        twin(BATCH)
        assert twin.distillation.classes == student.distillation.classes and twin.distillation.losses
    assert student.distillation.observe(BATCH)["logits"]["channel"].shape[-1] == 2
    assert list(student.state_dict()) == ["head.weight", "head.bias"]


def test_what_users_give_is_checked_and_inheritance_keeps_class_layers_apart(pair):
    student, teacher = Segmentor(3), Segmentor(3)
    with refused("class_map", "['a=b']", "student's name of a class -> the teacher's"):
        acam_kd.distill(student, teacher, method="KD", class_map=["a=b"], **LEVELS)
    with refused("student_class_names", "'a,b,c'", "a list of names"):
        acam_kd.distill(student, teacher, method="KD", student_class_names="a,b,c", **LEVELS)
    own = student.head.weight.clone()
    names = {"student_class_names": ["a", "b", "c"], "teacher_class_names": ["b", "a", "c"]}
    acam_kd.distill(student, teacher, method="KD", inherit="always", **LEVELS, **names)
    assert torch.equal(student.head.weight, own) and not torch.equal(own, teacher.head.weight)
    student.distillation.remove()
    acam_kd.distill(student, teacher, method="KD", inherit="always", **LEVELS)  # by shapes, as names are unknown
    assert torch.equal(student.head.weight, teacher.head.weight)


def test_a_mapping_is_checked_where_the_names_agree_too(pair):
    student, _ = pair
    same = {"student_class_names": ["a", "b", "c"], "teacher_class_names": ["a", "b", "c"]}
    with refused("class_map", "typo"):
        acam_kd.distill(student, Segmentor(3), method="KD", class_map={"typo": "zz"}, **LEVELS, **same)
