"""The training step, with a detector of a few lines: what is trained, saved, moved, seen by whom, refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core import (
    Adapter,
    Distillation,
    FeatureSpec,
    MethodTap,
    ModuleAdapter,
    ModuleTap,
    Pixels,
    PixelTransform,
    Plan,
    Predictions,
    Reader,
    RunError,
    Targets,
    assemble,
)
from acam_kd.core.methods import SeveralMethods
from acam_kd.core.reader import as_mapping
from acam_kd.methods import ACAMKD, KD, MGD, Mimic

from .detectors import P3, Detector, build, refused


def backbone_features(network, batch):
    return network.backbone(batch)


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def plain(model):
    """A copy of the student alone."""
    twin = copy.deepcopy(model)
    twin.distillation.remove()
    return twin


def test_evaluation_is_exactly_the_student(batch):
    student = Detector()
    alone = copy.deepcopy(student)
    model = build(student=student).eval()
    assert model is student and torch.equal(model(batch), alone.eval()(batch))


def test_training_adds_the_losses_and_their_gradients_stay_out_of_the_teacher(batch):
    model = build(ACAMKD)
    losses = model(batch)
    assert set(losses) == {"loss_cls", "loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())


def test_distillation_reaches_the_students_backbone(batch):
    model = build()
    model(batch)["loss_mimic_mse"].backward()
    assert model.backbone.conv.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


def test_the_teacher_is_nobodys_submodule(batch):
    teacher = Detector()
    model = build(ACAMKD, teacher=teacher)
    theirs = {id(p) for p in teacher.parameters()}
    assert not theirs & {id(p) for p in model.parameters()}
    for state in (model.state_dict(), model.distillation.state_dict()):
        assert not [name for name in state if "teacher" in name]
    assert not [name for name, _ in model.named_modules() if "teacher" in name]


def test_the_state_is_the_plain_students_and_the_method_has_its_own(batch):
    model, alone = build(ACAMKD), Detector()
    assert list(model.state_dict()) == list(alone.state_dict())
    assert alone.load_state_dict(model.state_dict(), strict=True) and model.load_state_dict(
        alone.state_dict(), strict=True
    )
    own = model.distillation.state_dict()
    assert own and all(name.split(".")[0] != "method" for name in own)
    assert {name for name, _ in model.named_parameters()} == (
        {name for name, _ in alone.named_parameters()} | {f"distillation.method.{name}" for name in own}
    )
    other = build(ACAMKD)
    other.distillation.load_state_dict(own)
    assert all(torch.equal(x, own[name]) for name, x in other.distillation.state_dict().items())
    with pytest.raises(RunError) as error:
        build(Mimic).distillation.load_state_dict(own)
    assert "of ACAMKD, this run of Mimic" in error.value.what and error.value.where == "resuming"
    assert "{method}" in error.value.remedy


@pytest.mark.parametrize("training", [True, False])
def test_the_teacher_never_trains_whatever_its_mode_was(batch, training):
    teacher = Detector().train(training)
    model = build(teacher=teacher).train()
    before = copy.deepcopy(teacher.state_dict())
    flags = [p.requires_grad for p in teacher.parameters()]
    seen = []
    teacher.backbone.norm.register_forward_hook(
        lambda module, args, out: seen.append((module.training, out.requires_grad))
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        sum(model(batch).values()).backward()
        optimizer.step()
    assert seen == [(False, False)] * 2
    assert [module.training for module in teacher.modules()] == [training] * 5
    assert [p.requires_grad for p in teacher.parameters()] == flags
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(x, before[name]) for name, x in teacher.state_dict().items())
    assert not model.distillation.teacher(batch)["p3"].requires_grad


def test_one_teacher_teaches_two_students(batch):
    teacher = Detector()
    first, second = build(teacher=teacher), build(teacher=teacher)
    for model in (first, second):
        want = (model.backbone(batch)["p3"] - copy.deepcopy(teacher).eval().backbone(batch)["p3"]).square().mean()
        torch.testing.assert_close(model(batch)["loss_mimic_mse"], want)


def test_the_teacher_follows_the_model(batch):
    model = build().to(torch.float64)
    losses = model(batch.double())
    teacher = model.distillation.teacher
    assert teacher.network.conv.weight.dtype == torch.float32  # it may have other students
    assert all(loss.dtype == torch.float64 for loss in losses.values())
    teacher.pixels = PixelTransform(*BGR_AND_RGB)
    model.to("meta")
    teacher(batch.double().to("meta"))
    assert next(teacher.network.parameters()).device.type == "meta"
    assert teacher.pixels.scale.device.type == "meta"


def test_the_teacher_gets_the_very_batch_of_the_student(batch):
    model, seen = build(), []
    model.size = 32
    model.distillation.teacher.network.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.backbone.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model(batch)
    assert seen[0] is seen[1] and seen[0].shape[-1] == 32


def test_a_deep_copy_distils_on_its_own_and_shares_the_teacher(batch):
    model = build()
    model(batch)  # a step with a graph: it is left out of the copy
    twin = copy.deepcopy(model)
    assert twin.distillation is not model.distillation and twin.distillation.method is not model.distillation.method
    first = {k: v.item() for k, v in twin(batch).items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert {k: v.item() for k, v in twin(batch).items()} == pytest.approx(first, rel=1e-3)
    assert twin.distillation.teacher is model.distillation.teacher
    twin.distillation.remove()
    assert set(twin(batch)) == {"loss_cls"} and set(model(batch)) == {"loss_cls", "loss_mimic_mse"}


def test_nothing_to_distil_is_the_student_alone(batch):
    student = Detector()
    before = dict(student.__dict__)
    assert assemble(ModuleAdapter(student), None, Plan()) is None
    assert student.__dict__ == before and set(student(batch)) == {"loss_cls"}
    copy.deepcopy(student)  # no feature map is kept
    with refused("teacher", "none", "a model to learn from", "or no {method}"):
        assemble(ModuleAdapter(student), None, Plan(methods={"Mimic": {}}))


def test_it_can_be_taken_off_again(batch):
    student = Detector()
    before, names = dict(student.__dict__), [name for name, _ in student.named_modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in student.modules()]
    model = build(ACAMKD, student=student)
    model(batch)
    model.distillation.remove()
    assert [name for name, _ in student.named_modules()] == names and student.__dict__.keys() == before.keys()
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in student.modules()] == hooks
    assert set(student(batch)) == {"loss_cls"} and not hasattr(student, "distillation")
    assert set(build(student=student)(batch)) == {"loss_cls", "loss_mimic_mse"}  # another one takes its place


def test_a_student_is_attached_to_once():
    model = build()
    with refused("student", "one that has a distillation", "one without", "student.distillation.remove() first"):
        build(student=model)
    other = Detector()
    other.distillation = nn.Identity()
    with refused("student", "an attribute distillation of its own", "none"):
        build(student=other)
    with refused("teacher", "the student itself", "another model"):
        acam_kd.distill(other, other, method="Mimic")
    with refused("student", "DataParallel", "the model inside of it", "then wrap"):
        acam_kd.distill(nn.DataParallel(Detector()), Detector(), method="Mimic", student_levels={"p3": "module"})


def test_a_backbone_without_gradient_is_an_error(batch):
    model = build()
    model.backbone.requires_grad_(False)
    with refused("student", "no gradient at p3", "for Mimic to train", "checkpointed with use_reentrant=True"):
        model(batch)
    with torch.no_grad():  # as PreciseBN calls it
        assert set(model(batch)) == {"loss_cls"}


def test_a_student_whose_backbone_does_not_run_is_an_error(batch):
    class Bypass(Detector):
        def forward(self, batch):
            return {"loss_cls": self.head(self.backbone.forward(batch)["p3"]).mean()}  # hooks do not fire

    model = build(student=Bypass())
    with refused("student", "0 calls of backbone in one training step", "one call", "call it as a module, once"):
        model(batch)


def test_a_backbone_that_is_replaced_after_attaching_is_not_seen(batch):
    model = build()
    model.backbone = Detector().backbone
    with refused("student", "0 calls of backbone", "one call", "replaced after attaching is not seen"):
        model(batch)


def test_a_student_without_backbone_is_an_error():
    with refused("student_levels", "nothing", "level name -> path of a submodule", "Conv2d is of no known kind"):
        acam_kd.distill(nn.Conv2d(1, 1, 1), Detector(), method="Mimic")
    with refused("teacher_levels", "nothing", "level name -> path of a submodule", "Conv2d is of no known kind"):
        acam_kd.distill(Detector(), nn.Conv2d(1, 1, 1), method="Mimic")


def test_maps_of_other_sizes_are_an_error(batch):
    model = build()
    model.distillation.teacher.network.conv.stride = (4, 4)
    hint = "its strides are not what it claims"
    with refused("teacher", "4 x 4 positions at level p3", "the 2 x 2 of the student's p3", hint):
        model(batch)


def test_non_finite_losses_are_named_with_term_level_and_time(batch):
    model = build(ACAMKD)
    model.distillation.raise_if_not_finite(model(batch), when="iteration 6")
    with torch.no_grad():
        model.distillation.teacher.network.norm.running_mean.fill_(float("nan"))
    with pytest.raises(RunError) as error:
        model.distillation.raise_if_not_finite(model(batch), when="iteration 7")
    assert error.value.where == "iteration 7" and "\n" not in str(error.value)
    assert "loss_acam_spatial = nan" in error.value.what and "p3/spatial_mse" in error.value.what


def test_ratio_of_distillation_to_task(batch):
    model = build(alpha=2.0)
    losses = model(batch)
    assert model.distillation.metrics()["distillation_to_task"].item() == pytest.approx(
        (losses["loss_mimic_mse"] / losses["loss_cls"]).item()
    )


@pytest.mark.parametrize(("mask_gradient", "counted"), [("detached", 2), ("full", 3), ("reversed", 2), ("frozen", 2)])
def test_the_ratio_counts_the_losses_that_reach_the_student(mask_gradient, counted, batch):
    """With detached masks the diversity loss trains the masks alone, whatever its size."""
    model = build(ACAMKD, mask_gradient=mask_gradient)
    losses = model(batch)
    own = [losses[f"loss_acam_{term}"] for term in ("spatial", "channel", "diversity")[:counted]]
    expected = sum(own) / losses["loss_cls"]
    assert model.distillation.metrics()["distillation_to_task"].item() == pytest.approx(expected.item())


BGR_AND_RGB = (
    Pixels([103.5, 116.3, 123.7], [1.0, 1.0, 1.0], "BGR"),
    Pixels([123.7, 116.3, 103.5], [58.4, 57.1, 57.4], "RGB"),
)


def test_observing_gives_masks_and_changes_nothing(batch):
    model = build(ACAMKD)
    model.backbone.norm.eval()
    before, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    learnt = copy.deepcopy(model.distillation.state_dict())
    masks = model.distillation.observe(batch)["p3"]
    assert masks["spatial"].shape == (2, 6, 2, 2) and masks["channel"].shape == (2, 6, 4)
    assert not masks["spatial"].requires_grad and [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(learnt[name], tensor) for name, tensor in model.distillation.state_dict().items())
    with torch.no_grad():
        model.backbone.conv.weight.mul_(-3)
    again = model.distillation.observe(batch)["p3"]
    assert not torch.equal(again["spatial"], masks["spatial"])  # they move with the student


def test_observing_draws_no_number_of_training_and_asks_no_teacher_in_vain(batch):
    model = build(MGD)  # draws its masks
    state = torch.get_rng_state()
    first, second = (model.distillation.observe(batch)["p3"]["spatial"] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(first, second)
    without = build(Mimic)
    without.distillation.teacher.forward = None  # not to be called
    assert without.distillation.observe(batch) == {}


def test_nothing_of_a_step_is_kept_in_the_taps(batch):
    model, kept = build(ACAMKD), []
    handle = model.backbone.register_forward_hook(lambda module, args, out: kept.append(weakref.ref(out["p3"])))
    losses = {name: loss.item() for name, loss in model(batch).items()}
    gc.collect()
    assert kept[0]() is None and all(torch.tensor(x).isfinite() for x in losses.values())
    handle.remove()
    assert not any(tap.armed or tap.times for tap in model.distillation._reader._taps())


# Calls that are not distilled, and outputs that are no dict of losses.


def test_under_no_grad_in_evaluation_and_in_a_nested_call_nothing_is_distilled(batch):
    class Twice(Detector):
        def forward(self, batch, again=True):
            inner = self(batch, again=False) if again else {}
            assert set(inner) <= {"loss_cls"}
            return super().forward(batch)

    model = build(student=Twice())
    asked = []
    model.distillation.teacher.network.register_forward_hook(lambda *_: asked.append(1))
    with torch.no_grad():
        assert set(model(batch)) == {"loss_cls"}
    model.eval()
    model(batch, again=False)
    assert not asked and model.distillation.iteration == 0
    model.train()
    assert set(model(batch)) == {"loss_cls", "loss_mimic_mse"} and len(asked) == 1
    want = (model.backbone(batch)["p3"] - model.distillation.teacher(batch)["p3"]).square().mean()
    torch.testing.assert_close(model(batch)["loss_mimic_mse"], want)


def test_a_call_that_fails_before_the_forward_does_not_make_the_next_one_nested(batch):
    model = build()
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)  # after the distillation's own
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(batch)
    handle.remove()
    for _ in range(2):
        assert set(model(batch)) == {"loss_cls", "loss_mimic_mse"}


def test_a_compiled_student_distils_in_every_step(batch):
    model, alone = build(), build()
    alone.load_state_dict(model.state_dict())
    alone.distillation.teacher = model.distillation.teacher
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        losses, want = compiled(batch), alone(batch)
        assert set(losses) == {"loss_cls", "loss_mimic_mse"}
        torch.testing.assert_close(losses, want)
    torch._dynamo.reset()


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch 2.6 does not trace functions with a backward of their own"
)
@pytest.mark.parametrize("method", [Mimic, ACAMKD])
def test_a_method_is_compiled_in_place_and_whole(method, batch):
    """No option is needed for it: the distillation calls the module."""
    model = build(method)
    with torch.no_grad():
        for p in model.distillation.method.parameters():
            p.add_(0.1 * torch.randn_like(p))
    want = model(batch)
    sum(want.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch._dynamo.reset()
    model.distillation.method.compile(backend="aot_eager", fullgraph=True)
    model.zero_grad()
    losses = model(batch)
    torch.testing.assert_close(losses, want)
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name])
    assert model.distillation.metrics()
    torch._dynamo.reset()


def returning(make):
    class Student(Detector):
        def forward(self, batch):
            return make(super().forward(batch))

    return build(ACAMKD, student=Student())


def test_losses_in_a_tuple_are_joined_and_one_loss_is_added_up(batch):
    model = returning(lambda losses: (losses, "boxes"))
    losses, rest = model(batch)
    assert len(losses) == 4 and rest == "boxes"
    model = returning(lambda losses: losses["loss_cls"])
    alone = plain(model)(batch)
    total = model(batch)
    torch.testing.assert_close(total, alone + sum(model.distillation.losses.values()))
    assert total.dim() == 0 and total.requires_grad


def test_other_outputs_are_left_alone_and_their_losses_wait(batch):
    model = returning(lambda losses: {"out": losses["loss_cls"].expand(2, 3)})
    assert model(batch)["out"].shape == (2, 3)
    with refused(
        "student", "an output that cannot carry the losses", "a dict of losses", "student.distillation.losses"
    ):
        model(batch)
    model = returning(lambda losses: {"out": losses["loss_cls"].expand(2, 3)})
    for _ in range(3):
        output = model(batch)["out"].mean()
        losses = model.distillation.losses
        assert set(losses) == {"loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"}
        (output + sum(losses.values())).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_losses_of_one_name_are_refused(batch):
    model = returning(lambda losses: {"loss_acam_spatial": losses["loss_cls"]})
    with refused("method", "losses that the student has too: loss_acam_spatial", "names of its own"):
        model(batch)


# Logits.


LOGITS = {"logits": "head"}


def build_on_logits(method=Mimic, teacher_stride=8, levels=LOGITS, targets=None, **arguments):
    spec = {"logits": FeatureSpec(2, 8, logits=True)}
    teacher = Detector()
    teacher.backbone.conv.stride = (teacher_stride, teacher_stride)
    kind = {"student_levels": levels, "teacher_levels": levels, "targets": targets}
    return acam_kd.distill(Detector(), teacher, method=method(spec, spec, **arguments), **kind)


def logits_of(model, batch):
    """Return the predictions of the student, and of the teacher in evaluation, for a batch."""
    teacher = model.distillation.teacher.network
    with torch.no_grad():
        return model.head(model.backbone(batch)["p3"]), copy.deepcopy(teacher).eval()(batch)


def test_logits_are_tapped_where_they_are_made(batch):
    model = build_on_logits()
    losses = model(batch)
    student, teacher = logits_of(model, batch)
    torch.testing.assert_close(losses["loss_mimic_mse"], (student - teacher).square().mean())
    losses["loss_mimic_mse"].backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.backbone.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())
    assert model(batch)  # nothing was left in a tap
    assert not model.distillation.teacher.network._modules["head"]._forward_hooks


def test_a_teachers_logits_of_another_stride_are_resized_corner_to_corner(batch):
    model = build_on_logits(teacher_stride=4)
    student, teacher = logits_of(model, batch)
    assert student.shape[2:] == (2, 2) and teacher.shape[2:] == (4, 4)
    corners = teacher[:, :, ::3, ::3]
    torch.testing.assert_close(model(batch)["loss_mimic_mse"], (student - corners).square().mean())


def test_masks_on_logits_can_be_observed_and_a_deep_copy_is_its_own(batch):
    model = build_on_logits(ACAMKD)
    assert model.distillation.observe(batch)["logits"]["spatial"].shape == (2, 2, 2, 2)
    twin = copy.deepcopy(model)
    twin(batch)
    with torch.no_grad():
        twin.head.weight.zero_()
        twin.head.bias.fill_(5.0)
    before = model(batch)["loss_acam_spatial"]
    assert twin(batch)["loss_acam_spatial"] != before
    assert not [name for name in model.state_dict() if "teacher" in name]


class ClassReader:
    """An engine's reader of a class head: logits of every position are an anchor's, or a region's."""

    def __init__(self, head, regions=None):
        self.taps, self.regions = [MethodTap(head, "forward")], regions

    def read(self):
        logits = self.taps[0].read().output.flatten(2)[..., None]
        labels = torch.arange(logits.shape[2]).expand(len(logits), -1)[..., None] % 3 - 1
        return Predictions(logits, labels, self.regions)


class Known(Mimic):
    """Keeps what it was told."""

    reads = ("backbone", "logits", "classes")
    needs = ("boxes", "labels")

    def forward(self, student, teacher, targets):
        self.targets, self.student = targets, student
        return super().forward(student, teacher)


CLASSES = {"p3": FeatureSpec(4, 8), "classes": FeatureSpec(2, 0, logits=True, sigmoid=True)}


class ClassAdapter(Adapter):
    """An engine's adapter of a detector whose class head can be distilled."""

    offered = ("backbone", "classes")

    def __init__(self, model, regions=None):
        super().__init__(model)
        self.regions, self.asked = regions, []

    def levels(self, taps, *, side=0, student=False):
        return {name: spec for name, spec in CLASSES.items() if spec.tap in taps}

    def network(self, taps):
        def extract(network, batch, *regions):
            features = backbone_features(network, batch)
            if not regions:  # outside of a training step
                return features
            self.asked.extend(regions)
            return {**features, "classes": network.head(features["p3"]).flatten(2)[..., None]}

        return self.model, extract

    def reader(self, taps):
        tap = ModuleTap(self.model.backbone, "backbone")
        head = ClassReader(self.model.head, self.regions) if "classes" in taps else None
        return Reader([(tap, as_mapping)], batch_from=tap, class_head=head)

    def targets(self, reader, batch):
        return Targets(boxes=torch.full((1, 4), float(len(batch))), image_sizes=torch.full((len(batch), 2), 16.0))


def build_on_classes(method=Known, regions=None, levels=("p3", "classes")):
    spec = {level: CLASSES[level] for level in levels}
    student, teacher = ClassAdapter(Detector(), regions), ClassAdapter(Detector())
    assemble(student, teacher, Plan(methods=method(spec, spec)))
    return student.model, teacher.asked


def test_the_class_head_is_distilled_beside_the_backbone(batch):
    model, asked = build_on_classes(regions="those of the student")
    alone = plain(model)
    losses = model(batch)
    assert asked == ["those of the student"]
    assert torch.equal(alone(batch)["loss_cls"], losses["loss_cls"])
    known = model.distillation.method.targets
    assert torch.equal(known.labels["classes"], torch.tensor([[[-1], [0], [1], [-1]]] * 2))
    assert known.boxes.tolist() == [[2.0] * 4]
    assert model.distillation.method.student["classes"].shape == (2, 2, 4, 1)
    losses["loss_mimic_mse"].backward()
    assert model.head.weight.grad.abs().sum() > 0 and model.backbone.conv.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())


def test_a_method_gets_its_levels_only_and_targets_are_read_if_needed(batch):
    model, _ = build_on_classes(levels=("classes",))
    model(batch)
    assert list(model.distillation.method.student) == ["classes"]

    class OnClasses(Mimic):
        reads = ("backbone", "classes")

    model, _ = build_on_classes(OnClasses)
    model.distillation._read_targets = None  # would be called
    assert "loss_mimic_mse" in model(batch)


def test_a_step_that_failed_leaves_nothing_in_the_next(batch):
    model, _ = build_on_classes()
    head = model.head
    handle = head.register_forward_hook(lambda *_: 1 / 0)  # after the taps have recorded
    with pytest.raises(ZeroDivisionError):
        model(batch)
    assert not any(tap.armed or tap.times for tap in model.distillation._reader._taps())
    handle.remove()
    fresh = model(batch)
    assert fresh["loss_mimic_mse"].isfinite() and model.distillation.method.student["classes"].requires_grad


def test_other_numbers_of_anchors_are_refused(batch):
    model, _ = build_on_classes(levels=("classes",))
    model.distillation.teacher.network.backbone.conv.stride = (4, 4)
    hint = "the two heads must predict for the same anchors; see {method}"
    with refused("teacher", "16 x 1 positions at level classes", "the 4 x 1 of the student's classes", hint):
        model(batch)


def test_a_deep_copy_reads_its_own_class_head(batch):
    model, _ = build_on_classes()
    twin = copy.deepcopy(model)
    sum(twin(batch).values()).backward()
    assert model.head.weight.grad is None and twin.head.weight.grad is not None
    own, other = model.distillation._reader.class_head, twin.distillation._reader.class_head
    own.taps[0].arm(), other.taps[0].arm()
    twin.head(torch.zeros(1, 4, 1, 1))
    assert other.read().logits.shape == (1, 2, 1, 1)
    with refused("student", "0 calls of Conv2d.forward"):
        own.read()


BOXES = {"boxes": torch.zeros(0, 4), "image_sizes": torch.full((2, 2), 16.0)}


def test_labels_are_taken_at_the_nearest_position_of_the_logits(batch):
    model = build_on_logits(Known)
    labels = torch.full((2, 16, 16), -1)
    labels[:, 4::8, 4::8] = torch.tensor([[0, 1], [1, 0]])  # the middles of the 2 x 2 cells
    model.distillation._read_targets = lambda batch: Targets(**BOXES, labels={"logits": labels})
    model(batch)
    assert model.distillation.method.targets.labels["logits"].tolist() == [[[0, 1], [1, 0]]] * 2
    small = torch.tensor([[[0, -1], [1, 1]]] * 2)
    model.distillation._read_targets = lambda batch: Targets(**BOXES, labels={"logits": small})
    model(batch)
    assert model.distillation.method.targets.labels["logits"] is small


def test_labels_of_pixels_are_left_out_where_the_backbone_alone_is_distilled(batch):
    """An engine reads whatever annotations there are; those of a map that is not distilled have no size."""
    model = build(Known)
    model.distillation._read_targets = lambda batch: Targets(**BOXES, labels={"logits": torch.zeros(2, 16, 16)})
    assert "loss_mimic_mse" in model(batch)
    assert model.distillation.method.targets.labels == {}


def test_observing_several_methods_gives_the_masks_of_the_first_that_needs_no_targets(batch):
    class Blind(ACAMKD):
        needs = ("boxes",)

    classes = {"classes": CLASSES["classes"]}
    parts = {"Blind": Blind(P3, P3, num_masks=2), "Mimic": Mimic(P3, P3)}
    parts |= {"KD": KD(classes, classes), "ACAMKD": ACAMKD(P3, P3, num_masks=3)}
    model = Detector()
    built = assemble(ClassAdapter(model), ClassAdapter(Detector()), Plan(methods=SeveralMethods(parts)))
    assert isinstance(built, Distillation) and built is model.distillation
    before = {k: v.clone() for k, v in (model.state_dict() | built.state_dict()).items()}
    assert built.observe(batch)["p3"]["spatial"].shape == (2, 3, 2, 2)
    after = model.state_dict() | built.state_dict()
    assert model.training and all(torch.equal(before[k], v) for k, v in after.items())
    assert not built._reader.class_head.taps[0].times


def test_a_pickled_student_distils_on_its_own(batch):
    model = build(ACAMKD)
    model(batch)
    twin = pickle.loads(pickle.dumps(model))
    assert twin.distillation.teacher is not model.distillation.teacher
    sum(twin(batch).values()).backward()
    assert all(p.grad is not None for p in twin.parameters()) and all(p.grad is None for p in model.parameters())
