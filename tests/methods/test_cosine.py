"""The cosine distance: hand values, lengths, gradients, and a token map as a teacher."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core import ConfigError
from acam_kd.methods import Cosine
from acam_kd.methods.cosine import cosine_distance


def columns(*vectors):
    """A map of one row with these vectors of channels."""
    return torch.tensor(vectors, dtype=torch.float32).T[None, :, None, :]


def test_hand_values():
    student = columns([1, 0], [1, 0], [1, 0], [3, 4])
    teacher = columns([5, 0], [0, 2], [-1, 0], [4, 3])
    assert cosine_distance(student, teacher).item() == pytest.approx((0 + 1 + 2 + 1 - 24 / 25) / 4)


def test_lengths_do_not_matter_and_zero_is_orthogonal():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 3, 4)
    scaled = student * torch.rand(2, 1, 3, 4) * 1e3, teacher * 1e-3
    torch.testing.assert_close(cosine_distance(*scaled), cosine_distance(student, teacher), rtol=1e-4, atol=1e-5)
    zero = torch.zeros_like(student, requires_grad=True)
    loss = cosine_distance(zero, teacher)
    loss.backward()
    assert loss == 1 and zero.grad.isfinite().all()
    assert cosine_distance(student[:0], teacher[:0]) == 0


def test_the_gradient_turns_and_does_not_stretch():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, 3, 4)
    student.requires_grad_()
    cosine_distance(student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert (student.grad * student).sum(1).abs().max() < 1e-6


def test_the_weight_and_its_range():
    torch.manual_seed(0)
    maps = [{"p3": x, "p4": x[..., ::2, ::2]} for x in torch.randn(2, 2, 6, 4, 4)]
    channels = {"p3": 6, "p4": 6}
    one, five = (Cosine(channels, channels, alpha=a)(*maps)["loss_cosine_distance"] for a in (1.0, 5.0))
    torch.testing.assert_close(five, 5 * one)
    torch.testing.assert_close(one, sum(cosine_distance(maps[0][k], maps[1][k]) for k in channels))
    with pytest.raises(ConfigError):
        Cosine(channels, channels, alpha=-1.0)


class Tokens(nn.Module):
    """A plain ViT's shape: a class token, then one token for every patch."""

    def __init__(self, patch=16):
        super().__init__()
        self.embed, self.blocks = nn.Conv2d(3, 12, patch, stride=patch), nn.Linear(12, 12)
        self.first = nn.Parameter(torch.zeros(1, 1, 12))

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1))


def trunk(stride=16):
    last = nn.Conv2d(4, 8, stride // 4, stride=stride // 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4, padding=1), nn.ReLU(), last)


def attach(teacher, stride=16):
    torch.manual_seed(0)
    student = trunk(stride)
    acam_kd.distill(student, teacher, method="Cosine", student_levels={"c4": "2"}, teacher_levels={"c4": "blocks"})
    return student.train()


def test_a_map_of_tokens_teaches_a_level_of_its_stride():
    student = attach(Tokens())
    student(torch.rand(2, 3, 64, 96))
    (loss,) = student.distillation.losses.values()
    loss.backward()
    assert 0 < loss < 2 and student[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("patch", "stride", "said"),
    [
        (14, 16, "at c4 the teacher's map (stride 14) is resized to the student's grid (stride 16)"),
        (28, 16, "at c4 the student's map (stride 16) is resized to the teacher's grid (stride 28)"),
    ],
)
def test_the_finer_grid_is_resized_to_the_coarser_one(patch, stride, said, caplog):
    caplog.set_level("INFO")
    student = attach(Tokens(patch), stride)
    assert said in caplog.text
    seen = []
    student.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    student(torch.rand(2, 3, 112, 224))
    side = max(patch, stride)
    assert all(x["c4"].shape[2:] == (112 // side, 224 // side) for x in seen[0])
    (loss,) = student.distillation.losses.values()
    loss.backward()
    assert student[2].weight.grad.abs().sum() > 0
    assert student.distillation.observe(torch.rand(1, 3, 112, 112)) == {}


def test_grids_that_differ_by_more_are_refused_by_name():
    with pytest.raises(ConfigError) as error:
        attach(Tokens(8))
    assert (error.value.argument, error.value.value) == ("teacher_levels", "c4 of stride 8")
