"""When a student is distilled: modes, nested and repeated calls, checkpoints, compiled, in half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from acam_kd import ConfigError

from .conftest import Net, attach


def test_evaluation_no_grad_and_inference_are_the_students_alone(x):
    model = attach()
    calls = []
    model.distillation.teacher.network.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert set(model(x)) == {"loss_cls"}  # PreciseBN, losses of a validation set
    with torch.inference_mode():
        assert set(model(x)) == {"loss_cls"}
    model.eval()(x)
    assert not calls and model.distillation.iteration == 0 and not model.distillation.losses
    assert len(model.train()(x)) == 2 and calls == [1]


def test_a_trunk_in_evaluation_mode_is_distilled(x):
    model = attach()
    model.body.eval()
    assert len(model(x)) == 2 and not model.body.training


def test_the_teacher_keeps_its_flags_and_two_students_share_it(x):
    teacher = Net().train()
    teacher.body[1].eval()
    first, second = attach(Net(), teacher), attach(Net(), teacher)
    statistics = copy.deepcopy(teacher.state_dict())
    for model in (first, second):
        sum(model(x).values()).backward()
    assert teacher.training and not teacher.body[1].training and all(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(v, statistics[k]) for k, v in teacher.state_dict().items())


class Nested(Net):
    """Looks at a second view of the batch by itself, as in self-training."""

    def forward(self, x, labels=None, again=True):
        if again and self.training:
            other = self.forward_view(x.flip(3))
            assert isinstance(other, dict) and set(other) == {"loss_cls"}
        return super().forward(x, labels)

    def forward_view(self, x):
        return self(x, again=False)


def test_a_nested_call_is_not_distilled(x):
    model, teacher = attach(Nested(), Net()), []
    model.distillation.teacher.network.register_forward_hook(lambda m, args, out: teacher.append(args[0]))
    assert set(model(x)) == {"loss_cls", "loss_pkd_pearson"}
    assert len(teacher) == 1 and torch.equal(teacher[0], x) and model.distillation.iteration == 0


def test_a_student_inside_of_another_module_and_one_inside_of_another_student(x):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            return self.inner(x)

    outer = Outer()
    attach(outer.inner)
    assert len(outer.train()(x)) == 2
    levels = {"c3": "inner.body.1"}
    attach(outer, Outer(), method="Mimic", student_levels=levels, teacher_levels=levels)
    assert set(outer(x)) == {"loss_cls", "loss_pkd_pearson", "loss_mimic_mse"}


def test_two_forwards_before_one_backward(x):
    model = attach(method="MGD")
    torch.stack([*model(x).values(), *model(x.flip(3)).values()]).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and model.distillation.iteration == 1


def test_steps_are_counted_unless_an_engine_does(x):
    model = attach(period=2)
    assert [len(model(x)) for _ in range(4)] == [2, 1, 2, 1]
    model.distillation.iteration = 7
    assert len(model(x)) == 1 and model.distillation.iteration == 7
    model.distillation.iteration = 8
    assert len(model(x)) == 2


@pytest.mark.parametrize("output", ["dict", "loss", "logits"])
def test_between_distilled_steps_every_parameter_has_a_gradient(x, output):
    model = attach(method="MGD", period=2)
    kinds = {"loss": lambda loss, logits: loss, "logits": lambda loss, logits: logits}
    model.output = kinds.get(output, model.output)
    for _ in range(2):
        model.zero_grad()
        out = model(x)
        if output == "logits":
            out = out.mean() + sum(model.distillation.losses.values())
        (sum(out.values()) if isinstance(out, dict) else out).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad.abs().sum() == 0 for p in model.distillation.parameters())
    model.distillation.iteration = 0


def test_a_step_that_raised_leaves_nothing(x):
    model = attach()
    model.fails = True
    with pytest.raises(ZeroDivisionError):
        model(x)
    model.fails = False
    handle = model.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x)
    handle.remove()
    assert len(model(x)) == 2
    try:
        raise KeyError
    except KeyError:  # a retry, in the handler of an error
        assert len(model(x)) == 2


def test_gradient_accumulation_adds_up(x):
    whole, parts = attach(method="Mimic"), None
    parts = copy.deepcopy(whole)
    for model in (whole, parts):
        model.body.eval()  # no statistics of a batch
    sum(whole(x).values()).backward()
    for image in x.split(1):
        (sum(parts(image).values()) / 2).backward()
    for p, q in zip(whole.parameters(), parts.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


class Checkpointed(Net):
    reentrant, around = False, True

    def forward(self, x, labels=None):
        body = self.body
        run = lambda x: body(x)  # noqa: E731
        features = checkpoint(run, x.requires_grad_() if self.reentrant else x, use_reentrant=self.reentrant)
        logits = self.head(features.mean((2, 3)))
        return {"loss_cls": logits.square().mean()}


def test_a_tap_inside_of_a_checkpoint(x):
    plain, model = attach(), attach(Checkpointed())
    model.load_state_dict(plain.state_dict())
    model.distillation.teacher = plain.distillation.teacher
    plain.body.eval(), model.body.eval()
    one, two = (m(x)["loss_pkd_pearson"] for m in (plain, model))
    one.backward()
    two.backward()
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(plain.body[0].weight.grad, model.body[0].weight.grad)
    inside = {"c3": "body.1"}
    model = attach(Checkpointed(), student_levels=inside, teacher_levels=inside)
    model.reentrant = True
    with pytest.raises(ConfigError) as error:
        model(x)
    assert "use_reentrant=True (use False)" in error.value.hint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_student_is_distilled(x, how):
    plain = attach(method="MGD")
    model = copy.deepcopy(plain)
    if how == "in place":
        model.compile(backend="eager")
        run = model
    else:
        run = torch.compile(model, backend="eager")
    for step in range(2):
        torch.manual_seed(step)
        here = run(x)
        torch.manual_seed(step)
        there = plain(x)
        assert list(here) == list(there)
        for name in here:
            torch.testing.assert_close(here[name], there[name])
    sum(here.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.fails = True
    with pytest.raises(ZeroDivisionError):
        run(x)
    model.fails = False
    assert len(run(x)) == 2


class Half(Net):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x, labels=None):
        return super().forward(x, labels)


@pytest.mark.parametrize("method", ["MGD", "PKD", "ACAMKD"])
def test_autocast_on_a_users_forward_holds_for_teacher_and_method(x, method):
    model, seen = attach(Half(), Net(), method=method), []
    model.distillation.teacher.network.body[0].register_forward_hook(lambda m, a, out: seen.append(out.dtype))
    losses = model(x)
    assert seen == [torch.bfloat16] and all(v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    decorated = {k: v.item() for k, v in losses.items()}
    plain = attach(Net(), model.distillation.teacher.network, method=method)
    plain.load_state_dict(model.state_dict())
    assert not torch.is_autocast_enabled("cpu") and set(plain(x)) == set(decorated)


def test_data_parallel_is_an_error_in_one_line(x):
    model = attach()
    replica = copy.copy(model)
    with pytest.raises(ConfigError) as error:
        replica(x)
    assert "nn.DataParallel" in error.value.hint
