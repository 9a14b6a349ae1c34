"""What cannot be attached, and what is refused or warned of when it is used."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd import ConfigError, RunError

from .conftest import Net, attach, hooks, registered


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

    with registered(Odd), pytest.raises(ConfigError) as error:
        attach(method="Odd")(x)
    assert error.value.argument == "method" and "loss_odd" in error.value.value
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
