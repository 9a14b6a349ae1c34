"""Cheaper steps: distilling every k-th one, another precision or memory format, a compiled teacher."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from acam_kd.core import DISTILLER_REGISTRY, FrozenTeacher, ModuleAdapter, Plan, RunError, assemble
from acam_kd.core.outputs import with_unused
from acam_kd.methods import ACAMKD

from .detectors import Backbone, Detector, build, refused
from .test_distillers import READ, maps, specs, targets


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def calls(module):
    seen = []
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


# Every k-th step.


def periodic(period, method=ACAMKD):
    """A model and a copy of its student alone."""
    model = build(method, period=period)
    alone = copy.deepcopy(model)
    alone.distillation.remove()
    return model, alone


def test_between_distilled_steps_the_student_is_alone(batch):
    model, alone = periodic(3)
    teacher, method = calls(model.distillation.teacher.network), calls(model.distillation.method)
    for iteration in range(5):
        model.distillation.iteration = iteration
        losses = model(batch)
        want = alone(batch)
        assert torch.equal(losses["loss_cls"], want["loss_cls"])
        assert len(losses) == (4 if iteration in (0, 3) else 1)
    assert len(teacher) == len(method) == 2


def test_steps_are_counted_unless_an_engine_sets_them(batch):
    model, _ = periodic(3)
    found = []
    for _ in range(5):
        found.append(len(model(batch)))
        with torch.no_grad():
            model(batch)  # no step
        model.eval()(batch)
        model.train()
    assert found == [4, 1, 1, 4, 1] and model.distillation.iteration == 4
    model.distillation.iteration = 3
    assert [len(model(batch)) for _ in range(3)] == [4, 4, 4] and model.distillation.iteration == 3


def test_between_distilled_steps_every_parameter_has_a_gradient_and_the_students_is_its_own(batch):
    model, alone = periodic(2)
    model.distillation.iteration = 1
    model(batch)["loss_cls"].backward()
    alone(batch)["loss_cls"].backward()
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name].grad, p.grad) for name, p in alone.named_parameters())
    assert all(p.grad is not None and not p.grad.any() for p in model.distillation.method.parameters())
    taps = model.distillation._reader._taps()
    assert taps and not any(tap.armed or tap.times or tap._last for tap in taps)  # no feature is kept


def test_between_distilled_steps_an_output_without_losses_has_gradients_of_zero_waiting(batch):
    class Plain(Detector):
        def forward(self, batch):
            return self.head(self.backbone(batch)["p3"])

    model = build(ACAMKD, student=Plain(), period=2)
    model.distillation.iteration = 1
    output = model(batch)
    losses = model.distillation.losses
    assert {name: loss.item() for name, loss in losses.items()} == {"loss_unused": 0}
    (output.mean() + sum(losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.distillation.method.parameters())


def test_between_distilled_steps_momentum_and_weight_decay_go_on(batch):
    model, _ = periodic(2)
    model.distillation.iteration = 1
    before = [p.detach().clone() for p in model.distillation.method.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    model(batch)["loss_cls"].backward()
    optimizer.step()
    for p, was in zip(model.distillation.method.parameters(), before):
        torch.testing.assert_close(p.detach(), 0.95 * was)


def test_what_was_unused_adds_nothing():
    unused = nn.ParameterList([torch.full((2, 3), -1e30), torch.tensor(3.0)])
    losses = with_unused({"a": torch.tensor(2.0), "b": torch.tensor(3.0)}, unused)
    assert {k: v.item() for k, v in losses.items()} == {"a": 2, "b": 3}
    losses["a"].backward()
    assert [p.grad.abs().max().item() for p in unused] == [0, 0]
    assert with_unused({"a": torch.tensor(2.0)}, nn.Identity())["a"].item() == 2


def test_metrics_are_logged_where_they_were_measured():
    """Once in every window that has a distilled step, and, without a period, when they always were."""
    model = build().distillation
    for period in range(1, 8):
        for window in range(1, 8):
            model.period = period
            last, first = [], []
            for model.iteration in range(60):
                last += [model.iteration] * model.last_of(window)
                first += [model.iteration] * model.first_of(window)
            windows = {}
            for i in range(0, 60 + period, period):
                windows.setdefault(i // window, []).append(i)
            assert last == [i[-1] for i in windows.values() if i[-1] < 60]
            assert first == [i[0] for i in windows.values() if i[0] < 60]
            if period == 1:
                assert last == [i for i in range(60) if (i + 1) % window == 0]
                assert first == [i for i in range(60) if i % window == 0]


def test_a_period_of_nothing_is_refused():
    with refused("period", "0", ">= 1"):
        build(period=0)
    known = build().distillation
    with refused("period", "0", ">= 1"):
        type(known)(
            student=Detector(),
            teacher=known.teacher,
            method=known.method,
            levels=known.levels,
            shapes=known.shapes,
            reader=known._reader,
            student_side=known._side,
            period=0,
        )


# The teacher's precision.


def in_precision(precision):
    model = build(teacher_precision=precision)
    return model, calls(model.distillation.teacher.network.conv)


def made_in(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_teacher_alone_is_in_half_precision(batch, dtype):
    model, made = in_precision(made_in(dtype))
    student, network = calls(model.backbone.conv), model.distillation.teacher.network
    loss = model(batch)["loss_mimic_mse"]
    assert made[0].dtype == dtype and student[0].dtype == torch.float32 and loss.dtype == torch.float32
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    half, full = (FrozenTeacher(network, precision=p)(batch)["p3"] for p in (made_in(dtype), "float32"))
    own = model.backbone(batch)["p3"]
    torch.testing.assert_close(loss, (own - half.float()).square().mean())
    assert not torch.equal(half.float(), full)


def test_features_are_handed_over_in_the_students_type(batch):
    for precision, dtype in (("float32", torch.float32), ("", torch.bfloat16), ("float16", torch.float16)):
        model, made = in_precision(precision)
        got = []
        model.distillation.method.register_forward_pre_hook(lambda module, args, got=got: got.append(args[:2]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)
        ((student, teacher),) = got
        assert made[0].dtype == dtype
        assert teacher["p3"].dtype == student["p3"].dtype == torch.bfloat16


def test_a_teacher_that_overflows_is_named_with_its_argument_whatever_the_loss_is(batch):
    for precision, fails in (("float16", True), ("bfloat16", False), ("float32", False)):
        model, _ = in_precision(precision)
        with torch.no_grad():
            model.distillation.teacher.network.conv.weight.mul_(1e6)
        model(batch)
        losses = {"loss_bounded": torch.tensor(1.0)}
        if not fails:
            model.distillation.raise_if_not_finite(losses, when="iteration 7")
            continue
        with pytest.raises(RunError) as error:
            model.distillation.raise_if_not_finite(losses, when="iteration 7")
        assert error.value.where == "iteration 7" and error.value.what.endswith("not finite: p3")
        assert "the teacher's features, made in float16" in error.value.what
        assert "see {teacher_precision}" in error.value.remedy


def test_an_unknown_precision_is_refused():
    for make in (lambda: FrozenTeacher(Backbone(), precision="half"), lambda: build(teacher_precision="half")):
        with refused("teacher_precision", "half", "one of float32, float16, bfloat16, or empty for the student's"):
            make()


# Memory format.


def planned(student, teacher, **plan):
    adapters = ModuleAdapter(student), ModuleAdapter(teacher, role="teacher")
    torch.manual_seed(3)
    assemble(*adapters, Plan(methods={"ACAMKD": {}}, **plan))
    return student


def test_channels_last_changes_no_gradient_and_no_checkpoint(batch):
    student, teacher = Detector().double(), Detector().double()
    model = planned(copy.deepcopy(student), copy.deepcopy(teacher)).double()
    twin = planned(student, teacher, channels_last=True).double()
    for network in (twin.backbone, twin.distillation.teacher.network):
        assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not network.conv.weight.is_contiguous()
    method = [p for p in twin.distillation.method.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in method)
    made = calls(twin.distillation.teacher.network)
    for each in (model, twin):
        sum(each(batch.double()).values()).backward()
    assert made[0]["p3"].is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(q.grad, p.grad)
    plain = Detector().double()
    plain.load_state_dict(twin.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in twin.state_dict().items())
    assert plain.backbone.conv.weight.is_contiguous()


@pytest.mark.parametrize(("name", "kind"), READ)
def test_every_method_takes_channels_last(name, kind):
    """Maps that are not contiguous, as a ``view`` would want them."""
    distiller = DISTILLER_REGISTRY.get(name)(specs(kind), specs(kind))
    student, teacher, known = maps(kind), maps(kind), targets(kind)
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(3)
        own, other = ({k: x.to(memory_format=form) for k, x in xs.items()} for xs in (student, teacher))
        own = {k: x.requires_grad_() for k, x in own.items()}
        total = sum(distiller.to(memory_format=form)(own, other, known).values())
        found.append([total, *torch.autograd.grad(total, list(own.values()))])
    torch.testing.assert_close(found[1], found[0])


# A compiled teacher.


@pytest.fixture
def compilations(monkeypatch):
    """Graphs that were compiled; by a backend that does nothing, for inductor takes long."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def compiled():
    """A model whose teacher is compiled, and the same teacher as it is."""
    student, teacher = Detector(), Detector()
    eager = FrozenTeacher(copy.deepcopy(teacher.backbone))
    return planned(student, teacher, teacher_compile=True), eager


def test_a_compiled_teacher_gives_the_same_and_is_compiled_once_for_all_sizes(batch, compilations):
    model, eager = compiled()
    teacher = model.distillation.teacher
    for size in ((32, 48), (64, 32), (96, 96), (48, 128)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(teacher(image), eager(image))
    assert len(compilations) == 1
    assert list(teacher.network.state_dict()) == list(eager.network.state_dict())
    assert set(model(batch)) == {"loss_cls", "loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"}


def test_a_compiled_teacher_follows_the_model_and_its_copies_work(batch, compilations):
    model, _ = compiled()
    teacher = model.distillation.teacher
    single = teacher(batch)["p3"]
    twin = copy.deepcopy(model)
    assert twin.distillation.teacher is teacher
    copied = FrozenTeacher(copy.deepcopy(teacher.network))
    model.double()
    double = teacher(batch.double())["p3"]
    assert double.dtype == torch.float32 and len(compilations) == 1
    torch.testing.assert_close(double, single)
    torch.testing.assert_close(copied(batch)["p3"], single)
    torch.testing.assert_close(twin.distillation.teacher(batch)["p3"], single)  # back to the type of the twin's batch
    with torch.no_grad():
        teacher.network.conv.weight.zero_()
    assert not torch.equal(teacher(batch.double())["p3"], double)  # the weights are not frozen into the graph


def test_the_backbone_alone_is_compiled_where_there_is_a_head(batch, compilations):
    teacher = FrozenTeacher(Detector(), extract=lambda network, x: network.backbone(x), compiled=True)
    assert teacher(batch)["p3"].shape == (2, 4, 2, 2) and len(compilations) == 1


def test_where_nothing_can_be_compiled_one_line_says_so(batch, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with refused("teacher_compile", "True", "False", "it cannot be compiled here: ") as error:
        FrozenTeacher(Backbone(), compiled=True)(batch)
    assert "no compiler" in error.value.hint and "and much more" not in error.value.hint
