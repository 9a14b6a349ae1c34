"""The losses: identities, values by hand, references that build what the code must not build, gradients, faults."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acam_kd.core.errors import ConfigError
from acam_kd.methods.parts.losses import EPS, mask_diversity_loss, masked_mse, mse, spatial_masked_mse

N, C, H, W, M = 2, 3, 4, 5, 6


def channel_masked_mse(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    return masked_mse(student, teacher, {"channel": masks})["channel"]


@pytest.fixture
def maps() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Student, teacher, spatial masks, channel masks, in float64."""
    draw = torch.Generator().manual_seed(3)
    shapes = [(N, C, H, W), (N, C, H, W), (N, M, H, W), (N, M, C)]
    student, teacher, spatial, channel = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    return student, teacher, spatial.sigmoid(), channel.sigmoid()


def reference(student: Tensor, teacher: Tensor, masks: Tensor) -> Tensor:
    """Compute the formula as it is written, with the (N, M, C, H, W) tensor; masks broadcast to it."""
    n, c, h, w = student.shape
    masked = masks * (teacher - student)[:, None]
    spatial = masks.shape[2] == 1
    total = masks.sum((2, 3, 4)) + EPS
    per_mask = masked.square().sum((2, 3, 4)) / (total * (c if spatial else h * w))
    return per_mask.mean()


def test_spatial_masked_mse_equals_the_formula(maps):
    student, teacher, spatial, _ = maps
    expected = reference(student, teacher, spatial[:, :, None])
    torch.testing.assert_close(spatial_masked_mse(student, teacher, spatial), expected, rtol=1e-12, atol=0)


def test_both_masked_errors_at_once_are_the_two(maps):
    student, teacher, spatial, channel = maps
    student.requires_grad_()
    both = masked_mse(student, teacher, {"spatial": spatial, "channel": channel})
    alone = {
        "spatial": spatial_masked_mse(student, teacher, spatial),
        "channel": channel_masked_mse(student, teacher, channel),
    }
    assert both == alone and masked_mse(student, teacher, {"channel": channel}) == {"channel": alone["channel"]}
    gradients = [torch.autograd.grad(sum(losses.values()), student)[0] for losses in (both, alone)]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="masks .* do not fit features"):
        masked_mse(student, teacher, {"spatial": spatial, "channel": channel[..., :2]})


def test_channel_masked_mse_equals_the_formula(maps):
    student, teacher, _, channel = maps
    expected = reference(student, teacher, channel[..., None, None])
    torch.testing.assert_close(channel_masked_mse(student, teacher, channel), expected, rtol=1e-12, atol=0)


def test_values_by_hand():
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])
    # squared error per position: 1+9 = 10, 4+16 = 20; per channel: 1+4 = 5, 9+16 = 25
    spatial = torch.tensor([[[[1.0, 0.5]]]])  # (1*10 + 0.25*20) / (2 channels * 1.5) = 5
    channel = torch.tensor([[[0.5, 1.0]]])  # (0.25*5 + 25) / (2 positions * 1.5) = 8.75
    assert spatial_masked_mse(student, teacher, spatial).item() == pytest.approx(5, rel=1e-5)
    assert channel_masked_mse(student, teacher, channel).item() == pytest.approx(8.75, rel=1e-5)
    # <m1, m2> = 0.5, squares 1 and 0.25 + 0.25 -> 2 * 0.5 / 1.5
    masks = torch.tensor([[[1.0, 0.0], [0.5, 0.5]]])
    assert mask_diversity_loss(masks).item() == pytest.approx(2 / 3, rel=1e-6)
    # ratio: 2 * (0.5 + 0.5) / (1.5 + 1.5); with a third mask, (0, 1), it is 2 * 4 * 0.5 / (2.5 + 2.5)
    assert mask_diversity_loss(masks, "ratio").item() == pytest.approx(2 / 3, rel=1e-6)
    third = torch.cat([masks, torch.tensor([[[0.0, 1.0]]])], 1)
    assert mask_diversity_loss(third, "ratio").item() == pytest.approx(4 / 5, rel=1e-6)
    assert mask_diversity_loss(third).item() == pytest.approx((2 / 3 + 2 / 3 + 0) / 3, rel=1e-6)


def test_masks_of_one_give_the_mean_squared_error(maps):
    student, teacher, spatial, channel = maps
    expected = torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(mse(student, teacher), expected)
    for loss, masks in ((spatial_masked_mse, spatial), (channel_masked_mse, channel)):
        torch.testing.assert_close(loss(student, teacher, torch.ones_like(masks)), expected, rtol=1e-6, atol=0)


def test_arguments_can_be_named(maps):
    student, teacher, spatial, channel = maps
    by_name = spatial_masked_mse(masks=spatial, student=student, teacher=teacher)
    assert by_name == spatial_masked_mse(student, teacher, spatial)
    assert channel_masked_mse(student, teacher, masks=channel) == channel_masked_mse(student, teacher, channel)
    assert mask_diversity_loss(masks=spatial) == mask_diversity_loss(spatial)


def test_equal_features_give_zero(maps):
    student, _, spatial, channel = maps
    assert mse(student, student) == 0
    assert spatial_masked_mse(student, student, spatial) == 0
    assert channel_masked_mse(student, student, channel) == 0


def test_a_smaller_mask_is_a_smaller_loss_linearly(maps):
    """The hazard that docs/masks.md is about: the normalised loss still rewards shrinking."""
    student, teacher, spatial, _ = maps
    full, half = spatial_masked_mse(student, teacher, spatial), spatial_masked_mse(student, teacher, spatial / 2)
    torch.testing.assert_close(half, full / 2, rtol=1e-5, atol=0)


def test_a_vanished_mask_gives_zero_not_nan(maps):
    student, teacher, spatial, _ = maps
    masks = torch.zeros_like(spatial, requires_grad=True)
    loss = spatial_masked_mse(student, teacher, masks) + mask_diversity_loss(masks)
    loss.backward()
    assert loss.item() == 0
    assert masks.grad is not None and masks.grad.isfinite().all()


def test_diversity_identities(maps):
    _, _, spatial, channel = maps
    same = spatial[:, :1].expand(-1, M, -1, -1)
    assert mask_diversity_loss(same).item() == pytest.approx(1)
    assert mask_diversity_loss(torch.eye(M)[None]).item() == 0
    assert mask_diversity_loss(spatial[:, :1]).item() == 0  # no pair
    assert 0 <= mask_diversity_loss(channel).item() <= 1
    for scaled in (spatial * 1e-3, spatial.flip(1), spatial.flip(3)):
        torch.testing.assert_close(mask_diversity_loss(scaled), mask_diversity_loss(spatial))


def test_the_decorrelated_form_is_that_of_corrcoef(maps):
    _, _, spatial, channel = maps
    for masks in (spatial, channel):
        expected = []
        for image in masks.flatten(2):
            pairs = torch.corrcoef(image).square().sum() - M
            expected.append(pairs / (M * (M - 1)) + (1 - image.std(1, unbiased=False) / 0.25).clamp(min=0).mean())
        found = mask_diversity_loss(masks, "decorrelated")
        torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-3, atol=0)


def test_a_complement_is_a_copy_and_a_constant_mask_costs_its_contrast():
    half = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    other = torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
    for masks, expected in (((half, half), 1), ((half, 1 - half), 1), ((half, other), 0)):
        assert mask_diversity_loss(torch.cat(masks, 1), "decorrelated").item() == pytest.approx(expected, abs=1e-5)
    constant = torch.cat([half, torch.ones(1, 1, 4)], 1).requires_grad_()
    loss = mask_diversity_loss(constant, "decorrelated")
    loss.backward()
    assert loss.item() == pytest.approx(0.5, abs=1e-3) and constant.grad.isfinite().all()
    assert mask_diversity_loss(torch.cat([half, 1 - half], 1)).item() == 0  # the pairwise form's minimum


def ratio_of_sums(masks: Tensor) -> Tensor:
    """The formula as it is printed, image by image, pair by pair."""
    images = []
    for image in masks.flatten(2):
        overlaps = sum(2 * (image[i] * image[j]).sum() for i in range(len(image)) for j in range(len(image)) if j != i)
        images.append(overlaps / (image.square().sum() + image.square().sum()))
    return torch.stack(images).mean()


def test_the_ratio_equals_the_formula_in_value_and_gradient(maps):
    for masks in (x.requires_grad_() for x in maps[2:]):
        loss, expected = mask_diversity_loss(masks, "ratio"), ratio_of_sums(masks)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, masks)[0] for x in (loss, expected)), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("m", [1, 2, 6, 19])
def test_of_masks_of_equal_norm_the_ratio_is_m_minus_1_times_the_pairwise_mean(m):
    masks = torch.rand(N, m, H, W, dtype=torch.float64)
    masks = masks / masks.flatten(2).norm(dim=2)[..., None, None]
    pairwise, ratio = mask_diversity_loss(masks), mask_diversity_loss(masks, "ratio")
    torch.testing.assert_close(ratio, (m - 1) * pairwise)
    same = masks[:, :1].expand(-1, m, -1, -1)
    assert mask_diversity_loss(same, "ratio").item() == pytest.approx(m - 1)  # its largest value
    assert 0 <= ratio <= m - 1


def test_ratio_identities(maps):
    _, _, spatial, channel = maps
    assert mask_diversity_loss(torch.eye(M)[None], "ratio").item() == 0  # disjoint
    one_of_six = torch.zeros(1, M, H, W).index_fill_(1, torch.tensor([2]), 1.0)
    assert mask_diversity_loss(one_of_six, "ratio").item() == 0  # one mask is 1 everywhere, the others vanished
    for masks in (spatial, channel):
        value = mask_diversity_loss(masks, "ratio")
        for same in (masks * 1e-3, masks.flip(1), masks.flip(-1), torch.cat([masks, masks])):
            torch.testing.assert_close(mask_diversity_loss(same, "ratio"), value)
        dead = torch.cat([masks, torch.zeros_like(masks[:, :1])], 1)  # it counts as a pair in the pairwise form alone
        torch.testing.assert_close(mask_diversity_loss(dead, "ratio"), value)
        assert mask_diversity_loss(dead) < mask_diversity_loss(masks)


@pytest.mark.parametrize("form", ["pairwise", "ratio"])
def test_vanished_masks_have_a_finite_gradient_in_both_forms(form):
    masks = torch.zeros(N, M, H, W, requires_grad=True)
    loss = mask_diversity_loss(masks, form)
    loss.backward()
    assert loss == 0 and masks.grad is not None and masks.grad.isfinite().all()
    empty = torch.zeros(0, M, H, W, requires_grad=True)
    mask_diversity_loss(empty, form).backward()
    assert empty.grad is not None


def test_an_unknown_form_is_refused():
    with pytest.raises(ConfigError) as error:
        mask_diversity_loss(torch.rand(1, 2, 3), "mean")
    assert (error.value.argument, error.value.value, error.value.allowed) == (
        "form",
        "mean",
        "one of pairwise, ratio, decorrelated",
    )


@pytest.mark.parametrize("which", ["spatial", "channel", "diversity", "ratio", "mse"])
def test_gradients(maps, which):
    student, teacher, spatial, channel = (x.clone().requires_grad_() for x in maps)
    call = {
        "spatial": (spatial_masked_mse, (student, teacher, spatial)),
        "channel": (channel_masked_mse, (student, teacher, channel)),
        "diversity": (mask_diversity_loss, (spatial,)),
        "ratio": (lambda masks: mask_diversity_loss(masks, "ratio"), (spatial,)),
        "mse": (mse, (student, teacher)),
    }[which]
    assert torch.autograd.gradcheck(*call)


@pytest.mark.parametrize("n", [0, N])
def test_zero_dim_with_a_graph_also_for_no_images(n):
    student = torch.randn(n, C, H, W, requires_grad=True)
    teacher, spatial, channel = torch.randn(n, C, H, W), torch.rand(n, M, H, W), torch.rand(n, M, C)
    masks = spatial.clone().requires_grad_()
    for loss in (
        mse(student, teacher),
        spatial_masked_mse(student, teacher, spatial),
        channel_masked_mse(student, teacher, channel),
        mask_diversity_loss(masks),
    ):
        assert loss.shape == () and loss.isfinite()
        loss.backward()
    assert student.grad is not None and masks.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    """A sum of squares over 1e4 elements of size 100 is far over float16's largest number."""
    student = torch.full((1, 64, 16, 16), 100.0, dtype=dtype)
    teacher = torch.full_like(student, -100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in (
            mse(student, teacher),
            spatial_masked_mse(student, teacher, torch.ones(1, M, 16, 16, dtype=dtype)),
            channel_masked_mse(student, teacher, torch.ones(1, M, 64, dtype=dtype)),
        ):
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(40000, rel=1e-5)
        assert mask_diversity_loss(torch.ones(1, M, 16, 16, dtype=dtype)).item() == pytest.approx(1)
        ratio = mask_diversity_loss(torch.ones(1, M, 256, 512, dtype=dtype), form="ratio")  # 131072 > 65504
        assert ratio.dtype == torch.float32 and ratio.item() == pytest.approx(M - 1)


def test_float64_stays_float64(maps):
    student, teacher, spatial, channel = maps
    assert spatial_masked_mse(student.float(), teacher, spatial.float()).dtype == torch.float64
    assert channel_masked_mse(student, teacher, channel).dtype == torch.float64
    assert mask_diversity_loss(spatial).dtype == torch.float64


def test_shapes_that_do_not_fit_are_named(maps):
    student, teacher, spatial, channel = maps
    with pytest.raises(ValueError, match=r"student \(2, 3, 4, 5\) and teacher \(2, 3, 4, 4\)"):
        mse(student, teacher[..., :4])
    with pytest.raises(ValueError, match=r"masks \(2, 6, 4, 4\) do not fit features \(2, 3, 4, 5\)"):
        spatial_masked_mse(student, teacher, spatial[..., :4])
    with pytest.raises(ValueError, match="masks"):
        channel_masked_mse(student, teacher, channel[..., :2])


def test_no_tensor_with_masks_channels_and_positions_is_allocated(sizes):
    """Counts the elements of every tensor that autograd keeps, forward and backward."""
    n, c, h, w, m = 1, 32, 16, 16, 8
    student, teacher = torch.randn(n, c, h, w, requires_grad=True), torch.randn(n, c, h, w)
    spatial, channel = torch.rand(n, m, h, w, requires_grad=True), torch.rand(n, m, c, requires_grad=True)

    with sizes:
        loss = spatial_masked_mse(student, teacher, spatial) + channel_masked_mse(student, teacher, channel)
        loss.backward()
    assert sizes.seen and max(sizes.seen) <= n * c * h * w


def test_the_official_inputs_are_the_official_inputs(official):
    assert official.student.sum().item() == pytest.approx(5.408585, rel=1e-4)
    assert official.student[0, 0, 0, :3].tolist() == pytest.approx([0.09983341, 0.4528863, 0.7446431])
    assert official.teacher.sum().item() == pytest.approx(191.858679, rel=1e-6)
    assert official.teacher[1, 7, 5, 9].item() == pytest.approx(0.24797699)
    entropy = torch.nn.functional.cross_entropy(official.student_logits, official.labels)
    assert entropy.item() == pytest.approx(3.6527154)


def test_mean_squared_error_is_that_of_fitnets(official):
    assert mse(official.student, official.teacher).item() == pytest.approx(1.6679301, rel=official.rtol)
