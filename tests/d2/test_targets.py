"""From Detectron2's inputs to boxes, sizes and labels, as the methods get them."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from acam_kd.core import Targets

from .conftest import detector_config, distillation_config, inputs, refused, save_config
from .test_class_heads import spy
from .test_segmentation import labelled, segmentor


def build(tmp_path, student, method, *opts):
    path = save_config(student, tmp_path / "teacher.yaml")
    return build_model(distillation_config(student, path, "DISTILL.METHOD", method, *opts)).train()


def test_boxes_are_in_pixels_of_the_batch_and_sizes_without_padding(tmp_path, storage):
    model = build(tmp_path, detector_config("Base-RetinaNet.yaml"), "FGD")
    seen, batches = spy(model), []
    model.backbone.register_forward_hook(lambda m, args, out: batches.append(args[0]))
    batch = [*inputs(1), *inputs(1, (48, 80)), *inputs(1, (33, 65), boxes=False)]
    batch[1]["instances"] = batch[1]["instances"][1:]
    losses = model(batch)
    ((_, _, targets),) = seen
    assert batches[0].shape == (3, 3, 64, 96)  # padded
    assert targets.image_sizes.tolist() == [[64, 96], [48, 80], [33, 65]]
    assert targets.boxes.tolist() == [[4, 4, 40, 40], [20, 10, 60, 50], [20, 10, 60, 50]]
    assert targets.box_images.tolist() == [0, 0, 1] and targets.box_images.dtype == torch.int64
    assert targets.labels == {}
    assert {"loss_fgd_foreground", "loss_fgd_background"} < set(losses)
    assert losses["loss_fgd_foreground"] > 0


def test_a_batch_without_boxes(tmp_path, storage):
    model = build(tmp_path, detector_config("Base-RCNN-FPN.yaml"), "FGD")
    seen = spy(model)
    losses = model(inputs(boxes=False))
    ((_, _, targets),) = seen
    assert targets.boxes.shape == (0, 4) and targets.box_images.shape == (0,) and targets.image_sizes.shape == (2, 2)
    sum(losses.values()).backward()
    assert losses["loss_fgd_foreground"] == 0 and losses["loss_fgd_background"] > 0
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("method", ["FGD", "DKD"])
def test_panoptic_fpn_has_labels_of_pixels_that_no_method_asked_for(method, tmp_path, storage):
    student = detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    )  # fmt: skip
    model = build(tmp_path, student, method)
    seen = spy(model)
    losses = model([{**x, "sem_seg": torch.zeros(64, 96, dtype=torch.int64)} for x in inputs()])
    assert {"loss_sem_seg", "loss_fgd_relation" if method == "FGD" else "loss_dkd_target"} < set(losses)
    assert set(seen[0][2].labels) == ({"classes"} if method == "DKD" else set())


@pytest.mark.parametrize("method", ["DKD", "NKD"])
def test_ignored_and_padded_pixels_are_not_compared(method, tmp_path, storage):
    model = build(tmp_path, segmentor(), method)
    seen = spy(model)
    batch = [*labelled(1), *labelled(1, (40, 72))]
    batch[0]["sem_seg"][:32] = 255
    losses = model(batch)
    ((student, _, targets),) = seen
    assert student["logits"].shape == (2, 5, 16, 24)
    full = torch.full((2, 64, 96), -1)
    full[0, 32:], full[1, :40, :72] = batch[0]["sem_seg"][32:], batch[1]["sem_seg"]
    assert torch.equal(targets.labels["logits"], full[:, 2::4, 2::4])
    compared = 8 * 24 + 10 * 18
    assert model.distillation.method.metrics()["logits/positions"] == compared
    loss = sum(value for name, value in losses.items() if method.lower() in name)
    loss.backward()
    assert loss > 0 and model.sem_seg_head.predictor.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())


def test_an_image_of_ignored_pixels_only_is_no_loss(tmp_path, storage):
    model = build(tmp_path, segmentor(), "NKD")
    batch = labelled()
    for x in batch:
        x["sem_seg"].fill_(255)
    losses = model(batch[:1] + labelled(1))
    assert losses["loss_nkd_target"] > 0
    nothing = {name: value for name, value in _without_task(model, batch).items() if "nkd" in name}
    assert set(nothing) == {"loss_nkd_target", "loss_nkd_nontarget"} and sum(nothing.values()) == 0
    sum(nothing.values()).backward()
    assert model.sem_seg_head.predictor.weight.grad.abs().sum() == 0


def _without_task(model, batch):
    """Detectron2's own loss is nan there."""
    head = model.sem_seg_head
    losses = head.losses
    head.losses = lambda predictions, targets: {
        name: value.nan_to_num() for name, value in losses(predictions, targets).items()
    }
    try:
        return model(batch)
    finally:
        del head.losses


def test_methods_that_need_no_labels_make_none(tmp_path, storage):
    model = build(tmp_path, segmentor(), "KD")
    seen = spy(model)
    model(labelled())
    assert seen[0][2] == Targets()


def test_a_method_that_needs_boxes_is_refused_where_there_are_none(tmp_path):
    for method, taps in (("KD+FGD", "[]"), ("FGD", "[]"), ("FGD", "['backbone']")):
        with refused("method", "FGD", "one that needs no boxes", "a SemanticSegmentor is trained without any"):
            build(tmp_path, segmentor(), method, "DISTILL.TAPS", taps)
