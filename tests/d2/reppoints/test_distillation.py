"""RepPoints as student and as teacher: every method, its class head, its neck, masks, tracing and files."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.export import TracingAdapter
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import retinanet as stock_retinanet
from fvcore.nn import sigmoid_focal_loss

from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.d2 import add_segmentation_config, exported_student_config, student_config
from acam_kd.d2.adapter import D2Adapter
from acam_kd.d2.visualize import masks_of
from acam_kd.methods.fgd import FGD

from ..conftest import detector_config, distillation_config, inputs, refused, save_config
from .conftest import tiny

METHODS = sorted(name for name, method in DISTILLER_REGISTRY if not method.families)
OWN = {"loss_cls", "loss_points_init", "loss_points_refine"}
WIDER = ["MODEL.RESNETS.DEPTH", 101]


def build(tmp_path, method="ACAMKD", *opts, student=None, teacher=None):
    path = save_config(teacher if teacher is not None else tiny(*WIDER), tmp_path / "teacher.yaml")
    student = student if student is not None else tiny()
    return build_model(distillation_config(student, path, "DISTILL.METHOD", method, *opts)).train()


def moved(model):
    """Neck and head begin as the teacher's."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_parameter(method, tmp_path, storage):
    torch.manual_seed(0)
    model = moved(build(tmp_path, method))
    losses = model(inputs())
    assert set(losses) > OWN and all(loss.isfinite() for loss in losses.values())
    assert sum(loss for name, loss in losses.items() if name not in OWN) > 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


def test_images_without_objects_train_every_parameter(tmp_path, storage):
    model = build(tmp_path)
    losses = model(inputs(boxes=False))
    assert losses["loss_points_init"] == losses["loss_points_refine"] == 0
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


def test_it_trains_in_half_precision(tmp_path, storage):
    model = build(tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(inputs())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert set(losses) > OWN and all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("pair", ["from a retinanet", "of a retinanet", "from a faster rcnn"])
def test_features_go_between_kinds(pair, tmp_path, storage, monkeypatch):
    # Detectron2's own is a script, and its first calls decide how the golden tests are rounded
    monkeypatch.setattr(stock_retinanet, "sigmoid_focal_loss_jit", sigmoid_focal_loss)
    others = {"a retinanet": "Base-RetinaNet.yaml", "a faster rcnn": "Base-RCNN-FPN.yaml"}
    other = detector_config(others[pair.partition(" ")[2]])
    models = (tiny(), other) if pair.startswith("from") else (other, tiny())
    levels = [] if "rcnn" not in pair else ["DISTILL.LEVELS", "['p3', 'p4', 'p5', 'p6']"]
    model = build(tmp_path, "ACAMKD", *levels, student=models[0], teacher=models[1])
    sum(model(inputs()).values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []


def test_a_deformable_teacher_teaches(tmp_path, storage):
    deformable = [*WIDER, "MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, True, True, True]"]
    model = moved(build(tmp_path, "ACAMKD+KD", teacher=tiny(*deformable)))
    losses = model(inputs())
    assert {name for name in losses if name.startswith(("loss_acam", "loss_kd"))}
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None and p.requires_grad] == []
    assert all(p.grad is None for p in model.distillation.teacher.network.parameters())


def test_neck_and_head_are_inherited(tmp_path):
    model = build(tmp_path)
    teacher = model.distillation.teacher.network
    state, taught = model.state_dict(), {f"backbone.{k}": v for k, v in teacher.state_dict().items()}
    for name, value in state.items():
        if name.startswith("backbone.") and "bottom_up" not in name:
            assert torch.equal(value, taught[name]), name
    fresh = build(tmp_path, "ACAMKD", "DISTILL.INHERIT", "never")
    assert not torch.equal(fresh.backbone.fpn_output3.weight, state["backbone.fpn_output3.weight"])


def test_fgd_distils_the_neck_before_its_normalisation(tmp_path, storage):
    torch.manual_seed(0)
    model = moved(build(tmp_path, "FGD"))
    distillation = model.distillation
    assert distillation.levels == {f"p{k}_conv": f"p{k}_conv" for k in range(3, 8)}
    method = distillation.method
    assert (method.weights["foreground"], method.temperature) == (1.6e-3, 0.5)
    given, after = [], []
    method.register_forward_pre_hook(lambda module, args: given.append(args))
    model.backbone.register_forward_hook(lambda module, args, output: after.append((args[0], output)))
    model(inputs())
    (of_student, of_teacher, _), (batch, levels) = given[0], after[0]
    neck = model.backbone
    norms = {3: neck.fpn_output3.norm, 5: neck.fpn_output5.norm, 6: neck.top_block.p6.norm, 7: neck.top_block.p7.norm}
    for k, norm in norms.items():
        torch.testing.assert_close(norm(of_student[f"p{k}_conv"]), levels[f"p{k}"])
    network = distillation.teacher.network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network.fpn_output4.norm(of_teacher["p4_conv"]), network(batch)["p4"])
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_the_normalised_neck_is_chosen_by_its_tap_or_its_levels(tmp_path):
    assert list(build(tmp_path, "FGD", "DISTILL.FGD.TAPS", "['backbone']").distillation.levels)[0] == "p3"
    assert list(build(tmp_path, "FGD", "DISTILL.FGD.LEVELS", "['p4_conv']").distillation.levels) == ["p4_conv"]
    both = build(tmp_path, "FGD+PKD").distillation.levels
    assert {*both} == {f"p{k}_conv" for k in range(3, 8)} | {f"p{k}" for k in range(3, 7)}
    with refused("taps", "neck_convs", "backbone with PKD"):
        build(tmp_path, "PKD", "DISTILL.TAPS", "['neck_convs']")


def test_a_neck_without_normalisation_is_its_own_convolutions(tmp_path, storage):
    retinanet = detector_config("Base-RetinaNet.yaml", "MODEL.FPN.OUT_CHANNELS", 64)
    model = build(tmp_path, "FGD", teacher=retinanet)
    given = []
    model.distillation.method.register_forward_pre_hook(lambda module, args: given.append(args[1]))
    batches = []
    model.backbone.register_forward_pre_hook(lambda module, args: batches.append(args[0]))
    model(inputs())
    teacher = model.distillation.teacher
    expected = teacher.network.eval()(teacher.pixels(batches[0]))
    for name in ("p3", "p6"):
        torch.testing.assert_close(given[0][f"{name}_conv"], expected[name])


def test_a_ready_method_distils_the_usual_levels(tmp_path):
    from acam_kd import distill

    channels = {f"p{k}": 64 for k in range(3, 8)}
    student = distill(build_model(tiny()), build_model(tiny()), method=FGD(channels, channels))
    assert list(student.distillation.levels) == ["p3", "p4", "p5", "p6", "p7"]


def test_the_class_head_is_compared_at_every_cell(tmp_path, storage):
    model = build(tmp_path, "DKD")
    seen = []
    model.distillation.method.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(inputs())
    of_student, of_teacher, targets = seen[0]
    cells = 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2 + 1
    assert of_student["classes"].shape == of_teacher["classes"].shape == (2, 3, cells, 1)
    labels = targets.labels["classes"]
    assert labels.shape == (2, cells, 1) and {0, 2, 3} & {*labels.flatten().tolist()} == {0, 2, 3}
    model.distillation.remove()
    assert "label_anchors" not in model.__dict__


def test_class_heads_with_anchors_do_not_correspond(tmp_path):
    with refused("teacher", "other anchors"):
        build(tmp_path, "KD", teacher=detector_config("Base-RetinaNet.yaml"))
    with refused("teacher", "one softmax"):
        build(tmp_path, "KD", teacher=detector_config("Base-RCNN-FPN.yaml"))


def test_masks_are_drawn(tmp_path, storage):
    model = build(tmp_path, "ACAMKD", "VIS_PERIOD", 1)
    model(inputs())
    assert [name for name, _, _ in storage._vis_data] == ["distill/spatial masks"]
    cfg = distillation_config(tiny(), str(tmp_path / "teacher.yaml"))
    image = np.random.default_rng(3).integers(0, 256, (48, 77, 3), dtype=np.uint8)
    masks = masks_of(model, cfg, image)
    assert list(masks) == ["p3", "p4", "p5", "p6", "p7"] and masks["p3"]["spatial"].shape == (6, 8, 16)


def test_it_is_copied_and_pickled_with_its_distillation(tmp_path, storage):
    model = build(tmp_path, "FGD+KD")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert set(other.train()(inputs())) == set(model(inputs()))


@pytest.mark.filterwarnings("ignore")  # Detectron2 asserts and counts while it is traced
@pytest.mark.parametrize("deformable", [False, True])
def test_it_is_traced(deformable):
    torch.manual_seed(0)
    stages = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", "[False, False, True, True]"]
    model = build_model(tiny("MODEL.REPPOINTS.SCORE_THRESH_TEST", 0.005, *(stages if deformable else []))).eval()
    first, second = ([{"image": x["image"]}] for x in (inputs(1)[0], inputs(1, (96, 64))[0]))
    adapter = TracingAdapter(model, first)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        for batch in (first, second):
            boxes = traced(batch[0]["image"])
            expected = TracingAdapter(model, batch)(batch[0]["image"])
            assert len(expected[0]) > 0
            for a, b in zip(boxes, expected):
                torch.testing.assert_close(a, b)


def test_its_file_has_its_own_keys_and_that_of_another_student_has_none(retinanet, retinanet_teacher, tmp_path):
    cfg = distillation_config(tiny(), retinanet_teacher)
    exported = exported_student_config(cfg)
    assert set(exported.MODEL.REPPOINTS) == {"NUM_CLASSES", "CONVS_DIM", "NUM_CONVS"}
    loaded = get_cfg()
    add_segmentation_config(loaded)
    loaded.merge_from_file(save_config(exported, tmp_path / "student.yaml"))
    assert loaded.MODEL.REPPOINTS == student_config(cfg).MODEL.REPPOINTS
    cfg = distillation_config(retinanet, retinanet_teacher, "MODEL.REPPOINTS.NUM_CLASSES", 5)
    assert "REPPOINTS" not in exported_student_config(cfg).MODEL


def test_the_adapter_says_what_it_is():
    adapter = D2Adapter(build_model(tiny()))
    assert (adapter.family, adapter.num_classes, adapter.offered) == ("reppoints", 3, ("backbone", "classes"))
    assert adapter.on_request == ("neck_convs",) and "head.cls_score." in adapter.class_layers
    assert adapter.kind == ("RepPoints", "") and [x.tolist() for x in adapter.anchors()] == [[8, 16, 32, 64, 128]]
