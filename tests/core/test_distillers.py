"""The contract that every registered method keeps, and the behaviour of ACAM-KD and its controls."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from functools import partial
from string import Formatter

import pytest
import torch

from acam_kd.core import DISTILLER_REGISTRY, FUSION_REGISTRY, MASKING_REGISTRY, FeatureSpec, Plan, Targets
from acam_kd.core.distiller import NOTHING_KNOWN, Distiller, align_levels, method_arguments
from acam_kd.core.errors import ConfigError
from acam_kd.core.methods import build_distiller
from acam_kd.core.options import read_request
from acam_kd.core.registry import Registry
from acam_kd.core.renamed import _warn_once
from acam_kd.methods import ACAMKD, Mimic
from acam_kd.methods.acam.method import _pooling_factor
from acam_kd.methods.parts.losses import mse

from ..conftest import MISSING

NO_ADAPTER = {"PKD"}
METHODS = [name for name, _ in DISTILLER_REGISTRY]
VARIANTS = {
    "default": {},
    "full": {"mask_gradient": "full"},
    "standardised": {"standardize_fused": True},
    "spatial": {"channel_masking": ""},
    "channel": {"spatial_masking": ""},
    "channel standardised": {"spatial_masking": "", "standardize_fused": True},
    "uniform": {"spatial_masking": "UniformMasking", "channel_masking": ""},
    "teacher": {"fusion": "TeacherFusion"},
    "student query": {"query": "student"},
    "one mask": {"num_masks": 1},
    "literal": {"mask_gradient": "full", "diversity": "ratio"},
    "detached, ratio": {"diversity": "ratio"},
    "no diversity": {"lambda_div": 0.0},
    "frozen": {"mask_gradient": "frozen"},
    "keys pooled": {"max_positions": 20},
    "all pooled": {"max_positions": 20, "pooling": "all"},
}


def pyramid(channels):
    return {"p3": FeatureSpec(channels, 8), "p4": FeatureSpec(channels, 16)}


def features(channels, n=2, size=6, grad=False, dtype=torch.float32):
    shapes = {"p3": (n, channels, size, size + 1), "p4": (n, channels, size // 2, 1)}
    return {name: torch.randn(shape, dtype=dtype, requires_grad=grad) for name, shape in shapes.items()}


LEVELS = {
    "backbone": {"p3": (FeatureSpec(8, 8), (6, 7)), "p4": (FeatureSpec(8, 16), (3, 1))},
    "logits": {"logits": (FeatureSpec(5, 8, logits=True), (6, 7))},
    "classes": {"classes": (FeatureSpec(5, 0, logits=True, sigmoid=True), (20, 1))},
    "classes of regions": {"classes": (FeatureSpec(5, 0, logits=True), (1, 1))},
}
READ = [(name, kind) for name, method in DISTILLER_REGISTRY for kind in LEVELS if kind.split()[0] in method.reads]


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


def check_contract(method, student, teacher, known=NOTHING_KNOWN):
    losses = method(student, teacher, known)
    assert losses and all(key.startswith(f"loss_{type(method).__name__.lower()[:4]}") for key in losses)
    assert all(loss.shape == () and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(f.grad is not None and f.grad.isfinite().all() for f in student.values())
    assert sum(f.grad.abs().sum() for f in student.values()) > 0
    for name, value in method.metrics().items():
        assert value.shape == () and not value.requires_grad, name
        assert name.rpartition("/")[0] in student, name


@pytest.mark.parametrize(("name", "kind"), READ)
@pytest.mark.parametrize("n", [1, 2])
def test_contract(name, kind, n):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    check_contract(method, maps(kind, n, grad=True), maps(kind, n), targets(kind, n))


@pytest.mark.parametrize(("name", "kind"), READ)
def test_contract_on_images_without_boxes(name, kind):
    method = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    check_contract(method, maps(kind, grad=True), maps(kind), targets(kind, boxes=0))


@pytest.mark.parametrize("name", [name for name, method in DISTILLER_REGISTRY if "backbone" in method.reads])
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
@pytest.mark.parametrize("variant", ["default", "literal", "standardised", "frozen"])
def test_fusions_and_maskings_from_outside_keep_the_contract(outside, arguments, variant):
    method = ACAMKD(pyramid(8), pyramid(12), **VARIANTS[variant], **arguments)
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


def fields(text):
    """Return the names in braces of a text."""
    return {field for _, field, _, _ in Formatter().parse(text) if field is not None}


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


class Younger(Distiller):
    """A method with a former argument and a former value."""

    renamed = {"strength": "weight"}
    renamed_values = {"form": {"old": "new"}}

    def __init__(self, student, teacher, *, weight=1.0, form="new"):
        super().__init__(student, teacher)
        self.weight, self.form = weight, form


class Youngest(Younger):
    """A subclass without a constructor of its own."""


@pytest.fixture
def forgetful():
    """Former names are reported once per process: forget that they were."""
    _warn_once.cache_clear()


@pytest.mark.parametrize("method", [Younger, Youngest])
def test_former_names_and_values_are_read_with_one_line(method, forgetful, caplog):
    for _ in "ab":
        built = method(pyramid(8), pyramid(8), strength=2.0, form="old")
        assert (built.weight, built.form) == (2.0, "new")
    assert caplog.messages == [
        "Younger.strength is called Younger.weight now; the former name is still read",
        "Younger.form: old is called new now; the former value is still read",
    ]
    assert method_arguments(method) == {"weight": 1.0, "form": "new"}  # what front ends make settings of


def test_current_names_need_no_line(forgetful, caplog):
    assert Younger(pyramid(8), pyramid(8), weight=2.0, form="new").weight == 2.0
    assert Younger(pyramid(8), pyramid(8)).weight == 1.0 and not caplog.messages


def test_both_names_may_be_given_if_they_agree():
    assert Younger(pyramid(8), pyramid(8), strength=2.0, weight=2.0).weight == 2.0
    with pytest.raises(ConfigError) as error:
        Younger(pyramid(8), pyramid(8), strength=2.0, weight=1.0)
    assert error.value.render(str) == (
        "Younger.weight: found 1.0 and 2.0, expected one value; leave Younger.strength out, its former name"
    )
    assert error.value.render(lambda argument: argument.upper()).endswith("leave YOUNGER.STRENGTH out, its former name")


def test_former_names_are_read_where_methods_are_built_by_name(forgetful, caplog, monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Younger", Younger)
    request = read_request("Younger", {"strength": 2.0, "form": "old"})
    built = build_distiller([request], [pyramid(8)], [pyramid(8)])
    assert (built.weight, built.form) == (2.0, "new") and len(caplog.messages) == 2
    with pytest.raises(ConfigError) as error:  # its type is checked under the name of today
        read_request("Younger", {"strength": "much"})
    assert (error.value.argument, error.value.allowed) == ("Younger.weight", "float, as 1.0")


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant):
    check_contract(ACAMKD(pyramid(8), pyramid(12), **VARIANTS[variant]), features(8, grad=True), features(12))


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


@pytest.mark.parametrize(("chosen", "features", "logits"), [(0, 6, 19), (3, 3, 3)])
def test_there_are_as_many_masks_as_classes_on_logits(chosen, features, logits):
    levels = {"p3": FeatureSpec(8, 8), "logits": FeatureSpec(19, 8, logits=True)}
    method = ACAMKD(levels, levels, num_masks=chosen)
    maps = {"p3": torch.randn(1, 8, 2, 3), "logits": torch.randn(1, 19, 2, 3)}
    method(maps, maps)
    masks = method.masks()
    assert masks["p3"]["spatial"].shape == (1, features, 2, 3) and masks["p3"]["channel"].shape == (1, features, 8)
    assert masks["logits"]["spatial"].shape == (1, logits, 2, 3)
    assert masks["logits"]["channel"].shape == (1, logits, 19)


def test_uniform_masks_are_plain_mimicking():
    uniform = ACAMKD(pyramid(8), pyramid(8), alpha=3.0, **VARIANTS["uniform"])
    student, teacher = features(8), features(8)
    expected = Mimic(pyramid(8), pyramid(8), alpha=3.0)(student, teacher)["loss_mimic_mse"]
    torch.testing.assert_close(uniform(student, teacher), {"loss_acam_spatial": expected})


def test_acam_starts_as_strong_as_plain_mimicking():
    """Masks start at one half, where each of L_s and L_c is half the mean squared error."""
    student, teacher = features(8), features(8)
    losses = ACAMKD(pyramid(8), pyramid(8))(student, teacher)
    plain = sum(mse(student[k], teacher[k]) for k in student)
    torch.testing.assert_close(losses["loss_acam_spatial"] + losses["loss_acam_channel"], plain, rtol=0.05, atol=0)


def test_detached_masks_are_trained_by_diversity_alone():
    method = ACAMKD(pyramid(8), pyramid(8))
    student = features(8, grad=True)
    losses = method(student, features(8))
    (losses["loss_acam_spatial"] + losses["loss_acam_channel"]).backward(retain_graph=True)
    mask_parameters = [p for n, p in method.named_parameters() if not n.startswith("align")]
    assert mask_parameters and all(p.grad is None for p in mask_parameters)
    before = [f.grad.clone() for f in student.values()]
    losses["loss_acam_diversity"].backward()
    assert all(p.grad is not None for p in mask_parameters)
    assert all(torch.equal(f.grad, g) for f, g in zip(student.values(), before))


def test_masks_with_the_full_gradient_are_trained_by_everything():
    method = ACAMKD(pyramid(8), pyramid(8), mask_gradient="full")
    losses = method(features(8), features(8))
    (losses["loss_acam_spatial"] + losses["loss_acam_channel"]).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_weights_scale_their_terms():
    torch.manual_seed(1)
    one = ACAMKD(pyramid(8), pyramid(8))
    three = ACAMKD(pyramid(8), pyramid(8), alpha=3.0, lambda_div=0.5)
    three.load_state_dict(one.state_dict())
    student, teacher = features(8), features(8)
    a, b = one(student, teacher), three(student, teacher)
    for name, factor in (("spatial", 3), ("channel", 3), ("diversity", 0.5)):
        torch.testing.assert_close(b[f"loss_acam_{name}"], factor * a[f"loss_acam_{name}"])


def test_standardised_masks_do_not_depend_on_the_scale_of_the_features():
    method = ACAMKD(pyramid(8), pyramid(8), standardize_fused=True, fusion="TeacherFusion")
    student, teacher = features(8), features(8)
    metrics = []
    for scale in (1.0, 50.0):
        method({k: v * scale for k, v in student.items()}, {k: v * scale for k, v in teacher.items()})
        metrics.append({k: v for k, v in method.metrics().items() if k.endswith(("mean", "std", "dice"))})
    torch.testing.assert_close(metrics[0], metrics[1], rtol=1e-4, atol=1e-5)
    assert metrics[0]["p3/spatial_std"] > 1e-3 and metrics[0]["p3/channel_std"] > 1e-4


def test_metrics_are_those_of_the_masks():
    method = ACAMKD(pyramid(8), pyramid(8), **{**VARIANTS["uniform"], "channel_masking": "ChannelMasking"})
    method(features(8), features(8))
    metrics = method.metrics()
    assert metrics["p3/spatial_mean"] == 1 and metrics["p3/spatial_std"] == 0
    assert metrics["p3/spatial_min_sum"] == 6 * 7 and metrics["p3/spatial_dice"].item() == pytest.approx(1)
    assert 0.45 < metrics["p4/channel_mean"] < 0.55 and metrics["p4/channel_min_sum"] < 8


def test_a_collapse_is_reported_with_level_and_argument():
    method = ACAMKD(pyramid(8), pyramid(8), fusion="TeacherFusion", mask_gradient="full", channel_masking="")
    student = features(8, size=20)
    teacher = {level: torch.rand_like(v) + 1 for level, v in student.items()}
    method(student, teacher)
    assert method.warnings() == {}
    with torch.no_grad():
        method.masking["spatial"]["p3"].units[:3].fill_(-2.0)  # sigmoid(-16) and less
        teacher["p3"][0, :, 0, 0] = -1  # one position of 840 that is selected does not make a mask
    method(student, teacher)
    ((place, warning),) = method.warnings().items()
    assert place == "p3/spatial" and "3 of 6 spatial masks of level p3" in warning
    assert "set {mask_gradient} to 'detached'" in warning
    method.mask_gradient = "detached"
    assert "set {standardize_fused} to True" in method.warnings()[place]
    method.standardize_fused = True
    assert "lower {lambda_div}" in method.warnings()[place] and fields(method.warnings()[place]) == {"lambda_div"}


def test_frozen_masks_are_trained_by_nothing():
    method = ACAMKD(pyramid(8), pyramid(8), mask_gradient="frozen")
    losses = method(features(8, grad=True), features(8))
    assert set(losses) == {"loss_acam_spatial", "loss_acam_channel"}
    assert {n.split(".")[0] for n, p in method.named_parameters() if p.requires_grad} == {"align"}


def test_no_images_have_no_metrics():
    method = ACAMKD(pyramid(8), pyramid(8))
    losses = method(features(8, 0, grad=True), features(8, 0))
    assert sum(losses.values()) == 0 and method.metrics() == {}


@pytest.mark.parametrize(("query", "pooled"), [("teacher", "student"), ("student", "teacher")])
def test_pooled_keys_are_those_of_the_key_value_source(query, pooled):
    """Of 6 x 7 positions, at most 20: 3 x 4 means of 2 x 2, or of fewer at the border; masks keep their size."""
    level = {"p3": FeatureSpec(8, 8)}
    method = ACAMKD(level, level, max_positions=20, query=query)
    maps = {"student": torch.randn(2, 8, 6, 7), "teacher": torch.randn(2, 8, 6, 7)}
    method(*({"p3": x} for x in maps.values()))
    means = torch.nn.functional.interpolate(maps[pooled][..., :6], (3, 3), mode="area")
    means = torch.cat([means, maps[pooled][..., 6:].unflatten(2, (3, 2)).mean(3)], 3)
    fused = method.fusion["p3"](**{**maps, pooled: means})
    expected = {kind: masking["p3"](fused) for kind, masking in method.masking.items()}
    torch.testing.assert_close(method.masks()["p3"], expected)


@pytest.mark.parametrize("width", [8, 7])
def test_with_all_pooled_the_masks_are_scaled_up(width):
    """Each mean of 2 x 2 covers its own four positions, also where the border cuts it."""
    level = {"p3": FeatureSpec(8, 8)}
    method, small = ACAMKD(level, level, max_positions=12, pooling="all"), ACAMKD(level, level)
    small.load_state_dict(method.state_dict())
    student, teacher = torch.randn(2, 8, 6, width), torch.randn(2, 8, 6, width)
    method({"p3": student}, {"p3": teacher})
    small(*({"p3": torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True)} for x in (student, teacher)))
    masks, expected = method.masks()["p3"], small.masks()["p3"]
    torch.testing.assert_close(masks["channel"], expected["channel"])
    scaled = torch.nn.functional.interpolate(expected["spatial"], (6, 8), mode="bilinear")
    torch.testing.assert_close(masks["spatial"], scaled[..., :width])


def test_only_attention_is_made_cheaper_by_pooling():
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), fusion="TeacherFusion", max_positions=9)
    assert error.value.argument == "max_positions" and error.value.value == 9
    assert error.value.allowed.startswith("0 for TeacherFusion, which has no attention")
    assert fields(error.value.hint) == {"max_positions", "fusion"}


def test_masks_of_another_size_are_refused():
    """A fusion from outside may give them; nothing is scaled that was not pooled."""
    method = ACAMKD(pyramid(8), pyramid(8))
    method.fusion["p3"] = torch.nn.Module()
    method.fusion["p3"].forward = lambda student, teacher: teacher[..., :3]
    with pytest.raises(ValueError, match="masks .* do not fit features"):
        method(features(8), features(8))


def test_levels_within_the_limit_are_not_pooled():
    limited, plain = ACAMKD(pyramid(8), pyramid(8), max_positions=42), ACAMKD(pyramid(8), pyramid(8))
    limited.load_state_dict(plain.state_dict())
    student, teacher = features(8), features(8)
    assert limited(student, teacher) == plain(student, teacher)
    limited.max_positions = 41
    limited(student, teacher)
    assert not torch.equal(limited.masks()["p3"]["spatial"], plain.masks()["p3"]["spatial"])
    assert torch.equal(limited.masks()["p4"]["spatial"], plain.masks()["p4"]["spatial"])


@pytest.mark.parametrize(
    ("size", "limit", "factor"), [((6, 7), 0, 0), ((6, 7), 42, 0), ((6, 7), 41, 2), ((6, 7), 11, 3), ((1, 50), 7, 8)]
)
def test_the_smallest_whole_factor_that_will_do(size, limit, factor):
    assert _pooling_factor(*size, limit) == factor


@pytest.mark.parametrize(
    ("arguments", "value", "allowed"),
    [
        ({"max_positions": -1}, "-1", ">= 0"),
        ({"pooling": "values"}, "values", "one of keys, all"),
        ({"alpha": -1.0}, "-1.0", ">= 0 and finite"),
        ({"alpha": float("nan")}, "nan", ">= 0 and finite"),
        ({"lambda_div": -0.1}, "-0.1", ">= 0 and finite"),
        ({"num_masks": -1}, "-1", ">= 0"),
        ({"mask_gradient": "none"}, "none", "one of detached, full, frozen"),
        ({"diversity": "mean"}, "mean", "one of pairwise, ratio"),
        (
            {"channel_masking": "UniformMasking"},
            "UniformMasking, which makes spatial masks",
            "a masking of channel masks",
        ),
        (
            {"spatial_masking": "ChannelMasking"},
            "ChannelMasking, which makes channel masks",
            "a masking of spatial masks",
        ),
        ({"query": "both", "spatial_masking": "UniformMasking", "channel_masking": ""}, "both", "teacher or student"),
        ({"spatial_masking": "", "channel_masking": ""}, "no masks of either kind", "at least one masking"),
        ({"query": "both"}, "both", "teacher or student"),
    ],
)
def test_bad_arguments_are_named(arguments, value, allowed):
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), **arguments)
    assert error.value.argument == next(iter(arguments))
    assert str(error.value.value) == value and error.value.allowed == allowed
    assert fields(error.value.hint) <= set(inspect.signature(ACAMKD).parameters)


@pytest.mark.parametrize("argument", ["fusion", "spatial_masking", "channel_masking"])
def test_unknown_modules_list_the_known(argument):
    with pytest.raises(ConfigError) as error:
        ACAMKD(pyramid(8), pyramid(8), **{argument: "Nonsense"})
    assert error.value.argument == argument and error.value.value == "Nonsense"
    assert error.value.allowed.startswith("one of ")
