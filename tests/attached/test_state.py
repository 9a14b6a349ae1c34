"""The student stays the student: names, state, copies, checkpoints, traces, and removal."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from acam_kd import ConfigError, RunError

from .conftest import LEVELS, Net, attach, hooks, one_loss


def test_names_and_state_are_the_plain_ones(student):
    plain = Net()
    names = [n for n, _ in student.named_parameters()]
    assert [n for n in names if not n.startswith("distillation.")] == [n for n, _ in plain.named_parameters()]
    assert len(names) > len(list(plain.named_parameters())) and isinstance(student, Net)
    assert list(student.state_dict()) == list(plain.state_dict())
    whole = nn.ModuleDict({"model": student})
    assert list(whole.state_dict()) == [f"model.{name}" for name in plain.state_dict()]
    assert student.load_state_dict(plain.state_dict(), strict=True)
    assert whole.load_state_dict(nn.ModuleDict({"model": plain}).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="head.bias"):
        student.load_state_dict({k: v for k, v in plain.state_dict().items() if k != "head.bias"})
    with pytest.raises(RuntimeError, match="more"):
        student.load_state_dict({**plain.state_dict(), "more": torch.zeros(1)})
    learnt = copy.deepcopy(student.distillation.state_dict())
    student.load_state_dict(plain.state_dict(), assign=True)
    assert all(torch.equal(v, learnt[k]) for k, v in student.distillation.state_dict().items())


def test_what_the_method_has_learnt_is_its_state(student):
    state = student.distillation.state_dict()
    assert state.keys() == student.distillation.method.state_dict().keys() and state
    twin = attach(method="MGD")
    twin.distillation.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in twin.distillation.state_dict().items())
    with pytest.raises(RunError) as error:
        attach(method="CWD").distillation.load_state_dict(state)
    assert "CWD" in error.value.what and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_distils_on_its_own(student, x, duplicate):
    twin = duplicate(student)
    assert twin.distillation._student is twin
    if duplicate is copy.deepcopy:
        assert twin.distillation.teacher is student.distillation.teacher
    assert not twin.distillation.returned.losses and twin.distillation.returned.ratio is None
    assert all(method._step == {} for method in twin.distillation.method.parts())
    torch.manual_seed(1)
    here = twin(x)
    torch.manual_seed(1)
    there = student(x)
    assert {k: v.item() for k, v in here.items()} == pytest.approx({k: v.item() for k, v in there.items()}, rel=1e-5)
    sum(here.values()).backward()
    assert all(p.grad is None for p in student.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    twin.distillation.remove()
    assert "loss_mgd_generation" in student(x)


class Whole(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net, self.reentrant = attach(method="MGD", period=2), reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def test_a_checkpoint_around_the_student(x):
    model = Whole(reentrant=False)
    for step in range(3):
        losses = model(x.requires_grad_())
        assert len(losses) == (2 if step % 2 == 0 else 1)
        sum(losses.values()).backward()
        assert model.net.distillation.iteration == step
    assert all(p.grad is not None for p in model.parameters())
    model = Whole(reentrant=True)
    model.net.output = one_loss
    loss = model(x.requires_grad_())
    with pytest.raises(ConfigError) as error:
        loss.backward()
    assert "use_reentrant=True around it" in error.value.value


def test_ema_by_name_and_by_deepcopy(student, x):
    ema = copy.deepcopy(student).eval()
    plain = Net()
    sum(student(x).values()).backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    with torch.no_grad():
        for (name, mean), (other, value) in zip(ema.named_parameters(), student.named_parameters(), strict=True):
            assert name == other
            mean.lerp_(value, 0.5)
    plain.load_state_dict(ema.state_dict())
    assert torch.equal(plain.eval()(x), ema(x))
    ema.to(torch.float64)
    assert next(student.distillation.teacher.network.parameters()).dtype == torch.float32
    student(x)


def test_attribute_writes_reach_the_student(student, x):
    student.head = nn.Linear(8, 5)
    assert student.eval()(x).shape == (2, 5)
    student.body[1] = nn.BatchNorm2d(4)
    with pytest.raises(ConfigError) as error:
        student.train()(x)
    assert error.value.argument == "student" and "0 calls of body.1" in error.value.value


@pytest.mark.filterwarnings("ignore")
def test_it_is_traced_as_it_is_and_scripted_after_removal(student, x):
    traced = torch.jit.trace(student.eval(), x)
    assert torch.equal(traced(x), student(x))
    out = io.BytesIO()
    torch.jit.save(traced, out)
    student.distillation.remove()
    assert not hasattr(student, "distillation")

    class Scripted(nn.Sequential):
        pass

    torch.jit.script(student.body)


@pytest.mark.parametrize("method", ["PKD", "MGD", "KD", "ACAMKD", "PKD+KD"])
def test_removal_leaves_the_student_as_it_was(method, x):
    model = Net()
    before, modules = hooks(model), {n: sorted(m.__dict__) for n, m in model.named_modules()}
    levels = {**LEVELS, "logits": "head"} if "KD" in method.split("+") else LEVELS
    if method == "KD":
        levels = {"logits": "head"}
    attach(model, method=method, student_levels=levels, teacher_levels=levels)
    model(x)
    model.distillation.remove()
    assert hooks(model) == before
    assert {n: sorted(m.__dict__) for n, m in model.named_modules()} == modules
    assert set(model(x)) == {"loss_cls"}
    attach(model, method=method, student_levels=levels, teacher_levels=levels)
    assert len(model(x)) > 1


def test_an_optimizer_state_saved_before_fits():
    """The student's parameters come first, as they did in 0.1."""
    model = attach(method="MGD")
    names = [n.startswith("distillation.") for n, _ in model.named_parameters()]
    assert names == sorted(names)


def test_the_state_of_another_method_is_refused_also_where_neither_has_parameters(x):
    state = attach(method="PKD").distillation.state_dict()
    out = io.BytesIO()
    torch.save({"distiller": state}, out)
    out.seek(0)
    state = torch.load(out, weights_only=True)["distiller"]
    attach(method="PKD").distillation.load_state_dict(state)
    with pytest.raises(RunError) as error:
        attach(method="AT").distillation.load_state_dict(state)
    assert "of PKD, this run of AT" in error.value.what
    attach(method="AT").distillation.load_state_dict({})  # of version 0.1, which did not say
