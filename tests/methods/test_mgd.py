"""MGD: the official figures, the effect of the mask, gradients, faults."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods.mgd import MGD, keep_mask
from acam_kd.methods.parts.losses import squared_error

P3 = {"p3": FeatureSpec(8, 8)}
KEY = "loss_mgd_generation"


def loss_of(method, student, teacher):
    return method({"p3": student}, {"p3": teacher})[KEY]


def test_official_figures(official):
    draw = 0.5 * official.wave((2, 1, 6, 10), 0.91, 0.3) + 0.5
    assert keep_mask(draw, 0.65).sum((1, 2, 3)).tolist() == [23, 23]
    method = MGD(P3, P3)
    official.fill(method.generate.parameters(), 0.05)
    method.draw = lambda features: draw
    loss = loss_of(method, official.student, official.teacher)
    assert loss.item() == pytest.approx(0.011287797, rel=official.rtol)
    assert method.metrics()["p3/mse"].item() == pytest.approx(0.011287797 / 2e-5 / 480, rel=official.rtol)
    assert torch.equal(method.masks()["p3"]["spatial"], keep_mask(draw, 0.65))
    method = MGD(P3, P3, alpha=1.0, lambda_mask=0.0)
    official.fill(method.generate.parameters(), 0.05)
    assert loss_of(method, official.student, official.teacher).item() == pytest.approx(562.49872, rel=official.rtol)


def test_positions_are_dropped_with_probability_lambda():
    method = MGD(P3, P3, lambda_mask=0.65)
    method({"p3": torch.randn(2, 8, 100, 100)}, {"p3": torch.randn(2, 8, 100, 100)})
    mask = method.masks()["p3"]["spatial"]
    assert mask.shape == (2, 1, 100, 100) and set(mask.unique().tolist()) == {0, 1}
    assert mask.mean().item() == pytest.approx(0.35, abs=0.02)
    assert not torch.equal(mask[0], mask[1])


def test_a_dropped_position_is_not_seen(official):
    """And nothing is scaled up: the generator sees the features as they are."""
    method = MGD(P3, P3)
    seen = []
    method.generate["p3"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    loss_of(method, official.student, official.teacher)
    mask = method.masks()["p3"]["spatial"]
    assert 0 < mask.sum() < mask.numel()
    assert torch.equal(seen[0], official.student * mask)


def test_channels_are_dropped_whole(official):
    method, seen = MGD(P3, P3, lambda_mask=0.5, dropped="channels"), []
    method.generate["p3"].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    loss_of(method, official.student, official.teacher)
    kept = (seen[0] != 0).flatten(2).float().mean(2)
    assert {*kept.unique().tolist()} == {0.0, 1.0} and not torch.equal(kept[0], kept[1])
    assert method.masks() == {} and torch.equal(seen[0], official.student * kept[:, :, None, None])


def test_what_can_be_dropped():
    with pytest.raises(ConfigError, match="dropped"):
        MGD(P3, P3, dropped="images")


def test_without_masking_nothing_is_random(official):
    method = MGD(P3, P3, lambda_mask=0.0)
    first, second = (loss_of(method, official.student, official.teacher) for _ in range(2))
    assert torch.equal(first, second) and (method.masks()["p3"]["spatial"] == 1).all()


def test_a_mask_of_zeros_leaves_the_biases_alone(official):
    method = MGD(P3, P3, lambda_mask=1.0)
    first = loss_of(method, official.student, official.teacher)
    assert torch.equal(first, loss_of(method, 5 - official.student, official.teacher))
    assert not torch.equal(first, loss_of(method, official.student, 5 - official.teacher))


@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (8, 3), (3, 1)])
def test_everything_is_trained_and_the_teacher_is_not(n, channels):
    levels = [{"p3": FeatureSpec(c, 8)} for c in channels]
    student, teacher = (torch.randn(n, c, 7, 5, requires_grad=True) for c in channels)
    method = MGD(*levels)
    loss = loss_of(method, student, teacher)
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert teacher.grad is None and student.grad.isfinite().all() and (n == 0 or student.grad.abs().sum() > 0)


def test_on_logits_the_generator_has_the_classes_for_channels():
    levels = {"logits": FeatureSpec(5, 8, logits=True)}
    method = MGD(levels, levels)
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"generate"}
    maps = {"logits": torch.randn(2, 5, 4, 3)}
    assert method(maps, maps)[KEY] > 0


def test_autocast_sums_in_float32(official):
    """The sum of 30,000 squares of 1e4 is over float16's largest number, and bfloat16 would lose most of them."""
    student, teacher = torch.full((1, 8, 60, 64), 100.0), torch.full((1, 8, 60, 64), -100.0)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = squared_error(student.to(dtype), teacher.to(dtype))
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(40000 * 8 * 60 * 64)
    method = MGD(P3, P3, lambda_mask=0.0)
    full = loss_of(method, official.student, official.teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss_of(method, official.student, official.teacher)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.01, atol=0)


def test_the_squared_error_by_hand():
    student, teacher = torch.zeros(2, 1, 1, 2), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(2, 1, 1, 2)
    assert squared_error(student, teacher).item() == (1 + 4 + 9 + 16) / 2
    with pytest.raises(ValueError, match="differ in shape"):
        squared_error(student, teacher[..., :1])


def test_faults_are_named(official):
    with pytest.raises(ConfigError) as error:
        MGD(P3, P3, alpha=-1.0)
    assert error.value.argument == "alpha" and error.value.value == -1
    for fraction in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError) as error:
            MGD(P3, P3, lambda_mask=fraction)
        assert error.value.argument == "lambda_mask" and error.value.value is fraction
        assert error.value.allowed == "between 0 and 1"
    with pytest.raises(ValueError, match="differ in shape"):
        loss_of(MGD(P3, P3), official.student[..., :9], official.teacher)
