"""DETR-like students: a dict of weighted losses, a backbone or an encoder tapped, query heads left alone."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

import acam_kd

from ..timm_teachers import vit
from . import detr
from .conftest import detector_config, distillation_config, inputs, refused, save_config
from .running import run

BACKBONE = ["MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
LEVELS = {"c4": "detr.backbone.0.backbone[res4]", "c5": "detr.backbone.0.backbone[res5]"}


def config(name="StandInDetr", *opts):
    return detector_config("Base-RetinaNet.yaml", "MODEL.META_ARCHITECTURE", name, *BACKBONE, *opts)


def build(name="StandInDetr", *opts):
    torch.manual_seed(0)
    return build_model(config(name, *opts)).train()


def teacher():
    torch.manual_seed(1)
    rgb = ["MODEL.PIXEL_MEAN", [123.7, 116.3, 103.5], "MODEL.PIXEL_STD", [58.4, 57.1, 57.4], "INPUT.FORMAT", "RGB"]
    return build_model(detector_config("Base-RetinaNet.yaml", *rgb))


def attach(levels, **more):
    """A student whose backbone is hidden, with Detectron2's own arguments as the example."""
    example = inputs(1, size=(96, 160), boxes=False)
    return acam_kd.distill(build(), teacher(), student_levels=levels, example_inputs=(example,), **more).train()


@pytest.mark.parametrize("method", ["MGD", "ACAMKD", "Cosine"])
def test_a_hidden_backbone_is_tapped_and_the_task_is_left_alone(method):
    batch, plain = inputs(size=(70, 90)), build()
    own = plain(batch)
    sum(own.values()).backward()
    student = attach(LEVELS, method=method)
    assert student.distillation.levels == {"c4": "p4", "c5": "p5"}
    losses = student(batch)
    added = {name: loss for name, loss in losses.items() if name not in own}
    assert added and all(torch.equal(losses[name], loss) for name, loss in own.items())
    sum(losses.values()).backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in student.named_parameters():
        if name.startswith("detr.") and ".backbone." not in name:  # encoder, decoder, queries, heads
            assert torch.equal(parameter.grad, gradients[name].grad), name
    stem = "detr.backbone.0.backbone.stem.conv1.weight"
    assert not torch.equal(student.get_parameter(stem).grad, gradients[stem].grad)
    assert set(student.state_dict()) == set(plain.state_dict())
    plain.load_state_dict(student.state_dict(), strict=True)


def test_the_ratio_to_the_task_leaves_out_what_only_informs():
    """``class_error`` is up to 100, and nothing is trained by it."""
    student = attach(LEVELS, method="Mimic")
    losses = student(inputs())
    own = sum(float(loss) for loss in student.distillation.losses.values())
    task = {name: x for name, x in losses.items() if name not in student.distillation.losses and x.requires_grad}
    assert set(task) == set(detr.Criterion.weight_dict)
    assert float(losses["class_error"]) > 10 and not losses["class_error"].requires_grad
    ratio = student.distillation.metrics()["distillation_to_task"]
    torch.testing.assert_close(float(ratio), own / sum(x.item() for x in task.values()), rtol=1e-4, atol=0)


def test_the_teacher_gets_the_students_padded_images_in_its_own_pixels():
    student, batch = attach(LEVELS, method="MGD"), inputs(size=(70, 90))
    seen = []
    network = student.distillation.teacher.network
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    student(batch)
    assert seen[0].shape == (2, 3, 96, 96)
    mean, std = torch.tensor([[123.7, 116.3, 103.5], [58.4, 57.1, 57.4]])[..., None, None]
    wanted = (batch[0]["image"].flip(0).float() - mean) / std
    torch.testing.assert_close(seen[0][0, :, :70, :90], wanted, rtol=1e-4, atol=1e-4)


def test_an_encoder_whose_tokens_come_first_is_tapped():
    student = attach({"c5": "detr.encoder"}, method="Mimic")
    maps = []
    student.distillation.method.register_forward_pre_hook(lambda module, args: maps.append(args[0]["c5"]))
    tokens = []
    student.detr.encoder.register_forward_hook(lambda module, args, out: tokens.append(out))
    losses = student(inputs(size=(64, 96)))
    assert student.distillation.levels == {"c5": "p5"} and maps[0].shape == (2, detr.DIM, 2, 3)
    assert torch.equal(maps[0][1, :, 1, 2], tokens[0][5, 1])
    sum(losses.values()).backward()
    assert student.detr.encoder.layers[0].linear1.weight.grad.abs().sum() > 0


def test_in_evaluation_nothing_is_distilled():
    student = attach(LEVELS, method="MGD").eval()
    with torch.no_grad():
        (found,) = student(inputs(1, boxes=False))
    assert len(found["instances"]) == 5 and student.distillation.losses == {}


def test_images_without_labels_go_through_the_hidden_backbone():
    student = attach(LEVELS, method="MGD")
    losses = student.distillation.unlabelled(torch.randn(2, 3, 64, 96))
    losses["loss_unlabelled_mgd_generation"].backward()
    assert student.get_parameter("detr.backbone.0.backbone.stem.conv1.weight").grad.abs().sum() > 0
    assert student.detr.queries.weight.grad is None
    student = attach({"c5": "detr.encoder"}, method="Mimic")  # which that part alone does not reach
    with refused("student", "0 calls of detr.encoder"):
        student.distillation.unlabelled(torch.randn(2, 3, 64, 96))


def test_a_detr_teaches_features_of_its_backbone():
    example = (inputs(1, size=(96, 160), boxes=False),)
    models = {"student": teacher().train(), "teacher": build().eval(), "method": "MGD", "example_inputs": example}
    student = acam_kd.distill(**models, teacher_levels=LEVELS, student_levels=["p4", "p5"])
    assert student.distillation.levels == {"p4": "c4", "p5": "c5"}
    from detectron2.utils.events import EventStorage

    with EventStorage():
        assert "loss_mgd_generation" in student(inputs(size=(70, 90)))
    student.distillation.remove()
    with refused("teacher_levels", "c5: detr.encoder", "parts of detr.backbone.0.backbone, which gets the images"):
        acam_kd.distill(**models, teacher_levels={"c5": "detr.encoder"}, student_levels=["p5"])


def test_a_detr_learns_from_a_detr_and_from_a_plain_vit():
    """The example is the student's; a teacher that takes a batch is measured by the images in it."""
    example = (inputs(1, size=(96, 160), boxes=False),)
    for other, levels in ((build().eval(), LEVELS), (vit(), {"c4": "blocks.1"})):
        kind = {"method": "Cosine", "student_levels": {name: LEVELS[name] for name in levels}, "teacher_levels": levels}
        student = acam_kd.distill(build(), other, example_inputs=example, **kind)
        losses = student(inputs(size=(70, 90)))
        losses["loss_cosine_distance"].backward()
        assert student.distillation.levels == {name: name for name in levels}
        assert student.get_parameter("detr.backbone.0.backbone.stem.conv1.weight").grad.abs().sum() > 0


def test_inputs_that_are_no_batch_are_explained():
    with refused(
        "example_inputs", "a StandInDetr fails", "inputs that it takes", "arguments of its forward as a tuple"
    ):
        acam_kd.distill(build(), teacher(), method="MGD", student_levels=LEVELS)


@pytest.mark.parametrize("name", ["StandInDetrWithBackbone", "StandInDetr"])
def test_by_a_config_file(name, data, tmp_path):  # noqa: F811
    """The meta-architecture is registered by the codebase; its attribute ``backbone`` is what a config can tap."""
    save_config(detector_config("Base-RetinaNet.yaml"), tmp_path / "teacher.yaml")
    cfg = distillation_config(
        config(name, "MODEL.RETINANET.NUM_CLASSES", 6), "teacher.yaml", "DATASETS.TRAIN", "('own_train',)",
        "DATASETS.TEST", "('own_val',)", "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", "()",
        "DISTILL.METHOD", "MGD", "DISTILL.LEVELS", "['res4', 'res5']", "DISTILL.TEACHER.CHECK", False,
        "OUTPUT_DIR", str(tmp_path / "out"),
    )  # fmt: skip
    command = ["--config-file", save_config(cfg, tmp_path / "run.yaml")]
    for split in ("train", "val"):
        command += ["--dataset", f"own_{split}", str(data / f"{split}.json"), str(data / split)]
    if name == "StandInDetr":
        with pytest.raises(SystemExit, match="StandInDetr without a `backbone`.*student_levels="):
            run(command)
        return
    run(command)
    state = torch.load(tmp_path / "out" / "model_final.pth", weights_only=False)["model"]
    build(name, "MODEL.RETINANET.NUM_CLASSES", 6).load_state_dict(state, strict=True)
    assert "loss_mgd_generation" in (tmp_path / "out" / "metrics.json").read_text()
