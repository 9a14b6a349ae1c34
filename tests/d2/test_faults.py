"""Faults that were found where distillation is used as Detectron2 is, each with its right outcome."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch
from detectron2.export import scripting_with_instances
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    ROI_HEADS_REGISTRY,
    Backbone,
    GeneralizedRCNN,
    GeneralizedRCNNWithTTA,
    StandardROIHeads,
    build_backbone,
    build_model,
)
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.solver import get_default_optimizer_params
from detectron2.structures import Boxes, ImageList
from torch import nn

from acam_kd.d2 import checkpoint_distiller, guard_gradients

from .conftest import detector_config, distillation_config, inputs, refused, save_config
from .test_segmentation import labelled, segmentor

FASTER = "Base-RCNN-FPN.yaml"
C4 = [
    "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
    "MODEL.RPN.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.IN_FEATURES", "['res4']", "MODEL.ROI_HEADS.NAME",
    "Res5ROIHeads", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]",
]  # fmt: skip
CLASS_METHODS = ("KD", "DKD", "NKD")


@pytest.fixture
def build(rcnn_teacher, tmp_path):
    """Builds a Faster R-CNN, or a student with other options, in training, under a teacher, with KEY VALUE pairs."""

    def made(*opts, student=(), teacher=None, base=FASTER):
        path = rcnn_teacher if teacher is None else save_config(teacher, tmp_path / "own_teacher.yaml")
        return build_model(distillation_config(detector_config(base, *student), path, *opts)).train()

    return made


class Blocks(nn.Module):
    """Stands for a ViT: what counts is the name of its parameters."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))


def test_f1_layer_wise_learning_rates_are_the_plain_models(build, rcnn):
    def rates(model):
        model.backbone.net = Blocks()
        factor = partial(get_vit_lr_decay_rate, num_layers=4, lr_decay_rate=0.5)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = get_default_optimizer_params(model, base_lr=1.0, lr_factor_func=factor)
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    plain, distilled = rates(build_model(rcnn)), rates(build())
    assert sorted(set(plain.values())) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    own = {name: rate for name, rate in distilled.items() if not name.startswith("distillation.")}
    assert own == plain and {distilled[name] for name in distilled.keys() - own.keys()} == {1.0}


def with_channels(number, *opts):
    """Statistics of so many channels."""
    return ["MODEL.PIXEL_MEAN", str([0.0] * number), "MODEL.PIXEL_STD", str([1.0] * number), *opts]


def images(channels):
    """A batch whose channel k is k everywhere."""
    values = torch.arange(float(channels))[:, None, None].expand(channels, 64, 96)
    return [{**x, "image": values} for x in inputs()]


@pytest.mark.parametrize(("channels", "wanted"), [(4, [0, 1, 2, 3]), (3, [2, 1, 0]), (2, [0, 1])])
def test_f2_channels_arrive_in_their_order(channels, wanted, build, storage):
    """R, G, B become B, G, R for a teacher of that order, and nothing else does."""
    teacher = detector_config(FASTER, *with_channels(channels))
    model = build(student=with_channels(channels, "INPUT.FORMAT", "RGB"), teacher=teacher)
    seen = []
    model.distillation.teacher.network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    model(images(channels))
    assert seen[0][0, :, 5, 5].tolist() == wanted


@pytest.mark.parametrize("method", ["MGD", "ACAMKD", "FGD+MGD"])
def test_f3_an_optimizer_without_the_methods_parameters_is_an_error(method, build, tmp_path):
    model = build("DISTILL.METHOD", method)
    parts = (model.backbone, model.roi_heads, model.proposal_generator)
    forgetful = torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=1e-9)
    hint = r"model.parameters\(\), or add model.distillation.parameters\(\)"
    with refused("optimizer", "none of the method's parameters", "all of them", hint):
        guard_gradients(forgetful, model, 35.0)
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import SimpleTrainer

    trainer = SimpleTrainer(model, [inputs()], forgetful)
    trainer.checkpointer = DetectionCheckpointer(model, str(tmp_path))
    with refused("optimizer", "none of the method's parameters", "all of them", hint):
        checkpoint_distiller(trainer)
    with refused("optimizer", "none of the method's parameters", "all of them", hint):
        checkpoint_distiller(DetectionCheckpointer(model, str(tmp_path), optimizer=forgetful))
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    guard_gradients(trainer.optimizer, model, 35.0)
    checkpoint_distiller(trainer)


def test_f3_without_either_the_log_says_it(build, storage, caplog):
    model = build("DISTILL.METHOD", "MGD")
    forgetful = torch.optim.SGD(model.backbone.parameters(), lr=1e-9)
    with caplog.at_level(logging.WARNING, logger="detectron2.acam_kd"):
        for _ in range(5):
            sum(model(inputs()).values()).backward()
            forgetful.step()
            storage.step()
    assert caplog.text.count("the method's parameters are in no optimizer") == 1


def test_f4_a_method_that_reaches_nothing_is_an_error_beside_another(build, storage):
    model = build("DISTILL.METHOD", "ACAMKD+KD")
    model.backbone.requires_grad_(False)
    with refused("student", "no gradient at p2, p3", "for ACAMKD to train", "{levels}"):
        model(inputs())


def test_f4_a_frozen_level_among_several_is_a_warning(tmp_path, storage, caplog):
    frozen = segmentor("DeepLabV3+", "MODEL.BACKBONE.FREEZE_AT", "2")
    path = save_config(segmentor("DeepLabV3+"), tmp_path / "t.yaml")
    model = build_model(distillation_config(frozen, path, "DISTILL.TAPS", "['backbone']")).train()
    with caplog.at_level(logging.WARNING, logger="detectron2.acam_kd"):
        losses = model(labelled())
        model(labelled())
    assert caplog.text.count("no gradient reaches the student at res2: leave these levels out") == 1
    sum(value for name, value in losses.items() if "acam" in name).backward()
    assert next(model.backbone.res5.parameters()).grad is not None


@META_ARCH_REGISTRY.register()
class NoObjects(GeneralizedRCNN):
    """As PanopticDeepLab: trained without ``instances``."""

    def forward(self, batched_inputs):
        return {"loss": self.backbone(self.preprocess_image(batched_inputs).tensor)["p5"].mean() ** 2}


@pytest.mark.parametrize("method", ["FGD", "PKD+FGD"])
def test_f5_boxes_that_never_come_are_an_error(method, build, storage):
    model = build("DISTILL.METHOD", method, student=["MODEL.META_ARCHITECTURE", "NoObjects"])
    without = [{name: value for name, value in x.items() if name != "instances"} for x in inputs()]
    with refused("targets", "no boxes", "the boxes of every image", "FGD needs them.*MGD or PKD"):
        model(without)
    assert "loss_fgd_foreground" in model(inputs(boxes=False))  # images that show nothing are another matter


@META_ARCH_REGISTRY.register()
class PadsToSquares(GeneralizedRCNN):
    """A student whose backbone says what ViTDet's SimpleFeaturePyramid says: batches become squares of 128."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.backbone = Square(self.backbone)


class Square(Backbone):
    size_divisibility = 0
    padding_constraints = {"size_divisiblity": 32, "square_size": 128}  # Detectron2's spelling

    def __init__(self, net):
        super().__init__()
        self.net, self.output_shape = net, net.output_shape

    def forward(self, x):
        return self.net(x)


@META_ARCH_REGISTRY.register()
class PadsItself(nn.Module):
    """As MaskFormer: pads by a key of its own; its backbone asks for nothing."""

    def __init__(self, cfg):
        super().__init__()
        self.backbone = build_backbone(cfg)

    def forward(self, batched_inputs):
        batch = ImageList.from_tensors([x["image"].float() for x in batched_inputs], 32).tensor
        return {"loss": self.backbone(batch)["res5"].mean() ** 2}


ALL = ["MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']"]


@pytest.mark.parametrize("name", ["PadsToSquares", "PadsItself"])
def test_f9_students_that_pad_in_another_way_train(name, build, storage):
    own = ALL if name == "PadsItself" else []
    model = build("DISTILL.METHOD", "Mimic", student=[*C4, *own, "MODEL.META_ARCHITECTURE", name])
    losses = model(inputs(size=(60, 90)))
    assert losses["loss_mimic_mse"] > 0
    sum(losses.values()).backward()
    assert [name for name, p in model.backbone.named_parameters() if p.grad is None] == []


@BACKBONE_REGISTRY.register()
class Floors(Backbone):
    """Claims a stride of 16, and drops what is left over at the border."""

    size_divisibility = 0

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 16, stride=16)
        self._out_features, self._out_feature_strides, self._out_feature_channels = ["flat"], {"flat": 16}, {"flat": 16}

    def forward(self, x):
        return {"flat": self.conv(x)}


def test_f9_a_teacher_whose_maps_do_not_fit_the_batch_is_named_in_the_step(build, storage):
    opts = ["MODEL.BACKBONE.NAME", "Floors", "MODEL.META_ARCHITECTURE", "ProposalNetwork"]
    opts += ["MODEL.RPN.IN_FEATURES", "['flat']", "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]"]
    model = build("DISTILL.METHOD", "Mimic", student=C4, teacher=detector_config(FASTER, *opts))
    assert "loss_mimic_mse" in model(inputs(size=(64, 96)))
    with refused(
        "teacher", "3 x 5 positions at level flat", "4 x 6 of the student's res4", "leave res4 out of {levels}"
    ):
        model(inputs(size=(60, 90)))


@META_ARCH_REGISTRY.register()
class Branches(GeneralizedRCNN):
    """As in Unbiased Teacher: more arguments, and losses first in a tuple."""

    def forward(self, batched_inputs, branch="supervised"):
        output = super().forward(batched_inputs)
        return (output, [branch], {}) if self.training else output


@META_ARCH_REGISTRY.register()
class Summed(GeneralizedRCNN):
    """One loss, as SimpleTrainer takes it."""

    def forward(self, batched_inputs):
        output = super().forward(batched_inputs)
        return sum(output.values()) if self.training else output


@pytest.mark.parametrize("branch", ["supervised", "unsup_data_weak", None])
def test_f10_more_arguments_and_more_outputs(branch, build, storage):
    model = build(student=["MODEL.META_ARCHITECTURE", "Branches"])
    losses, *rest = model(inputs(), **({} if branch is None else {"branch": branch}))
    assert rest == [[branch or "supervised"], {}]
    assert {"loss_cls", "loss_rpn_cls", "loss_acam_spatial"} < set(losses)
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert "instances" in model.eval()(inputs(), branch="any")[0]


def test_f10_one_summed_loss(build, rcnn, storage):
    model = build("DISTILL.METHOD", "Mimic", student=["MODEL.META_ARCHITECTURE", "Summed"])
    torch.manual_seed(3)
    total = model(inputs())
    ours = sum(model.distillation.losses.values())
    assert total.dim() == 0 and ours > 0 and model.distillation.metrics()["distillation_to_task"] > 0
    model.distillation.remove()
    torch.manual_seed(3)
    torch.testing.assert_close(total, model(inputs()) + ours, rtol=1e-4, atol=1e-4)
    total.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


FIELDS = {
    "proposal_boxes": Boxes,
    "objectness_logits": torch.Tensor,
    "pred_boxes": Boxes,
    "scores": torch.Tensor,
    "pred_classes": torch.Tensor,
}


@pytest.mark.parametrize("method", ["PKD", *CLASS_METHODS])
@pytest.mark.parametrize("base", [FASTER, "Base-RetinaNet.yaml"])
def test_f12_after_remove_the_student_can_be_scripted(base, method, build, storage):
    model = build("DISTILL.METHOD", method, base=base, teacher=detector_config(base))
    keys = {name: sorted(vars(module)) for name, module in build_model(detector_config(base)).named_modules()}
    model(inputs())
    model.distillation.remove()
    assert not hasattr(model, "distillation")
    for name, module in model.named_modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, name
        assert set(vars(module)) - set(keys[name]) <= {"loss_normalizer"}, name  # RetinaNet's own
    model.eval()
    fields = FIELDS if base == FASTER else {k: FIELDS[k] for k in ("pred_boxes", "scores", "pred_classes")}
    assert isinstance(scripting_with_instances(model, fields), torch.jit.ScriptModule)


class Cosine(nn.Module):
    """A box predictor of one's own, as in few-shot detection: a forward, losses and nothing else."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)

    def losses(self, predictions, proposals):
        return self.inner.losses(predictions, proposals)


class Three(FastRCNNOutputLayers):
    """A box predictor with one more output."""

    def forward(self, x):
        return (*super().forward(x), None)

    def losses(self, predictions, proposals):
        return super().losses(predictions[:2], proposals)


@ROI_HEADS_REGISTRY.register()
class CosineHeads(StandardROIHeads):
    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.box_predictor = Cosine(self.box_predictor)


@ROI_HEADS_REGISTRY.register()
class ThreeHeads(StandardROIHeads):
    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        self.box_predictor = Three(cfg, self.box_head.output_shape)


@pytest.mark.parametrize("method", CLASS_METHODS)
@pytest.mark.parametrize("heads", ["CosineHeads", "ThreeHeads"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_f14_predictors_of_ones_own(role, heads, method, build, storage):
    own = ["MODEL.ROI_HEADS.NAME", heads]
    teacher = detector_config(FASTER, *own) if role == "teacher" else None
    model = build("DISTILL.METHOD", method, student=own if role == "student" else [], teacher=teacher)
    losses = model(inputs())
    ours = {name: value for name, value in losses.items() if name.startswith(f"loss_{method.lower()}")}
    assert ours and "loss_cls" in losses
    sum(ours.values()).backward()
    assert next(model.backbone.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize(("student", "teacher"), [(4, 3), (3, 4), (3, 1), (2, 3)])
def test_f15_unequal_channels_are_an_error_at_building(student, teacher, build):
    with refused("teacher", f"{teacher} channels", f"the student's {student}", "trained on images like"):
        build(student=with_channels(student), teacher=detector_config(FASTER, *with_channels(teacher)))


def test_f15_a_grey_image_is_repeated_for_a_teacher_of_three_channels(build, storage):
    grey = ["MODEL.PIXEL_MEAN", "[10.0]", "MODEL.PIXEL_STD", "[2.0]", "INPUT.FORMAT", "L"]
    colours = ["MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]", "MODEL.PIXEL_STD", "[1.0, 2.0, 4.0]"]
    model = build(student=grey, teacher=detector_config(FASTER, *colours))
    seen = []
    model.distillation.teacher.network.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    losses = model([{**x, "image": torch.full((1, 64, 96), 7.0)} for x in inputs()])
    assert seen[0].shape == (2, 3, 64, 96) and "loss_acam_spatial" in losses
    torch.testing.assert_close(seen[0][0, :, 5, 5], torch.tensor([6.0, 2.5, 1.0]))


def test_f18_test_time_augmentation_takes_the_model(build, rcnn):
    rcnn.TEST.AUG.MIN_SIZES = (64,)
    model = build().eval()
    assert isinstance(model, GeneralizedRCNN)
    with torch.no_grad():
        found = GeneralizedRCNNWithTTA(rcnn, model)([{**x, "file_name": ""} for x in inputs()])
    assert len(found) == 2 and "instances" in found[0]
