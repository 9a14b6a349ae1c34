"""The student stays the student, in everything that people do with one."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import acam_kd
from acam_kd import ConfigError, RunError
from acam_kd.core.distillation import Distillation

LEVELS = {"c3": "body.1", "c4": "body.3"}


def as_dict(loss, logits):
    return {"loss_cls": loss}


def one_loss(loss, logits):
    return loss


class Net(nn.Module):
    """A classifier that returns its losses, or what ``output`` says."""

    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, 3)
        self.output = as_dict
        self.fails = False

    def forward(self, x, labels=None):
        logits = self.head(self.body(x).mean((2, 3)))
        if self.fails:
            raise ZeroDivisionError
        if not self.training:
            return logits
        loss = F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64) if labels is None else labels)
        return self.output(loss, logits)


def attach(student=None, teacher=None, method="PKD", **arguments):
    arguments = {
        "student_levels": LEVELS,
        "teacher_levels": LEVELS,
        "example_inputs": torch.zeros(1, 3, 16, 16),
    } | arguments
    return acam_kd.distill(student or Net(), teacher or Net(), method=method, **arguments).train()


@pytest.fixture
def x():
    return torch.randn(2, 3, 16, 16)


STATES = ["fresh", "after a step", "after a step that raised"]


@pytest.fixture(params=STATES)
def student(request, x):
    """An attached student with a method that has parameters."""
    model = attach(method="MGD")
    if request.param != "fresh":
        model(x)
    if request.param == "after a step that raised":
        model.fails = True
        with pytest.raises(ZeroDivisionError):
            model(x)
        model.fails = False
    return model


# Names, state, copies.


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


def test_what_was_refused_has_changed_nothing():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    for wrong in ({"alpha": -1.0}, {"period": 1.5}, {"inherit": "perhaps"}, {"method": None}):
        with pytest.raises(ConfigError) as error:
            attach(model, **{"inherit": "always", **wrong})
        assert error.value.argument.split(".")[-1] in wrong
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not hasattr(model, "distillation") and hooks(model) == hooks(Net())


@pytest.mark.parametrize(
    ("wrong", "argument"),
    [
        ({"method": acam_kd.Distiller}, "method"),
        ({"options": 3}, "options"),
        ({"student_levels": "c3"}, "student_levels"),
        ({"teacher_levels": ["c3"]}, "teacher_levels"),
        ({"teacher": "resnet18"}, "teacher"),
        ({"teacher_levels": {"c3": "body.3"}, "student_levels": {"c3": "body.1"}}, "teacher_levels"),
    ],
)
def test_arguments_of_a_wrong_kind_are_one_line(wrong, argument):
    with pytest.raises(ConfigError) as error:
        attach(**wrong)
    assert error.value.argument == argument and "\n" not in str(error.value)


def test_a_part_that_both_models_share_is_refused():
    student, teacher = Net(), Net()
    teacher.body = student.body
    with pytest.raises(ConfigError) as error:
        attach(student, teacher)
    assert error.value.argument == "teacher" and "deepcopy" in error.value.hint
    student.body.requires_grad_(False)
    student.unused = teacher.head
    with pytest.raises(ConfigError):
        attach(student, teacher)


def test_a_level_of_the_teacher_without_a_partner_is_a_warning(caplog):
    attach(student_levels={"c3": "body.1"}, teacher_levels={"c3": "body.1", "c9": "body.3"})
    assert "no level of the student is paired with c9" in caplog.text


def test_a_ready_method(x):
    from acam_kd.core import FeatureSpec
    from acam_kd.methods import PKD

    levels = {"c3": FeatureSpec(4, 2)}
    model = attach(method=PKD(levels, levels, alpha=2.0))
    assert model.distillation.method.levels == ["c3"] and "loss_pkd_pearson" in model(x)
    with pytest.raises(ConfigError) as error:
        attach(method=PKD(levels, levels), alpha=3.0)
    assert error.value.argument == "options"


def test_an_output_that_is_changed_in_place_afterwards_is_an_error(x):
    model = Net()
    model.body[3].inplace = True
    levels = {"c4": "body.2"}
    with pytest.raises(ConfigError) as error:
        attach(model, student_levels=levels, teacher_levels=levels)
    assert error.value.argument == "student_levels" and "in place" in error.value.value
    model.body[3].inplace = False
    attach(model, student_levels=levels, teacher_levels=levels)
    model.body[3].inplace = True
    with pytest.raises(ConfigError) as error:
        model(x)
    assert error.value.argument == "student" and "in place" in error.value.value


@pytest.mark.parametrize("which", ["_forward_hooks", "_forward_pre_hooks"])
def test_hooks_that_others_take_off_are_noticed(x, which):
    model = attach()
    model(x)
    getattr(model, which).clear()
    with pytest.raises(RunError) as error:
        model(x)
    assert "attach again" in error.value.remedy
    model.distillation.remove()
    assert len(attach(model)(x)) == 2


def test_losses_that_are_no_losses_and_targets_that_are_none(x):
    class Odd(acam_kd.Distiller):
        def forward(self, student, teacher, targets=None):
            return {"loss_odd": student["c3"]}

    acam_kd.DISTILLER_REGISTRY._obj_map["Odd"] = Odd
    try:
        with pytest.raises(ConfigError) as error:
            attach(method="Odd")(x)
        assert error.value.argument == "method" and "loss_odd" in error.value.value
    finally:
        acam_kd.DISTILLER_REGISTRY._obj_map.pop("Odd")
    with pytest.raises(ConfigError) as error:
        attach(method="FGD", targets=lambda x: {})(x)
    assert error.value.argument == "targets"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_data_type_of_the_student_is_the_methods_and_the_teacher_keeps_its_own(x, dtype, when):
    student, teacher = Net(), Net()
    model = attach(student.to(dtype) if when == "before" else student, teacher, method="ACAMKD",
                   example_inputs=torch.zeros(1, 3, 16, 16, dtype=dtype) if when == "never" else None)  # fmt: skip
    losses = model.to(dtype)(x.to(dtype))
    assert next(teacher.parameters()).dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.dtype == dtype for p in model.parameters())


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


def hooks(model):
    names = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
             "_forward_pre_hooks_with_kwargs")  # fmt: skip
    return {name: {key: dict(getattr(m, key)) for key in names} for name, m in model.named_modules()}


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


# What cannot be attached.


def test_attaching_twice_is_an_error_that_says_what_to_do():
    model = attach()
    with pytest.raises(ConfigError) as error:
        attach(model)
    assert error.value.argument == "student" and "PKD+KD" in error.value.hint


def test_an_attribute_of_that_name_is_an_error():
    model = Net()
    model.distillation = 3
    with pytest.raises(ConfigError) as error:
        attach(model)
    assert "distillation" in error.value.value


def test_a_wrapped_student_the_same_object_and_a_scripted_one_are_errors():
    with pytest.raises(ConfigError) as error:
        attach(nn.DataParallel(Net()), student_levels={"c3": "module.body.1"}, teacher_levels={"c3": "body.1"})
    assert "then wrap" in error.value.hint
    model = Net()
    with pytest.raises(ConfigError) as error:
        attach(model, model)
    assert error.value.argument == "teacher"


def test_a_sequential_student_calls_its_children(x):
    make = lambda: nn.Sequential(OrderedDict(body=Net().body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten()))  # noqa: E731
    student, plain = make(), make()
    plain.load_state_dict(student.state_dict())
    attach(student, make())
    assert torch.equal(student(x), plain(x)) and student.distillation.losses["loss_pkd_pearson"].requires_grad


# What a student may return.


def test_losses_are_added_to_a_dict_a_tuple_and_a_single_loss(x):
    Pair = namedtuple("Pair", "losses extra")
    model = attach()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    task = plain.train()(x)["loss_cls"]
    outputs = {
        "dict": lambda loss, logits: {"loss_cls": loss},
        "ordered": lambda loss, logits: OrderedDict(loss_cls=loss),
        "tuple": lambda loss, logits: ({"loss_cls": loss}, logits, []),
        "named tuple": lambda loss, logits: Pair({"loss_cls": loss}, logits),
        "loss": lambda loss, logits: loss,
    }
    for kind, output in outputs.items():
        model.output = output
        found = model(x)
        added = model.distillation.losses["loss_pkd_pearson"]
        assert not added.requires_grad
        if kind == "loss":
            torch.testing.assert_close(found, task + added)
            assert found.requires_grad
            continue
        if kind.endswith("tuple"):
            assert type(found) is (tuple if kind == "tuple" else Pair) and found[1].shape == (2, 3)
            found = found[0]
        assert type(found) is (OrderedDict if kind == "ordered" else dict)
        assert list(found) == ["loss_cls", "loss_pkd_pearson"] and found["loss_pkd_pearson"].requires_grad


@pytest.mark.parametrize("kind", ["logits", "mixed"])
def test_other_outputs_are_untouched_and_the_losses_wait(x, kind):
    model = attach()
    kinds = {"logits": lambda loss, logits: logits, "mixed": lambda loss, logits: {"loss": loss, "logits": logits}}
    model.output = kinds[kind]
    out = model(x)
    assert isinstance(out, dict if kind == "mixed" else torch.Tensor)
    with pytest.raises(ConfigError) as error:
        model(x)
    assert "sum(student.distillation.losses.values())" in error.value.hint
    for _ in range(2):  # said again whenever it happens
        model(x)
        (loss,) = model.distillation.losses.values()
    model(x)
    with pytest.raises(ConfigError):
        model(x)
    model.distillation.losses  # noqa: B018
    model(x)
    (loss,) = model.distillation.losses.values()
    loss.backward()
    assert model.body[0].weight.grad.abs().sum() > 0


def test_a_loss_of_the_students_name_is_an_error(x):
    model = attach()
    model.output = lambda loss, logits: {"loss_pkd_pearson": loss}
    with pytest.raises(ConfigError) as error:
        model(x)
    assert error.value.argument == "method"


# When it distils.


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


# What is dropped in silence elsewhere.


def test_a_method_without_a_gradient_into_the_student_is_an_error(x):
    model = attach(
        method="PKD+KD", student_levels={**LEVELS, "logits": "head"}, teacher_levels={**LEVELS, "logits": "head"}
    )
    model.body.requires_grad_(False)
    with pytest.raises(ConfigError) as error:
        model(x)
    assert "PKD" in error.value.allowed and error.value.argument == "student"

    @acam_kd.DISTILLER_REGISTRY.register()
    class Detached(acam_kd.Distiller):
        def forward(self, student, teacher, targets=None):
            return {"loss_detached": sum(x.detach().mean() for x in student.values()) + next(self.parameters()).sum()}

        def __init__(self, student, teacher):
            super().__init__(student, teacher)
            self.weight = nn.Parameter(torch.zeros(1))

    try:
        with pytest.raises(ConfigError) as error:
            attach(method="Detached")(x)
        assert error.value.argument == "method" and "Detached" in error.value.value
    finally:
        acam_kd.DISTILLER_REGISTRY._obj_map.pop("Detached")


def test_a_frozen_level_among_others_is_a_warning_once(x, caplog):
    model = attach()
    model.body[:2].requires_grad_(False)
    for _ in range(2):
        assert len(model(x)) == 2
    assert caplog.text.count("no gradient reaches the student at c3") == 1


def test_an_optimizer_without_the_method_is_a_warning(x, caplog):
    model = attach(method="MGD")
    optimizer = torch.optim.SGD([*model.body.parameters(), *model.head.parameters()], lr=0.0)
    for _ in range(4):
        sum(model(x).values()).backward()
        optimizer.step()
    assert caplog.text.count("the method's parameters are in no optimizer") == 1


def test_nobody_looks_at_optimizers_once_the_methods_parameters_were_seen(x):
    from torch.optim.optimizer import _global_optimizer_pre_hooks as looking

    before = len(looking)
    model = attach(method="MGD")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for hooks_then in (1, 0, 0):
        sum(model(x).values()).backward()
        assert len(looking) == before + hooks_then
        optimizer.step()


def test_a_method_that_needs_boxes_or_labels_says_so(x):
    with pytest.raises(ConfigError) as error:
        attach(method="FGD")(x)
    assert error.value.argument == "targets" and "boxes" in error.value.value
    levels = {"logits": "head"}
    with pytest.raises(ConfigError) as error:
        attach(method="DKD", student_levels=levels, teacher_levels=levels)(x)
    assert "no labels for logits" in error.value.value

    def targets(x, labels):
        return acam_kd.Targets(labels={"logits": labels})

    model = attach(method="DKD", student_levels=levels, teacher_levels=levels, targets=targets)
    assert "loss_dkd_target" in model(x, torch.tensor([0, 2]))


def test_what_it_measured(x):
    model = attach(method="ACAMKD")
    losses = model(x)
    metrics = model.distillation.metrics()
    task, own = losses["loss_cls"], losses["loss_acam_spatial"] + losses["loss_acam_channel"]
    assert metrics["distillation_to_task"].item() == pytest.approx((own / task).item(), rel=1e-5)
    assert model.distillation.masks()["c3"]["spatial"].shape == (2, 6, 8, 8)
    model.output = lambda loss, logits: {"loss_cls": loss * 0}
    model(x)
    assert "distillation_to_task" not in model.distillation.metrics()  # infinite is no number of JSON's
    model.body[1].eval()
    seen = model.distillation.observe(x)
    assert seen["c4"]["channel"].shape == (2, 6, 8)
    assert model.training and not model.body[1].training and model.distillation.training


def test_import_names():
    assert issubclass(acam_kd.ConfigError, ValueError) and issubclass(acam_kd.RunError, RuntimeError)
    assert isinstance(attach().distillation, Distillation) and acam_kd.__version__ == "0.2.0"
    with pytest.raises(ImportError, match="acam_kd.distill"):
        from acam_kd.core import DistillationModel  # noqa: F401


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
