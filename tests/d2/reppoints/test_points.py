"""Boxes of points and deformable convolution: the figures of the published code, and identities."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from acam_kd.d2.reppoints.deform import DeformConv, deformable_conv
from acam_kd.d2.reppoints.head import KERNEL
from acam_kd.d2.reppoints.points import grid_of, minmax_box, moment_box, partial_minmax_box

from .conftest import build_head, wave


def close(found, expected, **tolerance):
    torch.testing.assert_close(found, torch.tensor(expected), **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


@pytest.fixture
def points():
    return wave((2, 18, 2, 3), 0.41, 0.2, 2, 0.5)


def test_the_moments_of_points_are_their_box(points):
    boxes = moment_box(points, torch.tensor([0.3, -0.2]))
    assert boxes.shape == (2, 4, 2, 3)
    close(boxes[0, :, 0, 0], [-1.5324258, -0.76266450, 2.5681858, 1.6729522])
    close(boxes[1, :, 1, 2], [-1.5231273, -0.73386443, 2.5681641, 1.7583820])
    close(boxes.sum(), 24.184784, rtol=1e-5)
    plain = moment_box(points, torch.zeros(2))
    close(plain[0, :, 0, 0], [-1.0010238, -1.0322907, 2.0367839, 1.9425783])
    close(plain.sum(), 24.184784, rtol=1e-5)  # the centre does not depend on the scale


def test_gradients_of_the_moments(points):
    head = build_head()
    with torch.no_grad():
        head.moment_transfer.copy_(torch.tensor([0.3, -0.2]))
    points.requires_grad_()
    (head.boxes(points) * wave((2, 4, 2, 3), 0.23, 0.1)).sum().backward()
    close(head.moment_transfer.grad, [-0.041568585, -0.24701892], rtol=1e-4)
    close(points.grad.abs().sum(), 29.137037)
    close(points.grad[0, :4, 0, 0], [-0.045681387, 0.059938572, 0.24420040, 0.079698727])


def test_the_other_transforms(points):
    close(minmax_box(points)[0, :, 0, 0], [-1.4800843, -1.4843628, 2.4254024, 2.4164352])
    close(partial_minmax_box(points)[0, :, 0, 0], [-1.4800843, -1.3361410, 2.4254024, 1.8602942])
    for name, function in (("minmax", minmax_box), ("partial_minmax", partial_minmax_box)):
        head = build_head(transform=name)
        assert torch.equal(head.boxes(points), function(points))
        assert "moment_transfer" not in dict(head.named_parameters())  # it would be in no loss


def test_equal_points_are_an_empty_box_that_cannot_grow_by_itself():
    points = torch.full((1, 18, 1, 1), 0.75, requires_grad=True)
    scale = torch.zeros(2, requires_grad=True)
    box = moment_box(points, scale)
    close(box.flatten(), [0.75] * 4)
    (box[0, 2] - box[0, 0]).sum().backward()
    assert points.grad.abs().sum() == 0 and scale.grad.abs().sum() == 0


def test_cells_are_named_by_their_corner():
    grid = grid_of([torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 1, 1)], [8, 16])
    assert grid.points.tolist() == [[0, 0], [8, 0], [0, 8], [8, 8], [0, 0]]
    assert grid.strides.tolist() == [8, 8, 8, 8, 16]


@pytest.fixture
def conv():
    return wave((8, 8, 3, 3), 0.31, 0, 0.3), wave((1, 8, 6, 10), 0.37, 0.1), torch.tensor(KERNEL).view(1, -1, 1, 1)


def test_a_deformable_convolution_at_its_own_grid_is_a_convolution(conv):
    weight, x, kernel = conv
    found = deformable_conv(x, torch.zeros(1, 18, 6, 10), weight)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1))


def test_a_deformable_convolution_at_one_point_is_a_convolution_by_the_sum_of_its_kernel(conv):
    weight, x, kernel = conv
    found = deformable_conv(x, -kernel.expand(1, 18, 6, 10), weight)
    torch.testing.assert_close(found, F.conv2d(x, weight.sum((2, 3), keepdim=True)), rtol=1e-5, atol=1e-5)


def test_a_deformable_convolution_at_given_points(conv):
    weight, x, kernel = conv
    found = deformable_conv(x, wave((1, 18, 6, 10), 0.41, 0.2, 2) - kernel, weight)
    close(found.sum(), -0.78661442, rtol=1e-4)
    close(found.abs().sum(), 501.96924)
    close(found[0, 0, 2, 3], -0.10339429, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_is_float32_inside_of_autocast(conv, dtype):
    weight, x, kernel = conv
    offset = wave((1, 18, 6, 10), 0.41, 0.2, 2)
    with torch.autocast("cpu", dtype):
        found = deformable_conv(x, offset, weight)
        half = deformable_conv(x.to(dtype), offset.to(dtype), weight)
    assert torch.equal(found, deformable_conv(x, offset, weight)) and half.dtype == torch.float32


def test_deformable_convolutions_start_from_a_narrow_normal():
    torch.manual_seed(0)
    for layer in (DeformConv(64, 64), build_head(channels=64).cls_dcn, build_head(channels=64).refine_dcn):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert layer.weight.abs().max() > 0.03  # no uniform distribution of that width


def test_the_operator_takes_one_cell_and_no_image():
    weight = torch.rand(2, 4, 3, 3)
    x = torch.rand(1, 4, 1, 1)
    found = deformable_conv(x, torch.zeros(1, 18, 1, 1), weight)
    torch.testing.assert_close(found, F.conv2d(x, weight, padding=1))
