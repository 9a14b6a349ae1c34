"""The contract that every registered method keeps, also one from outside of the package."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from functools import partial

import pytest
import torch

from acam_kd.core import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY, FeatureSpec, Plan, Targets
from acam_kd.core.distiller import NOTHING_KNOWN, Distiller, align_levels
from acam_kd.core.errors import ConfigError
from acam_kd.core.registry import Registry
from acam_kd.methods import ACAMKD, Mimic

from ..conftest import MISSING
from ..contract import check_contract, features, fields, pyramid

NO_ADAPTER = {"PKD"}
FOR_ALL = [(name, method) for name, method in DISTILLER_REGISTRY if not method.families]
"""The methods that are for one kind of model have tests of their own."""
METHODS = [name for name, _ in FOR_ALL]
LEVELS = {
    "backbone": {"p3": (FeatureSpec(8, 8), (6, 7)), "p4": (FeatureSpec(8, 16), (3, 1))},
    "logits": {"logits": (FeatureSpec(5, 8, logits=True), (6, 7))},
    "classes": {"classes": (FeatureSpec(5, 0, logits=True, sigmoid=True), (20, 1))},
    "classes of regions": {"classes": (FeatureSpec(5, 0, logits=True), (1, 1))},
}
READ = [(name, kind) for name, method in FOR_ALL for kind in LEVELS if kind.split()[0] in method.reads]


def specs(kind):
    return {level: spec for level, (spec, _) in LEVELS[kind].items()}


def maps(kind, n=2, grad=False):
    """Make features of a kind, with the scale of a teacher's."""
    shapes = {level: (n, spec.channels, *size) for level, (spec, size) in LEVELS[kind].items()}
    return {level: torch.randn(shape).mul_(1.5).requires_grad_(grad) for level, shape in shapes.items()}


def targets(kind, n=2, boxes=2):
    """Make boxes on every image, and labels of which some are ignored and some are the background."""
    levels = LEVELS[kind].items()
    labels = {k: torch.randint(-1, s.channels + s.sigmoid, (n, *size)) for k, (s, size) in levels if s.logits}
    for given in labels.values():  # one position that counts at least
        given.view(-1)[:1] = 1
    corners = torch.rand(n * boxes, 2) * 20
    return Targets(
        boxes=torch.cat([corners, corners + 10 + torch.rand(n * boxes, 2) * 15], 1),
        box_images=torch.arange(n).repeat_interleave(boxes),
        image_sizes=torch.full((n, 2), 48.0),
        labels=labels,
        scores={k: torch.rand(n, 1, *size) for k, (s, size) in levels if not s.logits},
    )


@pytest.mark.parametrize(("name", "kind"), READ)
@pytest.mark.parametrize("n", [1, 2])
def test_contract(name, kind, n):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    check_contract(method, maps(kind, n, grad=True), maps(kind, n), targets(kind, n))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_contract_on_images_without_boxes(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    check_contract(method, maps(kind, grad=True), maps(kind), targets(kind, boxes=0))


@pytest.mark.parametrize("name", [name for name, method in FOR_ALL if "backbone" in method.reads])
@pytest.mark.parametrize("channels", [(8, 12), (12, 8)])
def test_contract_with_other_channels(name, channels):
    """A method that compares channel with channel refuses instead, and says which they are."""
    make = partial(DISTILLER_REGISTRY.get(name), pyramid(channels[0]), pyramid(channels[1]))
    if name in NO_ADAPTER:
        with pytest.raises(ConfigError) as error:
            make()
        expected = f"p3 with {channels[0]} channels in the student and {channels[1]} in the teacher"
        assert error.value.argument == "levels" and error.value.value == expected
        assert "{method}" in error.value.hint
    else:
        check_contract(make(), features(channels[0], grad=True), features(channels[1]), targets("backbone"))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_contract_under_autocast(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_contract(method, maps(kind, grad=True), maps(kind), targets(kind))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_no_gradient_reaches_the_teachers_features(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    teacher = maps(kind, grad=True)
    sum(method(maps(kind, grad=True), teacher, targets(kind)).values()).backward()
    assert all(f.grad is None for f in teacher.values())


@pytest.mark.parametrize(("name", "kind"), READ)
def test_what_is_needed_and_missing_is_named(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    if method.needs:
        with pytest.raises(ConfigError) as error:
            method(maps(kind), maps(kind))
        assert error.value.argument == "targets" and method.needs[0] in error.value.value
    else:
        assert method(maps(kind), maps(kind))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_copies_and_pickles_leave_the_last_step_out(name, kind):
    """The original keeps them."""
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    student = {level: 2 * x for level, x in maps(kind, grad=True).items()}  # no leaves
    method(student, maps(kind), targets(kind))
    metrics, masks = method.metrics(), method.masks()
    assert metrics and method._step
    buffer = io.BytesIO()
    torch.save(method, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(method), pickle.loads(pickle.dumps(method)), torch.load(buffer, weights_only=False)]
    for made in copies:
        assert made._step == {} and made.metrics() == {} and made.masks() == {}
        assert made.state_dict().keys() == method.state_dict().keys()
        assert all(torch.equal(value, method.state_dict()[key]) for key, value in made.state_dict().items())
        assert made(student, maps(kind), targets(kind)).keys() and made.metrics().keys() == metrics.keys()
    assert method.metrics().keys() == metrics.keys() and method.masks().keys() == masks.keys()
    assert all(torch.equal(value, method.metrics()[key]) for key, value in metrics.items())


class Keeping(Distiller):
    """A method that keeps a tensor with its graph, which torch refuses to copy."""

    def forward(self, student, teacher, targets=NOTHING_KNOWN):
        self._step = dict(student)
        return {"loss_keep_sum": sum(x.sum() for x in student.values())}


def test_a_method_with_a_graph_in_its_step_can_be_copied():
    method = Keeping(pyramid(8), pyramid(8))
    student = {level: 2 * x for level, x in features(8, grad=True).items()}
    method(student, features(8))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(method._step)
    assert copy.deepcopy(method)._step == {} and pickle.loads(pickle.dumps(method))._step == {}
    assert method._step == student


class LoneError(Distiller):
    """A method registered outside of the package."""

    reads = ("backbone",)

    def __init__(self, student, teacher, *, weight=1.0, power=2):
        super().__init__(student, teacher)
        self.weight, self.power, self.align = weight, power, align_levels(student, teacher)

    def forward(self, student, teacher, targets=NOTHING_KNOWN):
        aligned = {level: self.align[level](student[level]) for level in self.levels}
        errors = [(aligned[level] - teacher[level].detach()).abs().pow(self.power).mean() for level in self.levels]
        self._step["metrics"] = {f"{level}/error": error.detach() for level, error in zip(self.levels, errors)}
        return {"loss_lone_error": self.weight * sum(errors).float()}

    def metrics(self):
        return self._step.get("metrics", {})


class SumFusion(torch.nn.Module):
    """A fusion registered outside of the package."""

    def __init__(self, channels, *, query="teacher"):
        super().__init__()
        self.mix = torch.nn.Conv2d(2 * channels, channels, 1)

    def forward(self, student, teacher):
        return self.mix(torch.cat([student, teacher], 1))


class NearMasking(torch.nn.Module):
    """A masking over positions registered outside of the package: where the fused map is near to a unit."""

    kind = "spatial"

    def __init__(self, channels, *, num_masks):
        super().__init__()
        self.centres = torch.nn.Parameter(torch.randn(num_masks, channels, 1, 1))

    def forward(self, fused):
        return (-(fused[:, None] - self.centres).square().mean(2)).exp()


class SquareMasking(torch.nn.Module):
    """A masking over channels registered outside of the package."""

    kind = "channel"

    def __init__(self, *, num_masks):
        super().__init__()
        self.units = torch.nn.Parameter(torch.randn(num_masks, 1))

    def forward(self, fused):
        return (self.units * fused.mean((2, 3)).unsqueeze(1).square()).sigmoid()


OUTSIDE = {"fusion": "SumFusion", "spatial_masking": "NearMasking", "channel_masking": "SquareMasking"}


@pytest.fixture
def outside(monkeypatch):
    """Register the classes above, as a project of one's own does with the decorator."""
    for registry, *classes in (
        (DISTILLER_REGISTRY, LoneError),
        (FUSION_REGISTRY, SumFusion),
        (MASKING_REGISTRY, NearMasking, SquareMasking),
    ):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
        for made in classes:
            assert registry.register()(made) is made


@pytest.mark.parametrize("n", [1, 2])
def test_a_method_from_outside_keeps_the_contract(outside, n):
    kind = "backbone"
    method = DISTILLER_REGISTRY.get("LoneError")(specs(kind), specs(kind), power=1)
    check_contract(method, maps(kind, n, grad=True), maps(kind, n), targets(kind, n))


@pytest.mark.parametrize("arguments", [*({key: value} for key, value in OUTSIDE.items()), OUTSIDE])
@pytest.mark.parametrize(
    "form",
    [{}, {"mask_gradient": "full", "diversity": "ratio"}, {"standardize_fused": True}, {"mask_gradient": "frozen"}],
)
def test_fusions_and_maskings_from_outside_keep_the_contract(outside, arguments, form):
    method = ACAMKD(pyramid(8), pyramid(12), **form, **arguments)
    check_contract(method, features(8, grad=True), features(12))
    given = {"spatial": method.masking["spatial"]["p3"], "channel": method.masking["channel"]["p3"]}
    found = {"fusion": method.fusion["p3"], **{f"{kind}_masking": module for kind, module in given.items()}}
    assert {key: type(found[key]).__name__ for key in arguments} == arguments
    assert all(f"{key}={name}" in method.title() for key, name in arguments.items())


def check_outside(student, losses):
    """A step of a model that distils with ``LoneError`` and the parts of ``OUTSIDE``, trained to the last parameter."""
    lone, acam = student.distillation.method.parts()
    assert (lone.weight, lone.power, acam.num_masks) == (0.5, 1, 3)
    assert "fusion=SumFusion" in acam.title() and "spatial_masking=NearMasking" in acam.title()
    assert losses["loss_lone_error"] > 0 and losses["loss_acam_diversity"] > 0
    sum(losses.values()).backward()
    learnt = [p for p in student.distillation.parameters() if p.requires_grad]
    assert learnt and all(p.grad is not None and p.grad.isfinite().all() for p in learnt)


def test_the_torchvision_engine_takes_classes_from_outside(outside):
    from acam_kd.tv.distillation import build_distillation, parse_options
    from acam_kd.tv.models import build_model

    student, teacher = (build_model("fcos_mobilenet_v3_small_fpn64", num_classes=4, size=64) for _ in "ab")
    options = ["LoneError.weight=0.5", "LoneError.power=1", "ACAMKD.num_masks=3"]
    options += [f"ACAMKD.{key}={value}" for key, value in OUTSIDE.items()]
    build_distillation(student, teacher, Plan(methods=parse_options("LoneError+ACAMKD", options), taps=("backbone",)))
    truth = {"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}
    check_outside(student, student.train()([torch.rand(3, 64, 96)], [truth]))


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_the_detectron2_engine_takes_classes_from_outside(outside, root):
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from acam_kd.d2 import add_distillation_config

    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(root / "configs/quick_schedules/acam_instant.yaml"))
    opts = ["DISTILL.METHOD", "LoneError+ACAMKD", "DISTILL.LONEERROR.WEIGHT", 0.5, "DISTILL.LONEERROR.POWER", 1]
    opts += ["DISTILL.ACAMKD.NUM_MASKS", 3, "DISTILL.TEACHER.WEIGHTS", "random", "MODEL.DEVICE", "cpu"]
    cfg.merge_from_list(
        [*opts, *(x for key, value in OUTSIDE.items() for x in (f"DISTILL.ACAMKD.{key.upper()}", value))]
    )
    student = build_model(cfg).train()
    instances = Instances((64, 96), gt_boxes=Boxes(torch.tensor([[5.0, 5, 50, 50]])), gt_classes=torch.tensor([1]))
    image = {"image": torch.rand(3, 64, 96) * 255, "height": 64, "width": 96, "instances": instances}
    with EventStorage():
        check_outside(student, student([image] * 2))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_a_step_leaves_no_graph_behind(name, kind):
    """The memory of a graph that is kept would not be freed after the step."""
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    method(maps(kind, grad=True), maps(kind), targets(kind))
    kept = [value for masks in method.masks().values() for value in masks.values()]
    assert not any(value.requires_grad for value in [*method.metrics().values(), *kept])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_that_did_not_run_has_nothing_to_show(name):
    kind = DISTILLER_REGISTRY.get(name).reads[0]
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    assert method.metrics() == {} and method.masks() == {}
    assert set(method.warnings()) <= {"tokens"}


@pytest.mark.parametrize(("name", "kind"), READ)
def test_warnings_name_arguments_of_the_method_in_braces(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    method(maps(kind), maps(kind), targets(kind))
    for text in method.warnings().values():
        assert fields(text) and fields(text) <= set(inspect.signature(type(method)).parameters)


@pytest.mark.parametrize("name", METHODS)
def test_arguments_are_keyword_only_with_plain_defaults(name):
    """Front ends make settings of them."""
    parameters = list(inspect.signature(DISTILLER_REGISTRY.get(name)).parameters.values())
    assert [p.name for p in parameters[:2]] == ["student_channels", "teacher_channels"]
    for p in parameters[2:]:
        assert p.kind is inspect.Parameter.KEYWORD_ONLY and isinstance(p.default, (bool, int, float, str, list))
        assert p.name in DISTILLER_REGISTRY.get(name).__doc__


@pytest.mark.parametrize("name", METHODS)
def test_levels_must_agree(name):
    tap = DISTILLER_REGISTRY.get(name).reads[0]
    with pytest.raises(ConfigError) as error:
        DISTILLER_REGISTRY.get(name)(specs(tap), {"other": FeatureSpec(8, 8)})
    assert error.value.argument == "teacher_channels" and error.value.value == "the levels other"


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError) as error:
        DISTILLER_REGISTRY.get("ACAM")
    assert error.value.argument == "method" and error.value.value == "ACAM"
    assert error.value.allowed.startswith("one of ACAMKD, AT, CWD")


def test_a_registry_is_named_by_its_argument_or_else_by_its_name():
    for registry, argument in ((Registry("thing"), "thing"), (Registry("thing", argument="which"), "which")):
        registry.register(Mimic)
        assert registry.get("Mimic") is Mimic
        with pytest.raises(ConfigError) as error:
            registry.get("Nothing")
        assert (error.value.argument, error.value.allowed) == (argument, "one of Mimic")


def test_alignment_is_the_identity_where_channels_match():
    same, other = align_levels(pyramid(6), pyramid(6)), align_levels(pyramid(6), pyramid(9))
    x = torch.randn(1, 6, 3, 3)
    assert torch.equal(same["p3"](x), x)
    assert other["p4"](x).shape == (1, 9, 3, 3)


def test_logits_are_compared_as_they_are():
    """They are compared class with class: a trained 1x1 convolution between them could exchange classes."""
    levels = {"logits": FeatureSpec(5, 8, logits=True)}
    method = Mimic(levels, levels)
    assert not list(method.parameters())
    student, teacher = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    loss = method({"logits": student}, {"logits": teacher})["loss_mimic_mse"]
    torch.testing.assert_close(loss, (student - teacher).square().mean())
