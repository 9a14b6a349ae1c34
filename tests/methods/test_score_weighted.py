"""ScoreWeighted: hand values, a reference, invariants, gradients, and what is refused."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import ConfigError, Targets
from acam_kd.core.scores import at_levels
from acam_kd.methods import ScoreWeighted
from acam_kd.methods.parts.losses import mse
from acam_kd.methods.score_weighted import score_weighted_mse

LEVELS = {"p3": 4, "p4": 4}


def drawn(channels=5, dtype=torch.float64):
    draw = torch.Generator().manual_seed(6)
    student, teacher = (torch.randn(2, channels, 3, 4, generator=draw, dtype=dtype) for _ in range(2))
    return student, teacher, torch.rand(2, 1, 3, 4, generator=draw, dtype=dtype)


def pyramids(student=4, teacher=4, grad=False):
    torch.manual_seed(2)
    shapes = {"p3": (2, 6, 7), "p4": (2, 3, 1)}
    made = [
        {level: torch.randn(n, width, h, w, requires_grad=grad) for level, (n, h, w) in shapes.items()}
        for width in (student, teacher)
    ]
    scores = {level: torch.rand(n, 1, h, w) for level, (n, h, w) in shapes.items()}
    return *made, Targets(scores=scores)


def test_hand_value():
    """Errors 1 and 4 + 16 in two channels, scores 0.6 and 0.2: (0.6 * 1 + 0.2 * 20) / (2 * 0.8)."""
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[1.0, 2.0]], [[0.0, 4.0]]]])
    scores = torch.tensor([[[[0.6, 0.2]]]])
    assert score_weighted_mse(student, teacher, scores).item() == pytest.approx(4.6 / 1.6)


def test_it_equals_the_formula_position_by_position():
    student, teacher, scores = drawn()
    above = below = 0.0
    for n in range(2):
        for y in range(3):
            for x in range(4):
                error = sum((student[n, c, y, x] - teacher[n, c, y, x]).item() ** 2 for c in range(5)) / 5
                above, below = above + error * scores[n, 0, y, x].item(), below + scores[n, 0, y, x].item()
    assert score_weighted_mse(student, teacher, scores).item() == pytest.approx(above / below, rel=1e-12)


def test_invariants():
    student, teacher, scores = drawn()
    loss = score_weighted_mse(student, teacher, scores)
    torch.testing.assert_close(score_weighted_mse(student, teacher, 1e-6 * scores), loss)
    torch.testing.assert_close(score_weighted_mse(3 * student, 3 * teacher, scores), 9 * loss)
    torch.testing.assert_close(
        score_weighted_mse(student, teacher, torch.full_like(scores, 0.3)), mse(student, teacher)
    )
    assert score_weighted_mse(teacher, teacher, scores) == 0
    only = torch.zeros_like(scores)
    only[1, 0, 2, 3] = 0.7
    expected = (student - teacher)[1, :, 2, 3].square().mean()
    torch.testing.assert_close(score_weighted_mse(student, teacher, only), expected)
    nothing = score_weighted_mse(student.requires_grad_(), teacher, torch.zeros_like(scores))
    assert nothing == 0 and torch.autograd.grad(nothing, student)[0].abs().sum() == 0
    assert score_weighted_mse(student[:0], teacher[:0], scores[:0]) == 0
    assert score_weighted_mse(student.half(), teacher.half(), scores.half()).dtype == torch.float32


def test_gradients():
    student, teacher, scores = drawn(2)
    assert torch.autograd.gradcheck(lambda s: score_weighted_mse(s, teacher, scores), student.requires_grad_())


def test_scores_must_fit():
    student, teacher, scores = drawn()
    with pytest.raises(ValueError, match=r"scores \(2, 3, 4\) do not fit"):
        score_weighted_mse(student, teacher, scores[:, 0])


def test_only_projection_and_student_learn():
    method = ScoreWeighted(LEVELS, {"p3": 6, "p4": 6})
    student, teacher, known = pyramids(4, 6, grad=True)
    scores = {level: x.requires_grad_() for level, x in known.scores.items()}
    method(student, teacher, Targets(scores=scores))["loss_scoreweighted_mse"].backward()
    assert all(x.grad.abs().sum() > 0 for x in (*student.values(), *method.parameters()))
    assert all(x.grad is None for x in (*teacher.values(), *scores.values()))


def test_the_projection_is_two_convolutions_with_relu_between_them():
    method = ScoreWeighted({"p3": 4}, {"p3": 6}, alpha=2.0)
    student, teacher, known = pyramids(4, 6)
    first, relu, second = method.project["p3"]
    hidden = torch.einsum("oc,nchw->nohw", first.weight[..., 0, 0], student["p3"]) + first.bias.view(-1, 1, 1)
    projected = torch.einsum("oc,nchw->nohw", second.weight[..., 0, 0], hidden.clamp_min(0)) + second.bias.view(
        -1, 1, 1
    )
    expected = 2 * score_weighted_mse(projected, teacher["p3"], known.scores["p3"])
    torch.testing.assert_close(method(student, teacher, known)["loss_scoreweighted_mse"], expected)
    assert (first.weight.shape[:2], second.weight.shape[:2]) == ((6, 4), (6, 6))


def test_levels_are_added_up_and_measured():
    method = ScoreWeighted(LEVELS, LEVELS, alpha=1.0)
    student, teacher, known = pyramids()
    loss = method(student, teacher, known)["loss_scoreweighted_mse"]
    metrics = method.metrics()
    torch.testing.assert_close(loss.detach(), metrics["p3/mse"] + metrics["p4/mse"])
    torch.testing.assert_close(metrics["p4/score"], known.scores["p4"].mean())


def test_a_level_without_scores_is_an_error():
    method = ScoreWeighted(LEVELS, LEVELS)
    student, teacher, known = pyramids()
    with pytest.raises(ConfigError) as error:
        method(student, teacher, Targets(scores={"p3": known.scores["p3"]}))
    assert (error.value.argument, error.value.value) == ("targets", "no scores for p4")


def test_a_level_that_the_head_does_not_see_gets_the_nearest_scores():
    maps = {name: torch.zeros(1, 2, side, side) for name, side in (("p2", 16), ("p3", 8), ("p4", 4), ("p5", 2))}
    scores = {"p3": torch.full((1, 1, 8, 8), 0.3), "p4": torch.rand(1, 1, 4, 4)}
    found = at_levels(scores, maps)
    assert {level: x.shape[2:] for level, x in found.items()} == {level: x.shape[2:] for level, x in maps.items()}
    assert found["p3"] is scores["p3"] and found["p4"] is scores["p4"]
    torch.testing.assert_close(found["p2"], torch.full((1, 1, 16, 16), 0.3))
    torch.testing.assert_close(found["p5"], torch.nn.functional.avg_pool2d(scores["p4"], 2))  # bilinear, at half size
