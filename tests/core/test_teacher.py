"""The frozen teacher, and how its images are made of the student's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from acam_kd.core import FrozenTeacher, Pixels, PixelTransform
from acam_kd.core.teacher import evaluating

from .detectors import Backbone, Detector, refused

BGR_MEAN, RGB_MEAN, RGB_STD = [103.5, 116.3, 123.7], [123.7, 116.3, 103.5], [58.4, 57.1, 57.4]
BGR, RGB = Pixels(BGR_MEAN, [1.0, 1.0, 1.0], "BGR"), Pixels(RGB_MEAN, RGB_STD, "RGB")


@pytest.fixture
def batch():
    return torch.randn(2, 3, 16, 16)


def test_no_flag_of_the_network_is_written(batch):
    network = Backbone()
    network.norm.eval()
    network.conv.bias.requires_grad_(False)
    modes = [module.training for module in network.modules()]
    flags = [p.requires_grad for p in network.parameters()]
    before = copy.deepcopy(network.state_dict())
    teacher = FrozenTeacher(network)
    seen = []
    network.conv.register_forward_hook(lambda module, args, out: seen.append(module.training))
    features = teacher(batch)
    assert seen == [False] and not features["p3"].requires_grad
    assert [module.training for module in network.modules()] == modes == [True, True, False]
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())


def test_modes_are_restored_after_a_failure_too():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout().eval())
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        FrozenTeacher(network)(torch.zeros(1, 2, 4, 4))
    assert [module.training for module in network.modules()] == [True, True, False]
    with pytest.raises(ZeroDivisionError), evaluating(network):
        assert not any(module.training for module in network.modules())
        raise ZeroDivisionError
    assert [module.training for module in network.modules()] == [True, True, False]


def test_it_is_no_module_and_copies_share_it(batch):
    teacher = FrozenTeacher(Backbone())
    assert not isinstance(teacher, nn.Module)
    assert copy.deepcopy(teacher) is teacher
    assert copy.deepcopy([teacher])[0].network is teacher.network


def test_it_follows_the_device_of_the_batch_and_keeps_its_own_data_type(batch):
    teacher = FrozenTeacher(Backbone(), PixelTransform(BGR, RGB))
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert teacher(batch.to(dtype))["p3"].dtype == torch.float32
    assert teacher.network.conv.weight.dtype == teacher.pixels.scale.dtype == torch.float32
    assert teacher.network.norm.num_batches_tracked.dtype == torch.int64
    assert teacher(batch.to("meta"))["p3"].device.type == "meta"
    assert next(teacher.network.parameters()).device.type == teacher.pixels.scale.device.type == "meta"


def test_the_batch_is_normalised_for_it_and_extract_gets_the_regions_too(batch):
    asked = []

    def extract(network, batch, regions):
        asked.append((network, batch, regions))
        return {}

    network, pixels = Detector(), PixelTransform(BGR, RGB)
    assert FrozenTeacher(network, pixels, extract)(batch, "boxes") == {}
    ((got, pictures, regions),) = asked
    assert got is network and torch.equal(pictures, pixels(batch)) and regions == "boxes"


def test_an_image_of_the_mean_colour_is_zero_to_the_teacher():
    torch.testing.assert_close(PixelTransform(BGR, RGB)(torch.zeros(1, 3, 2, 2)), torch.zeros(1, 3, 2, 2))


def test_pixels_are_what_the_teacher_would_have_made_of_them():
    bgr = torch.rand(1, 3, 4, 4) * 255
    student = (bgr - torch.tensor(BGR_MEAN).view(3, 1, 1)) / torch.tensor([2.0, 3.0, 4.0]).view(3, 1, 1)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RGB_MEAN, RGB_STD))
    transform = PixelTransform(Pixels(BGR_MEAN, [2.0, 3.0, 4.0], "BGR"), RGB)
    torch.testing.assert_close(transform(student), (bgr.flip(1) - mean) / std, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", ["BGR", ""])
def test_channels_stay_where_the_orders_are_the_same_or_one_is_not_known(order):
    transform = PixelTransform(BGR, Pixels(RGB_MEAN, RGB_STD, order))
    student = torch.rand(1, 3, 4, 4)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RGB_MEAN, RGB_STD))
    want = (student + torch.tensor(BGR_MEAN).view(3, 1, 1) - mean) / std
    assert not transform.reverse_channels
    torch.testing.assert_close(transform(student), want, rtol=1e-4, atol=1e-4)


def test_equal_statistics_leave_the_batch_alone(batch):
    assert PixelTransform(BGR, Pixels(BGR_MEAN, [1.0, 1.0, 1.0], "BGR"))(batch) is batch
    assert PixelTransform(BGR, Pixels(BGR_MEAN, [1.0, 1.0, 1.0]))(batch) is batch


def test_a_grey_image_is_repeated():
    grey = torch.rand(2, 1, 4, 4)
    got = PixelTransform(Pixels([100.0], [50.0]), RGB)(grey)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (RGB_MEAN, RGB_STD))
    torch.testing.assert_close(got, ((grey * 50 + 100) - mean) / std, rtol=1e-4, atol=1e-4)


def test_channels_that_do_not_correspond_are_refused():
    four = Pixels([0.0] * 4, [1.0] * 4)
    with refused("teacher", "3 channels of the image", "the student's 4", "images like the student's"):
        PixelTransform(four, RGB)
    with refused("teacher", "4 channels of the image", "the student's 3"):
        PixelTransform(RGB, four)
    with refused("teacher", "images in YUV", "the student's RGB", "only RGB and BGR"):
        PixelTransform(RGB, Pixels(RGB_MEAN, RGB_STD, "YUV"))


def test_a_transform_has_no_state(batch):
    assert PixelTransform(BGR, RGB).state_dict() == {}
