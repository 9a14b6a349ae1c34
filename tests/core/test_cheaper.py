"""What makes a step cheaper: distilling every k-th one, another precision, another memory format, a compiled teacher."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from acam_kd.core import DISTILLER_REGISTRY, FrozenTeacher
from acam_kd.core.distillers import ACAMKD
from acam_kd.core.losses import with_unused
from acam_kd.errors import as_options

from .test_distillers import READ, maps, specs, targets
from .test_model import Backbone, Detector, build


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def calls(module):
    seen = []
    module.register_forward_hook(lambda module, args, out: seen.append(out))
    return seen


# Every k-th step.


def periodic(period, method=ACAMKD):
    model = build(method)
    model.period = period
    return model


def test_between_distilled_steps_the_student_is_alone(batch):
    model = periodic(3)
    teacher, distiller = calls(model.teacher.network), calls(model.distiller)
    alone = copy.deepcopy(model.student)
    for iteration in range(5):
        model.iteration = iteration
        losses = model(batch)
        want = alone(batch)
        assert torch.equal(losses["loss_cls"], want["loss_cls"])
        assert len(losses) == (4 if iteration in (0, 3) else 1)
    assert len(teacher) == len(distiller) == 2


def test_between_distilled_steps_every_parameter_has_a_gradient_and_the_students_is_its_own(batch):
    model = periodic(2)
    alone = copy.deepcopy(model.student)
    model.iteration = 1
    model(batch)["loss_cls"].backward()
    alone(batch)["loss_cls"].backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.student.parameters(), alone.parameters()))
    assert all(p.grad is not None and not p.grad.any() for p in model.distiller.parameters())
    assert model._taps[0]._recorded is None  # no feature is kept until the next step


def test_between_distilled_steps_momentum_and_weight_decay_go_on(batch):
    model = periodic(2)
    model.iteration = 1
    before = [p.detach().clone() for p in model.distiller.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    model(batch)["loss_cls"].backward()
    optimizer.step()
    for p, was in zip(model.distiller.parameters(), before):
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
    model = build()
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
    model = build()
    with pytest.raises(ValueError, match=r"at least 1, not 0 \(key: DISTILL.PERIOD\)") as error:
        type(model)(student=Detector(), teacher=model.teacher, distiller=model.distiller, levels={}, period=0)
    assert as_options(str(error.value)).endswith("(option: --distill-period)")


# The teacher's precision.


def in_precision(precision):
    model = build()
    model.teacher = FrozenTeacher(model.teacher.network, precision=precision)
    return model, calls(model.teacher.network.conv)


def made_in(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_teacher_alone_is_in_half_precision(batch, dtype):
    model, made = in_precision(made_in(dtype))
    student = calls(model.student.backbone.conv)
    loss = model(batch)["loss_mimic_mse"]
    assert made[0].dtype == dtype and student[0].dtype == torch.float32 and loss.dtype == torch.float32
    assert {p.dtype for p in model.teacher.network.parameters()} == {torch.float32}
    half, full = (FrozenTeacher(model.teacher.network, precision=p)(batch)["p3"] for p in (made_in(dtype), "float32"))
    own = model.student.backbone(batch)["p3"]
    model._taps[0].clear()
    torch.testing.assert_close(loss, (own - half.float()).square().mean())
    assert not torch.equal(half.float(), full)


def test_features_are_handed_over_in_the_students_type(batch):
    for precision, dtype in (("float32", torch.float32), ("", torch.bfloat16), ("float16", torch.float16)):
        model, made = in_precision(precision)
        got = []
        model.distiller.register_forward_pre_hook(lambda module, args, got=got: got.append(args[:2]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(batch)
        ((student, teacher),) = got
        assert made[0].dtype == dtype
        assert teacher["p3"].dtype == student["p3"].dtype == torch.bfloat16


def test_a_teacher_that_overflows_is_named_with_its_key_whatever_the_loss_is(batch):
    for precision, fails in (("float16", True), ("bfloat16", False), ("float32", False)):
        model, _ = in_precision(precision)
        with torch.no_grad():
            model.teacher.network.conv.weight.mul_(1e6)
        model(batch)
        losses = {"loss_bounded": torch.tensor(1.0)}
        if not fails:
            model.raise_if_not_finite(losses, when="iteration 7")
            continue
        with pytest.raises(FloatingPointError, match="iteration 7: the teacher's .* float16, are not finite: p3 ") as e:
            model.raise_if_not_finite(losses, when="iteration 7")
        assert as_options(str(e.value)).endswith("option: --teacher-precision)")


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"one of float32, float16, bfloat16, not 'half' \(key: DISTILL.TEACHER.PREC"):
        FrozenTeacher(Backbone(), precision="half")


# Memory format.


def test_channels_last_changes_no_gradient_and_no_checkpoint(batch):
    model = build(ACAMKD).double()
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for network in (twin.student.backbone, twin.teacher.network):
        assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
        assert not network.conv.weight.is_contiguous()
    teacher = calls(twin.teacher.network)
    for each in (model, twin):
        sum(each(batch.double()).values()).backward()
    assert teacher[0]["p3"].is_contiguous(memory_format=torch.channels_last)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(q.grad, p.grad)
    plain = Detector().double()
    plain.load_state_dict(twin.student.state_dict())
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in twin.student.state_dict().items())
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


def test_a_compiled_teacher_gives_the_same_and_is_compiled_once_for_all_sizes(batch, compilations):
    model = build()
    names = list(model.teacher.network.state_dict())
    eager = copy.deepcopy(model.teacher)
    model.teacher = FrozenTeacher(model.teacher.network, compiled=True)
    for size in ((32, 48), (64, 32), (96, 96), (48, 128)):
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(model.teacher(image), eager(image))
    assert len(compilations) == 1
    assert list(model.teacher.network.state_dict()) == names
    assert set(model(batch)) == {"loss_cls", "loss_mimic_mse"}


def test_a_compiled_teacher_follows_the_model_and_its_copies_work(batch, compilations):
    model = build()
    model.teacher = FrozenTeacher(model.teacher.network, compiled=True)
    single = model.teacher(batch)["p3"]
    twin = copy.deepcopy(model)
    model.double()
    double = model.teacher(batch.double())["p3"]
    assert double.dtype == torch.float64 and len(compilations) == 2
    torch.testing.assert_close(double.float(), single)
    torch.testing.assert_close(twin.teacher(batch)["p3"], single)
    with torch.no_grad():
        model.teacher.network.conv.weight.zero_()
    assert not torch.equal(model.teacher(batch.double())["p3"], double)  # the weights are not frozen into the graph


def test_the_backbone_alone_is_compiled_where_there_is_a_head(batch, compilations):
    teacher = FrozenTeacher(Detector(), extract=lambda network, x: network.backbone(x), compiled=True)
    assert teacher(batch)["p3"].shape == (2, 4, 2, 2) and len(compilations) == 1


def test_where_nothing_can_be_compiled_one_line_says_so(batch, monkeypatch):
    def backend(graph, inputs):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"^the teacher cannot be compiled here: .*no compiler") as error:
        FrozenTeacher(Backbone(), compiled=True)(batch)
    assert "\n" not in str(error.value)
    assert as_options(str(error.value)).endswith("(option: --teacher-compile)")
