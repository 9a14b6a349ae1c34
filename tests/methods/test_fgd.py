"""FGD: the official figures, the masks against a loop over boxes, initial identities, gradients, faults."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from acam_kd.core import FeatureSpec, Targets
from acam_kd.core.errors import ConfigError
from acam_kd.methods.fgd import FGD, GlobalContext, attention_loss, focal_losses, foreground_mask
from acam_kd.methods.parts.attention import attention_of

P3 = {"p3": FeatureSpec(8, 8)}


def targets(*images, size=(48, 80)):
    """One list of boxes per image."""
    boxes = [torch.tensor(each, dtype=torch.float32).view(-1, 4) for each in images]
    owners = [torch.full((len(each),), i) for i, each in enumerate(boxes)]
    return Targets(torch.cat(boxes), torch.cat(owners), torch.tensor([size] * len(images), dtype=torch.float32))


BOXES = targets([[3, 2, 41, 30], [50, 10, 79, 47]], [[10, 5, 30, 25]])


def run(method, student, teacher, known=BOXES):
    return method({"p3": student}, {"p3": teacher}, known)


def terms(method):
    return {name.split("/")[1]: value.item() for name, value in method.metrics().items()}


def naive_mask(known, height, width):
    """Compute the mask by a loop over boxes, in Python's own numbers."""
    mask = torch.zeros(len(known.image_sizes), height, width)
    for (x0, y0, x1, y1), image in zip(known.boxes.tolist(), known.box_images.tolist()):
        high, wide = known.image_sizes[image].tolist()
        left, right = math.floor(x0 * width / wide), math.ceil(x1 * width / wide)
        top, bottom = math.floor(y0 * height / high), math.ceil(y1 * height / high)
        area = max(bottom + 1 - top, 1) * max(right + 1 - left, 1)
        for row in range(max(top, 0), min(bottom + 1, height)):
            for column in range(max(left, 0), min(right + 1, width)):
                mask[image, row, column] = max(mask[image, row, column], torch.tensor(1 / area))
    return mask


def test_official_figures(official):
    method = FGD(P3, P3, gamma=1e-3)  # the class's default, the configs have 5e-4
    losses = run(method, official.student, official.teacher)
    expected = {"fg": 17.299988, "bg": 12.524888, "att": 21.314535, "rel": 800.60645}
    assert terms(method) == pytest.approx(expected, rel=official.rtol)
    assert sum(losses.values()).item() == pytest.approx(0.048880003, rel=official.rtol)
    assert method.masks()["p3"]["spatial"].sum((1, 2, 3)).tolist() == [51, 20]
    for attention, total in zip(attention_of(official.teacher, 0.5), (60, 8)):
        assert attention.flatten(1).sum(1).tolist() == pytest.approx([total] * 2)


def test_official_figures_away_from_the_start(official):
    method = FGD(P3, P3, gamma=1e-3)
    s, t = method.context_s["p3"], method.context_t["p3"]
    parts = [*s.mask.parameters(), *t.mask.parameters(), *s.add.parameters(), *t.add.parameters()]
    assert len(parts) == len([*s.parameters(), *t.parameters()]) == 16
    official.fill(parts, 0.05)
    losses = run(method, official.student, official.teacher)
    assert terms(method)["rel"] == pytest.approx(794.15045, rel=official.rtol)
    assert sum(losses.values()).item() == pytest.approx(0.048847724, rel=official.rtol)


def test_the_defaults_are_retinanets(official):
    method = FGD(P3, P3)
    losses = run(method, official.student, official.teacher)
    figures = terms(method)
    weights = {
        "foreground": ("fg", 1e-3),
        "background": ("bg", 5e-4),
        "attention": ("att", 5e-4),
        "relation": ("rel", 5e-6),
    }
    expected = {f"loss_fgd_{name}": weight * figures[short] for name, (short, weight) in weights.items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(8))
def test_masks_equal_the_loop_over_boxes(seed):
    draw = torch.Generator().manual_seed(seed)
    n, b, (high, wide) = 3, 12, (50, 90)
    corners = torch.rand(b, 2, 2, generator=draw) * torch.tensor([wide * 1.6, high * 1.6]) - 15  # some lie outside
    boxes = torch.cat([corners.amin(1), corners.amax(1)], 1).round(decimals=seed % 3)
    sizes = torch.tensor([[high, wide], [41, 90], [50, 77]])  # padded differently; of integers
    known = Targets(boxes, torch.randint(2, (b,), generator=draw), sizes)  # none in the third image
    mask = foreground_mask(known, 7, 13)
    assert mask.dtype == torch.float32 and mask.shape == (n, 7, 13)
    torch.testing.assert_close(mask, naive_mask(known, 7, 13))
    assert mask[:2].any() and not mask[2].any()


def test_masks_by_hand():
    """A map of 4 x 6 cells of 8 pixels. The small box lies in the large one, whose area is 4 * 5."""
    known = targets([[1, 1, 30, 22], [9, 9, 10, 10]], size=(32, 48))
    expected = torch.zeros(4, 6)
    expected[:4, :5] = 1 / 20
    expected[1:3, 1:3] = 1 / 4
    torch.testing.assert_close(foreground_mask(known, 4, 6)[0], expected)
    order = Targets(known.boxes.flip(0), known.box_images, known.image_sizes)
    torch.testing.assert_close(foreground_mask(order, 4, 6)[0], expected)


@pytest.mark.parametrize(
    ("box", "cells"),
    [
        ([16, 8, 16, 8], 1),  # a point on a corner of four cells
        ([17, 9, 17, 9], 4),  # a point inside: floor and ceil differ
        ([17, 9, 16.5, 8.5], 4),
        ([40, 8, 16, 8], 0),  # inverted
        ([0, 0, 48, 32], 24),  # the whole image: one row and one column lie beyond the map
        ([47, 31, 48, 32], 1),
        ([-40, -40, -20, -20], 0),
        ([100, 100, 200, 200], 0),
        ([-1e9, -1e9, 1e9, 1e9], 24),
    ],
)
def test_degenerate_and_border_boxes(box, cells):
    known = targets([box], size=(32, 48))
    mask = foreground_mask(known, 4, 6)
    assert mask.isfinite().all() and (mask > 0).sum() == cells
    torch.testing.assert_close(mask, naive_mask(known, 4, 6))


def test_the_area_is_that_of_the_box_also_beyond_the_map():
    """At the border a box weighs less than 1 in total, as in the authors' code."""
    assert foreground_mask(targets([[0, 0, 48, 32]], size=(32, 48)), 4, 6).sum().item() == pytest.approx(24 / 35)
    assert foreground_mask(targets([[9, 9, 15, 15]], size=(32, 48)), 4, 6).sum().item() == pytest.approx(1)


def test_many_boxes_cost_no_loop():
    """The number of operators does not depend on the number of boxes."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for b in (1, 50):
        known = targets([[8, 8, 20, 20]] * b)
        Count.calls = 0
        with Count():
            foreground_mask(known, 6, 10)
        counts.append(Count.calls)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("known", [targets([], []), targets([[3, 2, 41, 30]], [])])
def test_images_without_boxes_are_background(official, known):
    method = FGD(P3, P3)
    run(method, official.student, official.teacher, known)
    mask = foreground_mask(known, 6, 10)
    assert not mask[1].any()
    spatial, channel = attention_of(official.teacher, 0.5)
    energy = spatial * (channel[..., None, None] * (official.student - official.teacher) ** 2).sum(1)
    assert terms(method)["fg"] == pytest.approx((mask * energy).sum().item() / 2, rel=1e-5)
    background = [energy[n][mask[n] == 0].mean() for n in range(2)]
    assert terms(method)["bg"] == pytest.approx(sum(background).item() / 2, rel=1e-5)


def test_an_image_covered_by_boxes_has_no_background(official):
    method = FGD(P3, P3)
    run(method, official.student, official.teacher, targets([[0, 0, 80, 48]], [[-9, -9, 99, 99]]))
    assert terms(method)["bg"] == 0 and terms(method)["fg"] > 0


def test_equal_maps_cost_nothing(official):
    method = FGD(P3, P3)
    run(method, official.teacher, official.teacher)
    assert terms(method) == {"fg": 0, "bg": 0, "att": 0, "rel": 0}


def test_attention_is_trained_through_the_student(official):
    student = official.student.clone().requires_grad_()
    attention_loss(attention_of(student, 0.5), attention_of(official.teacher, 0.5)).backward()
    assert student.grad.abs().sum() > 0


def test_attention_loss_is_the_formula(official):
    s, t = official.student, official.teacher
    spatial = [60 * (x.abs().mean(1).flatten(1) / 0.8).softmax(1) for x in (s, t)]
    channel = [8 * (x.abs().mean((2, 3)) / 0.8).softmax(1) for x in (s, t)]
    expected = ((spatial[0] - spatial[1]).abs().sum() + (channel[0] - channel[1]).abs().sum()) / 2
    torch.testing.assert_close(attention_loss(attention_of(s, 0.8), attention_of(t, 0.8)), expected)


def test_gradients():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 2, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    masks = torch.rand(2, 2, 2, 3, generator=draw, dtype=torch.float64)
    student.requires_grad_()
    theirs = attention_of(teacher, 0.5)
    assert torch.autograd.gradcheck(lambda x: focal_losses(x, teacher, masks, *theirs), (student,))
    assert torch.autograd.gradcheck(lambda x: attention_loss(attention_of(x, 0.5), theirs), (student,))


@pytest.mark.parametrize("channels", [1, 2, 7, 8])
def test_the_context_starts_as_the_identity_and_learns(channels):
    block, x = GlobalContext(channels), torch.randn(2, channels, 3, 5)
    assert torch.equal(block(x), x)
    with torch.no_grad():
        block.add[-1].bias.fill_(1.0)
    torch.testing.assert_close(block(x), x + 1)


def test_the_context_is_gathered_by_one_attention(official):
    block = GlobalContext(8)
    official.fill(block.parameters(), 0.3)
    x = official.student
    where = (torch.einsum("nchw,c->nhw", x, block.mask.weight[0, :, 0, 0]).flatten(1)).softmax(1).view(2, 6, 10)
    context = (x * where[:, None]).sum((2, 3))
    hidden = context @ block.add[0].weight[..., 0, 0].T + block.add[0].bias
    centred = hidden - hidden.mean(1, keepdim=True)
    hidden = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    hidden = (hidden * block.add[1].weight.flatten() + block.add[1].bias.flatten()).relu()
    added = hidden @ block.add[3].weight[..., 0, 0].T + block.add[3].bias
    torch.testing.assert_close(block(x), x + added[..., None, None])


@pytest.mark.parametrize("known", ["some", "none"])
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("channels", [(8, 8), (8, 3), (3, 1)])
def test_everything_is_trained_and_the_teacher_is_not(n, channels, known):
    levels = [{"p3": FeatureSpec(c, 8)} for c in channels]
    student, teacher = (torch.randn(n, c, 7, 5, requires_grad=True) for c in channels)
    images = [[[3, 2, 41, 30]] if known == "some" else [] for _ in range(n)]
    boxes = targets(*images) if n else Targets(torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 2))
    method = FGD(*levels)
    losses = run(method, student, teacher, boxes)
    sum(losses.values()).backward()
    assert all(loss.shape == () and loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert n > 0 or sum(losses.values()) == 0
    assert [name for name, p in method.named_parameters() if p.grad is None] == []
    assert teacher.grad is None and student.grad.isfinite().all() and (n == 0 or student.grad.abs().sum() > 0)


def test_every_level_has_masks_of_its_own_size(official):
    levels = {"p3": FeatureSpec(8, 8), "p4": FeatureSpec(8, 16)}
    student = {"p3": official.student, "p4": official.student[..., :3, :5]}
    teacher = {"p3": official.teacher, "p4": official.teacher[..., :3, :5]}
    method = FGD(levels, levels)
    losses = method(student, teacher, BOXES)
    assert method.masks()["p4"]["spatial"].shape == (2, 1, 3, 5)
    metrics = method.metrics()
    for name, short, weight in (("foreground", "fg", 1e-3), ("background", "bg", 5e-4), ("relation", "rel", 5e-6)):
        expected = weight * (metrics[f"p3/{short}"] + metrics[f"p4/{short}"])
        torch.testing.assert_close(losses[f"loss_fgd_{name}"].detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(official, dtype):
    """Features of 1000: their squares are over float16's largest number."""
    student, teacher = (1000 * official.student).to(dtype), (1000 * official.teacher).to(dtype)
    masks = torch.rand(2, 2, 6, 10)
    block = GlobalContext(8)
    official.fill(block.parameters(), 0.05)

    def parts(student, teacher):
        ours, theirs = attention_of(student, 0.5), attention_of(teacher, 0.5)
        return focal_losses(student, teacher, masks, *theirs), attention_loss(ours, theirs), block(student)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = parts(student, teacher)
    full = parts(student.float(), teacher.float())
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in half)
    torch.testing.assert_close(half, full)


@pytest.mark.parametrize(
    ("known", "value"),
    [
        (Targets(), "no boxes"),
        (Targets(None, None, None), "no boxes"),
        (Targets(None, None, BOXES.image_sizes), "no boxes"),
        (targets([[3, 2, 41, 30]]), "the boxes of 1 of 2 images"),
        (targets([], [], []), "the boxes of 3 of 2 images"),
    ],
)
def test_a_batch_without_annotations_is_not_one_without_boxes(official, known, value):
    with pytest.raises(ConfigError) as error:
        run(FGD(P3, P3), official.student, official.teacher, known)
    assert error.value.argument == "targets" and error.value.value == value
    assert error.value.allowed == "the boxes of every image"
    assert "such as MGD" in error.value.hint and "{targets}" in error.value.hint


def test_rotated_boxes_are_refused(official):
    known = Targets(torch.zeros(3, 5), BOXES.box_images, BOXES.image_sizes)
    for call in (
        lambda: run(FGD(P3, P3), official.student, official.teacher, known),
        lambda: foreground_mask(known, 4, 6),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert error.value.argument == "targets" and error.value.value == "boxes of 5 numbers"
        assert error.value.allowed == "axis-aligned boxes of 4: x0, y0, x1, y1"


def test_masks_need_known_boxes():
    with pytest.raises(ConfigError) as error:
        foreground_mask(Targets(None, None, None), 4, 6)
    assert error.value.argument == "targets" and error.value.value == "no boxes"


def test_it_says_that_it_needs_boxes():
    assert FGD.needs == ("boxes",)


@pytest.mark.parametrize("argument", ["alpha", "beta", "gamma", "lambda_rel"])
def test_bad_weights_are_named(argument):
    with pytest.raises(ConfigError) as error:
        FGD(P3, P3, **{argument: -1.0})
    assert error.value.argument == argument and error.value.value == -1


def test_faults_are_named(official):
    with pytest.raises(ConfigError) as error:
        FGD(P3, P3, temperature=0.0)
    assert error.value.argument == "temperature" and error.value.value == 0
    with pytest.raises(ValueError, match="differ in shape"):
        run(FGD(P3, P3), official.student[..., :9], official.teacher)
