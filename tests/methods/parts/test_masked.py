"""The losses of masks of all levels together: those of each level alone, values and gradients."""

from __future__ import annotations

import pytest
import torch

from acam_kd.methods.parts.losses import mask_diversity_loss, masked_mse
from acam_kd.methods.parts.masked import mask_overlaps, masked_errors

SIZES = [(4, 5), (2, 3), (1, 1)]


def levels(numbers=(6, 6, 6), channels=(8, 8, 8), n=2, dtype=torch.float64):
    torch.manual_seed(4)
    found = []
    for m, c, size in zip(numbers, channels, SIZES):
        student, teacher = torch.randn(n, c, *size).to(dtype), torch.randn(n, c, *size).to(dtype)
        masks = {"spatial": torch.rand(n, m, *size).to(dtype), "channel": torch.rand(n, m, c).to(dtype)}
        found.append((student.requires_grad_(), teacher, {kind: x.requires_grad_() for kind, x in masks.items()}))
    return found


@pytest.mark.parametrize("kinds", [("spatial", "channel"), ("channel",), ("spatial",)])
@pytest.mark.parametrize("numbers", [(6, 6, 6), (6, 3, 19)])
@pytest.mark.parametrize("channels", [(8, 8, 8), (8, 4, 2)])
def test_the_errors_are_those_of_each_level(kinds, numbers, channels):
    batch = levels(numbers, channels)
    masks = [{kind: of_level[kind] for kind in kinds} for *_, of_level in batch]
    found = masked_errors([s for s, *_ in batch], [t for _, t, _ in batch], masks)
    expected = [masked_mse(s, t, of_level) for (s, t, _), of_level in zip(batch, masks)]
    assert list(found) == list(kinds)
    inputs = [*(s for s, *_ in batch), *(x for of_level in masks for x in of_level.values())]
    weights = torch.rand(len(kinds), len(batch)).double()
    sums = [
        sum(w * x for row, kind in zip(weights, kinds) for w, x in zip(row, values[kind]))
        for values in (found, {kind: [level[kind] for level in expected] for kind in kinds})
    ]
    torch.testing.assert_close(*sums)
    torch.testing.assert_close(*(torch.autograd.grad(x, inputs) for x in sums))


@pytest.mark.parametrize("form", ["pairwise", "ratio", "decorrelated"])
@pytest.mark.parametrize("numbers", [(6, 6, 6), (6, 3, 1)])
def test_the_overlaps_are_those_of_each_set(form, numbers):
    batch = levels(numbers)
    masks = [
        of_level[kind] for kind in ("spatial", "channel") for *_, of_level in batch
    ]  # of one shape: the last three
    found, expected = mask_overlaps(masks, form), torch.stack([mask_diversity_loss(x, form) for x in masks])
    torch.testing.assert_close(found, expected)
    weights = torch.rand(len(masks)).double()
    torch.testing.assert_close(*(torch.autograd.grad((weights * x).sum(), masks) for x in (found, expected)))


def test_disjoint_and_vanished_masks_have_no_overlap():
    masks = torch.eye(3).view(1, 3, 3)
    assert mask_overlaps([masks, 0 * masks]).tolist() == [0, 0]
    assert mask_overlaps([masks, 0 * masks], "ratio").tolist() == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_errors_are_in_float32_and_gradients_in_the_features_type(dtype):
    batch = levels(dtype=dtype)
    found = masked_errors([100 * s for s, *_ in batch], [t for _, t, _ in batch], [m for *_, m in batch])
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found.values())
    expected = masked_mse(100 * batch[0][0].float(), batch[0][1].float(), batch[0][2])
    torch.testing.assert_close({kind: x[0] for kind, x in found.items()}, expected, rtol=2e-2, atol=0)
    sum(x.sum() for x in found.values()).backward()
    assert all(s.grad.dtype == dtype and s.grad.any() for s, *_ in batch)


def test_an_empty_batch_is_zero_with_a_graph():
    batch = levels(n=0)
    found = masked_errors([s for s, *_ in batch], [t for _, t, _ in batch], [m for *_, m in batch])
    overlaps = mask_overlaps([m["spatial"] for *_, m in batch])
    assert [x.sum().item() for x in (*found.values(), overlaps)] == [0, 0, 0]
    (sum(x.sum() for x in found.values()) + overlaps.sum()).backward()
    assert all(s.grad.shape == s.shape for s, *_ in batch)


def test_shapes_that_do_not_fit():
    (student, teacher, masks), *_ = levels()
    with pytest.raises(ValueError, match="do not fit"):
        masked_errors([student], [teacher], [{"spatial": masks["spatial"][..., :2]}])
    with pytest.raises(ValueError, match="differ in shape"):
        masked_errors([student], [teacher[:, :2]], [masks])
