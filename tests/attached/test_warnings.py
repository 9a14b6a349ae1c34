"""What is dropped in silence elsewhere: missing gradients, forgotten parameters, missing targets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd import ConfigError
from acam_kd.core.distillation import Distillation

from .conftest import LEVELS, attach, registered


def test_a_method_without_a_gradient_into_the_student_is_an_error(x):
    model = attach(
        method="PKD+KD", student_levels={**LEVELS, "logits": "head"}, teacher_levels={**LEVELS, "logits": "head"}
    )
    model.body.requires_grad_(False)
    with pytest.raises(ConfigError) as error:
        model(x)
    assert "PKD" in error.value.allowed and error.value.argument == "student"

    class Detached(acam_kd.Distiller):
        def forward(self, student, teacher, targets=None):
            return {"loss_detached": sum(x.detach().mean() for x in student.values()) + next(self.parameters()).sum()}

        def __init__(self, student, teacher):
            super().__init__(student, teacher)
            self.weight = nn.Parameter(torch.zeros(1))

    with registered(Detached), pytest.raises(ConfigError) as error:
        attach(method="Detached")(x)
    assert error.value.argument == "method" and "Detached" in error.value.value


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
