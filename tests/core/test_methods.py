"""Taps of a module, and several methods at once: names, levels, losses, reports."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from acam_kd.core import (
    DISTILLER_REGISTRY,
    FeatureSpec,
    MethodTap,
    Targets,
    choose_taps,
    methods,
    read_methods,
    read_request,
)
from acam_kd.core.methods import SeveralMethods
from acam_kd.methods import ACAMKD, KD, PKD, Mimic

from .detectors import refused

P3 = {"p3": FeatureSpec(4, 8)}
HEAD = {"classes": FeatureSpec(3, 0, logits=True, sigmoid=True)}
MAP = {"logits": FeatureSpec(3, 8, logits=True)}


def build_distiller(settings, student, teacher):
    requests = [read_request(name, options) for name, options in settings.items()]
    return methods.build_distiller(requests, [student] * len(requests), [teacher] * len(requests))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        return self.conv(x)

    def label(self, boxes, *, shift=0):
        return boxes + shift


class Owner(nn.Module):
    """A model, and beside it what reads it, as in ``Distillation``."""

    def __init__(self):
        super().__init__()
        self.head = Head()
        self.taps = [MethodTap(self.head, "forward"), MethodTap(self.head, "label")]

    def forward(self, x):
        return self.head(x), self.head.label(x, shift=2)

    def arm(self):
        for tap in self.taps:
            tap.arm()
        return self


X = torch.ones(1, 2, 1, 1)


def test_a_tap_gives_arguments_and_result_once():
    owner = Owner().arm()
    out, labels = owner(X)
    call = owner.taps[0].read()
    assert call.args == (X,) and call.first is X and call.output is out
    call = owner.taps[1].read()
    assert call.args == (X,) and call.kwargs == {"shift": 2} and call.output is labels and torch.equal(labels, X + 2)
    owner.arm()
    with refused("student", "0 calls of Head.forward in one training step", "one call", "replaced after attaching"):
        owner.taps[0].read()


def test_more_than_one_call_is_an_error_and_the_last_can_be_asked_for():
    owner = Owner().arm()
    owner(X), owner(X)
    with refused("student", "2 calls of Head.label in one training step", "one call"):
        owner.taps[1].read()
    owner.arm()
    last = owner.head.label(X)
    assert owner.taps[1].read().output is last
    owner.arm()(X)
    out, _ = owner(X)
    assert owner.taps[0].read(last=True).output is out
    owner.arm()
    with refused("student", "0 calls of Head.forward"):
        owner.taps[0].read(last=True)


def test_it_records_when_armed_only_in_whatever_mode_and_forgets_when_disarmed():
    owner = Owner()
    owner(X)
    assert not owner.taps[0].times
    with refused("student", "0 calls"):
        owner.taps[0].read()
    owner.eval().arm()  # a frozen head in evaluation mode is tapped too
    out, _ = owner(X)
    assert owner.taps[0].times and owner.taps[0].read().output is out
    owner.taps[0].disarm()
    owner(X)
    assert not owner.taps[0].times
    with refused("student", "0 calls"):
        owner.taps[0].read()


def test_nothing_of_a_step_is_kept_after_it():
    owner = Owner().arm()
    out, _ = owner(X)
    kept = weakref.ref(out)
    del out
    assert kept() is not None
    owner.taps[0].disarm()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("own", [False, True], ids=["of its class", "of its own"])
def test_a_tap_that_is_removed_leaves_the_module_as_it_was(own):
    head = Head()
    if own:
        head.label = lambda boxes: boxes + 5
    before = dict(head.__dict__)
    tap = MethodTap(head, "label")
    assert head.__dict__ != before
    tap.remove()
    assert head.__dict__ == before and torch.equal(head.label(X), X + 5 * own)
    tap.remove()  # nothing is left to take off
    assert head.__dict__ == before


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_taps_of_its_own(duplicate):
    owner = Owner().arm()
    owner(X)  # a step with a graph: it is left out of the copy
    twin = duplicate(owner)
    assert not any(tap.armed or tap.times for tap in twin.taps)
    with torch.no_grad():
        twin.head.conv.weight.zero_()
        twin.head.conv.bias.fill_(7.0)
    owner.arm(), twin.arm()
    out, _ = twin(X)
    assert torch.equal(out, torch.full((1, 3, 1, 1), 7.0))  # by the twin's weights
    assert twin.taps[0].read().output is out
    with refused("student", "0 calls"):
        owner.taps[0].read()
    twin.arm()
    own, _ = owner(X)
    assert owner.taps[0].read().output is own and not torch.equal(own, out)
    with refused("student", "0 calls"):
        twin.taps[0].read()


def test_a_tap_that_is_copied_before_its_module_works_too():
    tap = MethodTap(Head(), "forward")
    for twin in (copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
        twin.arm()
        out = twin._module(X)
        assert twin.read().output is out


def test_a_tapped_module_has_the_state_of_a_plain_one():
    assert list(Owner().state_dict()) == [f"head.{name}" for name in Head().state_dict()]
    assert [name for name, _ in Owner().named_modules()] == ["", "head", "head.conv"]


def test_names_are_read_in_order():
    assert read_methods("") == []
    assert read_methods("PKD") == ["PKD"] and read_methods("PKD + KD") == ["PKD", "KD"]
    with refused("method", "Nothing", "one of ACAMKD, ") as error:
        read_methods("PKD+Nothing")
    assert "Mimic" in error.value.allowed
    with refused("method", "", "one of ACAMKD, ") as error:
        read_methods("PKD+")
    assert error.value.value == "" and "found ''" in str(error.value)
    with refused("method", "KD+PKD+KD", "each method once"):
        read_methods("KD+PKD+KD")


@pytest.mark.parametrize(
    ("method", "offered", "taps"),
    [
        ("PKD", ("backbone", "classes"), ("backbone",)),
        ("KD", ("backbone", "classes"), ("classes",)),
        ("KD", ("logits", "backbone"), ("logits",)),
        ("FGD", ("logits", "backbone"), ("backbone",)),
    ],
)
def test_a_method_chooses_the_first_tap_that_it_reads(method, offered, taps):
    assert choose_taps(method, offered, "model") == taps


def test_a_method_that_reads_none_of_the_taps_is_refused():
    with refused("method", "KD", "one for what a Trunk gives: backbone", "KD distils logits or classes"):
        choose_taps("KD", ("backbone",), "Trunk")
    with refused("method", "KD", "one for p3 (stride 8", "KD distils logits or classes; see {taps}"):
        build_distiller({"PKD": {}, "KD": {}}, P3, P3)
    with refused("PKD.alpha", "-1.0", ">= 0"):
        build_distiller({"PKD": {"alpha": -1.0}, "Mimic": {}}, P3, P3)


def maps(**shapes):
    return {level: torch.randn(shape, requires_grad=True) for level, shape in shapes.items()}


def both():
    return maps(p3=(2, 4, 5, 6), classes=(2, 3, 9, 1)), maps(p3=(2, 4, 5, 6), classes=(2, 3, 9, 1))


def test_one_method_is_built_as_itself():
    built = build_distiller({"KD": {"alpha": 3.0}}, {**P3, **HEAD}, {**P3, **HEAD})
    assert isinstance(built, KD) and built.levels == ["classes"] and built.alpha == 3 and built.parts() == [built]


def test_losses_and_metrics_are_those_of_the_methods_alone():
    several = build_distiller({"PKD": {"alpha": 2.0}, "KD": {"temperature": 2.0}}, {**P3, **HEAD}, {**P3, **HEAD})
    assert isinstance(several, SeveralMethods) and several.levels == ["p3", "classes"]
    assert [type(x) for x in several.parts()] == [PKD, KD]
    student, teacher = both()
    losses = several(student, teacher)
    pkd, kd = PKD(P3, P3, alpha=2.0), KD(HEAD, HEAD, temperature=2.0)
    alone = pkd({"p3": student["p3"]}, {"p3": teacher["p3"]})
    alone |= kd({"classes": student["classes"]}, {"classes": teacher["classes"]})
    assert losses.keys() == alone.keys() and all(torch.equal(losses[name], alone[name]) for name in alone)
    named = {f"PKD/{k}": v for k, v in pkd.metrics().items()} | {f"KD/{k}": v for k, v in kd.metrics().items()}
    assert len(named) == 2 and several.metrics().keys() == named.keys()
    assert all(torch.equal(value, named[name]) for name, value in several.metrics().items())
    sum(losses.values()).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.values()) and all(x.grad is None for x in teacher.values())


class Strict(Mimic):
    """Notes what it is given, and warns."""

    needs = ("boxes",)

    def forward(self, student, teacher, targets=None):
        self.seen = list(student), list(teacher), targets
        return super().forward(student, teacher)

    def warnings(self):
        return {"p3": "too hot (key: ALPHA)"}


def test_each_gets_its_levels_and_all_get_the_targets(monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Strict", Strict)
    several = build_distiller({"Strict": {}, "DKD": {}}, {**P3, **HEAD}, {**P3, **HEAD})
    assert several.needs == ("boxes", "labels")
    targets = Targets(labels={"classes": torch.zeros(2, 9, 1, dtype=torch.int64)})
    losses = several(*both(), targets)
    assert several.parts()[0].seen == (["p3"], ["p3"], targets)
    assert set(losses) == {"loss_mimic_mse", "loss_dkd_target", "loss_dkd_nontarget"}
    assert several.warnings() == {"Strict/p3": "too hot (key: ALPHA)"}


def test_masks_are_those_of_the_first_that_has_any():
    several = build_distiller({"Mimic": {}, "ACAMKD": {"num_masks": 2}, "MGD": {}}, P3, P3)
    assert several.masks() == {}
    several({"p3": torch.randn(1, 4, 5, 6)}, {"p3": torch.randn(1, 4, 5, 6)})
    assert several.masks()["p3"]["spatial"].shape == (1, 2, 5, 6)
    assert torch.equal(several.masks()["p3"]["spatial"], several.parts()[1].masks()["p3"]["spatial"])


def test_what_several_have_learnt_is_saved_and_every_parameter_is_trained():
    first, second = (build_distiller({"Mimic": {}, "ACAMKD": {}, "KD": {}}, {**P3, **MAP}, {**P3, **MAP}) for _ in "ab")
    student, teacher = maps(p3=(2, 4, 5, 6), logits=(2, 3, 5, 6)), maps(p3=(2, 4, 5, 6), logits=(2, 3, 5, 6))
    losses = first(student, teacher)
    sum(losses.values()).backward()
    assert [name for name, p in first.named_parameters() if p.grad is None] == []
    assert any(not torch.equal(losses[name], other) for name, other in second(student, teacher).items())
    second.load_state_dict(first.state_dict(), strict=True)
    assert {k: v.item() for k, v in first.eval()(student, teacher).items()} == pytest.approx(
        {k: v.item() for k, v in second.eval()(student, teacher).items()}, rel=1e-6
    )
    assert {name.split(".")[1] for name in first.state_dict()} == {"Mimic", "ACAMKD"}
    assert isinstance(first.parts()[1], ACAMKD)
    twin = copy.deepcopy(first)
    with torch.no_grad():
        next(twin.parts()[0].parameters()).zero_()
    assert not torch.equal(next(first.parts()[0].parameters()), next(twin.parts()[0].parameters()))
