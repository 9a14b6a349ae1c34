"""Losses, gradients and decoding: the figures of the published code."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes, ImageList
from torch import nn

from acam_kd.d2.reppoints import RepPoints
from acam_kd.d2.reppoints.assign import assign_by_overlap, assign_by_position
from acam_kd.d2.reppoints.losses import box_loss, class_loss
from acam_kd.d2.reppoints.points import Grid, grid_of

from ...fixtures import Official
from .conftest import OBJECTS, K, instances, wave
from .test_points import close

STRIDES = [8, 16]


class Levels(nn.Module):
    """A backbone with these strides, of which nothing else is asked."""

    def output_shape(self):
        from detectron2.layers import ShapeSpec

        return {f"p{i + 3}": ShapeSpec(channels=8, stride=stride) for i, stride in enumerate(STRIDES)}


@pytest.fixture
def detector(head):
    return RepPoints(
        backbone=Levels(), head=head, head_in_features=["p3", "p4"], num_classes=K, pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    ).train()  # fmt: skip


@pytest.fixture
def predictions(head):
    with torch.no_grad():
        head.moment_transfer.copy_(torch.tensor([0.3, -0.2]))
    logits = [wave((2, 4, 6, 10), 0.37, 0.1, 2, -2), wave((2, 4, 3, 5), 0.53, 0.7, 2, -2)]
    init = [wave((2, 18, 6, 10), 0.41, 0.2, 2), wave((2, 18, 3, 5), 0.43, 0.3, 2)]
    steps = [wave((2, 18, 6, 10), 0.29, 0.5, 0.5), wave((2, 18, 3, 5), 0.31, 0.6, 0.5)]
    return logits, init, [a + b for a, b in zip(init, steps)]


def by_level(detector, predictions, objects):
    """The weighted losses of each level, and the two numbers that they are divided by."""
    logits, init, refine = predictions
    grid = grid_of(logits, STRIDES)
    first, second = (grid.boxes([detector.head.boxes(x) for x in each]) for each in (init, refine))
    labels, wanted = detector.label_anchors(first.detach(), objects)
    labels, wanted = torch.stack(labels), torch.stack(wanted)
    positive = (labels >= 0) & (labels < K)
    index = torch.stack([assign_by_position(grid, x.gt_boxes.tensor) for x in objects])
    own = [x.gt_boxes.tensor if len(x) else torch.zeros(1, 4) for x in objects]
    first_wanted = torch.stack([boxes[i.clamp_min(0)] for boxes, i in zip(own, index)])
    scores = torch.cat([permute_to_N_HWA_K(x, K) for x in logits], 1)
    numbers = [x.sum(1).clamp_min(1).sum() for x in (index >= 0, positive)]
    parts = []
    for begin, end in ((0, 60), (60, 75)):
        cells = slice(begin, end)
        sizes = 4 * grid.strides[cells]
        parts.append(
            [
                class_loss(scores[:, cells], labels[:, cells]) / numbers[1],
                0.5 * box_loss(first[:, cells], first_wanted[:, cells], (index >= 0)[:, cells], sizes) / numbers[0],
                box_loss(second[:, cells], wanted[:, cells], positive[:, cells], sizes) / numbers[1],
                (labels[:, cells] >= 0).sum(),
            ]
        )
    return parts, numbers


def test_the_losses_are_the_published_ones(detector, predictions, objects):
    (fine, coarse), numbers = by_level(detector, predictions, objects)
    assert numbers == [3, 3] and (fine[3], coarse[3]) == (112, 28)
    close(torch.stack(fine[:3]), [4.7664900, 0.22395884, 0.38724253])
    close(torch.stack(coarse[:3]), [1.0384127, 0.0, 0.0])
    losses = detector.forward_training(None, [], predictions, objects)
    for name, a, b in zip(("loss_cls", "loss_points_init", "loss_points_refine"), fine, coarse):
        torch.testing.assert_close(losses[name], a + b)


def test_images_without_objects_are_all_background(detector, predictions):
    (fine, coarse), _ = by_level(detector, predictions, [instances([], [])] * 2)
    close(torch.stack(fine[:3]), [6.5950532, 0.0, 0.0])
    close(torch.stack(coarse[:3]), [1.6504600, 0.0, 0.0])


def test_the_smooth_l1_loss_of_boxes():
    boxes = torch.tensor([[[0.05, 0.11, 0.2, 1.0]]])
    for corner, expected in enumerate((0.011363638, 0.055, 0.145, 0.945)):
        only = torch.zeros(1, 1, 4)
        only[..., corner] = boxes[..., corner]
        close(box_loss(only, torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), torch.ones(1)), expected)
    summed = box_loss(boxes, torch.zeros(1, 1, 4), torch.ones(1, 1, dtype=torch.bool), torch.ones(1))
    close(summed * 0.5 / 3, 0.19272727)


def test_differences_are_in_units_of_the_level():
    boxes, nothing = torch.tensor([[[32.0, 0, 0, 0]]]), torch.zeros(1, 1, 4)
    yes = torch.ones(1, 1, dtype=torch.bool)
    close(box_loss(boxes, nothing, yes, torch.tensor([32.0])), 0.945)
    empty = box_loss(boxes.requires_grad_(), nothing, ~yes, torch.tensor([32.0]))
    empty.backward()
    assert empty == 0 and boxes.grad.abs().sum() == 0


def test_boxes_are_clipped_to_the_image():
    grid = Grid(torch.tensor([[0.0, 0], [8, 0], [72, 40]]), torch.full((3,), 8.0))
    relative = torch.tensor([[-1.0, -1, 2, 1], [0, 0, 1, 1], [-2, -3, 2, 3]]).T.reshape(1, 4, 1, 3)
    boxes = Boxes(grid.boxes([relative])[0])
    boxes.clip((48, 80))
    close(boxes.tensor, [[0.0, 0, 16, 8], [8, 0, 16, 8], [56, 16, 80, 48]])


@pytest.fixture
def filled(detector):
    parameters = list(detector.head.parameters())
    assert len(parameters) == 29
    Official().fill(parameters, 0.3)
    return detector


@pytest.fixture
def maps():
    return [wave((2, 8, 6, 10), 0.37, 0.1), wave((2, 8, 3, 5), 0.53, 0.7, 1.5, 0.2)]


def test_the_forward_of_the_head(filled, maps):
    logits, init, refine = filled.head(maps)
    sums = [[x.sum(), x.abs().sum(), y.sum(), y.abs().sum(), z.sum(), z.abs().sum()]
            for x, y, z in zip(logits, init, refine)]  # fmt: skip
    for level, expected in zip(
        sums,
        (
            [-203.71155, 262.51590, 44.619949, 425.51010, 111.57711, 836.97351],
            [-56.619148, 76.601021, 11.339256, 105.14259, 28.431776, 201.36084],
        ),
    ):
        close(torch.stack(level), expected, rtol=2e-5)
    close(logits[0][0, :, 0, 0], [-0.41559204, 0.022597209, -0.32333940, -0.41782057], rtol=1e-4)
    close(init[0][0, :4, 2, 3], [-0.26849681, -0.29652336, -0.29628152, -0.26779431], rtol=1e-4)
    close(refine[0][0, :4, 2, 3], [-0.61343551, -0.50160533, -0.60642743, -0.39378458], rtol=1e-4)


def test_the_losses_and_gradients_of_the_head(filled, maps, objects):
    for x in maps:
        x.requires_grad_()
    predictions = filled.head(maps)
    parts, _ = by_level(filled, predictions, objects)
    expected = ([14.417657, 0.66136879, 0.0], [3.7500658, 0.0, 0.26357386])
    for part, figures in zip(parts, expected):
        close(torch.stack(part[:3]), figures, rtol=2e-5)
    total = sum(filled.forward_training(None, [], predictions, objects).values())
    close(total, 19.092667, rtol=2e-5)
    total.backward()
    close(filled.head.moment_transfer.grad, [-0.0020368872, -0.0024084067], rtol=1e-3, atol=1e-7)
    close(maps[0].grad.abs().sum(), 27.427219, rtol=1e-4)
    close(filled.head.init_points.bias.grad[:3], [0.074627548, 0.050994325, 0.094284698], rtol=1e-3)


def test_the_second_stage_reaches_the_first_points_by_a_tenth_only(filled, maps):
    """Without that factor nothing does: the residual is on detached points."""
    gradients = []
    for factor in (0.0, 0.1, 1.0):
        filled.head.gradient_mul = factor
        filled.head.zero_grad()
        _, _, refine = filled.head(maps)
        refine[0].square().sum().backward()
        gradients.append(filled.head.init_points.bias.grad.clone())
    assert gradients[0].abs().sum() == 0 and gradients[2].abs().sum() > 0
    torch.testing.assert_close(gradients[1], 0.1 * gradients[2], rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_moments_has_a_hundredth_of_its_gradient(head):
    points = wave((2, 18, 2, 3), 0.41, 0.2, 2)
    gradients = []
    for factor in (0.01, 1.0):
        head.moment_mul = factor
        head.zero_grad()
        head.boxes(points)[:, 2:].sum().backward()
        gradients.append(head.moment_transfer.grad.clone())
    torch.testing.assert_close(gradients[0], 0.01 * gradients[1])


def test_the_guard_is_counted_and_can_be_switched_off(detector, predictions, storage):
    """An object between the first boxes takes every cell in the published code."""
    logits, init, refine = predictions
    tiny = [torch.full_like(x, 0.01) * torch.linspace(0, 1, 18)[:, None, None] for x in init]
    far = [instances([[2.5, 2.5, 5.5, 5.5], *OBJECTS[0][0]], [0, 1, 3])] * 2
    losses = detector.forward_training(None, [], (logits, tiny, refine), far)
    values = storage.latest()
    assert values["reppoints/objects_without_overlap"][0] == 2 and values["reppoints/positives"][0] < 10
    detector.match_without_overlap = True
    published = detector.forward_training(None, [], (logits, tiny, refine), far)
    assert storage.latest()["reppoints/positives"][0] > 70
    assert losses["loss_cls"] != published["loss_cls"]


def test_detections_are_the_best_pairs_after_suppression_within_a_class(detector):
    logits = [torch.full((1, K, 6, 10), -9.0), torch.full((1, K, 3, 5), -9.0)]
    logits[0][0, 1, 2, 3], logits[0][0, 1, 2, 4], logits[0][0, 2, 2, 3] = 2.0, 1.0, 0.0
    points = [torch.zeros(1, 18, *x.shape[2:]) for x in logits]
    for x in points:
        x[:, 0::2] = torch.linspace(-4, 4, 9)[:, None, None]
        x[:, 1::2] = torch.linspace(-4, 4, 9)[:, None, None]
    images = ImageList(torch.zeros(1, 3, 48, 80), [(40, 70)])
    (found,) = detector.forward_inference(images, [], (logits, None, points))
    assert found.pred_classes.tolist() == [1, 2]  # the neighbour of the first overlaps it
    close(found.scores, [0.8807970, 0.5])
    reach = 8 * torch.linspace(-4, 4, 9).std()
    close(found.pred_boxes.tensor[0], [24 - reach, max(16 - reach, 0), 24 + reach, min(16 + reach, 40)])
    detector.test_topk_candidates = 1
    assert len(detector.forward_inference(images, [], (logits, None, points))[0]) == 1


def test_first_boxes_far_away_leave_every_cell_background(detector, objects):
    candidates = torch.full((5, 4), 1e4)
    assigned, missed = assign_by_overlap(candidates, objects[0].gt_boxes.tensor)
    assert assigned.tolist() == [-1] * 5 and missed == 2
