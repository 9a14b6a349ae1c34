"""Distillation of a SemanticSegmentor: on its logits, on its backbone, with Detectron2's own heads."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY, build_model
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.projects.deeplab import add_deeplab_config
from torch import nn

from acam_kd.d2.adapter import backbone_and_logits
from acam_kd.d2.visualize import masks_of, strides_of

from .conftest import NARROW, TINY, distillation_config, refused, save_config

FPN = [
    "MODEL.META_ARCHITECTURE", "SemanticSegmentor", "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone",
    "MODEL.FPN.IN_FEATURES", "['res2', 'res3', 'res4', 'res5']", "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead",
    "MODEL.RESNETS.OUT_FEATURES", "['res2', 'res3', 'res4', 'res5']",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM", "16", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "5", "MODEL.SEM_SEG_HEAD.NORM", "BN",
]  # fmt: skip
DEEPLAB = [
    "MODEL.BACKBONE.NAME", "build_resnet_deeplab_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res2', 'res5']",
    "MODEL.RESNETS.RES5_DILATION", "2", "MODEL.RESNETS.STEM_OUT_CHANNELS", "8",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']", "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3Head",
    "MODEL.SEM_SEG_HEAD.ASPP_CHANNELS", "16", "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "16",
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE", "cross_entropy",
]  # fmt: skip
PLUS = [
    *DEEPLAB, "MODEL.SEM_SEG_HEAD.NAME", "DeepLabV3PlusHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res2', 'res5']",
    "MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "4",
]  # fmt: skip
CROP = ["INPUT.CROP.ENABLED", "True", "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", "(64, 96)"]
HEADS = {"FPN": FPN, "DeepLabV3": FPN + DEEPLAB, "DeepLabV3+": FPN + PLUS}


def segmentor(head="FPN", *opts):
    cfg = get_cfg()
    add_deeplab_config(cfg)
    cfg.merge_from_list([*TINY, *NARROW, *HEADS[head], *CROP, *opts])
    return cfg


def labelled(n=2, size=(64, 96), classes=5):
    draw = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=draw, dtype=torch.uint8),
            "sem_seg": torch.randint(0, classes, size, generator=draw),
            "height": size[0],
            "width": size[1],
        }
        for _ in range(n)
    ]


@pytest.mark.parametrize("student", HEADS)
@pytest.mark.parametrize("teacher", HEADS)
def test_logits_of_every_head_and_stride(student, teacher, tmp_path, storage):
    """Strides are 4, 16 and 4."""
    path = save_config(segmentor(teacher), tmp_path / "teacher.yaml")
    model = build_model(distillation_config(segmentor(student), path, "DISTILL.METHOD", "Mimic")).train()
    assert model.distillation.levels == {"logits": "logits"} and not list(model.distillation.method.parameters())
    losses = model(labelled())
    assert set(losses) == {"loss_sem_seg", "loss_mimic_mse"}
    sum(losses.values()).backward()
    assert model.sem_seg_head.predictor.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("head", HEADS)
def test_the_extracted_logits_are_those_of_the_head(head):
    model = build_model(segmentor(head)).eval()
    seen = []
    model.sem_seg_head.predictor.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        model(labelled(1))
        batch = (labelled(1)[0]["image"] - model.pixel_mean) / model.pixel_std
        found = backbone_and_logits(model, batch[None])["logits"]
    assert torch.equal(found, seen[0]) and found.shape[1] == 5


def test_acam_on_logits_makes_as_many_masks_as_classes(tmp_path, storage):
    path = save_config(segmentor(), tmp_path / "teacher.yaml")
    cfg = distillation_config(segmentor(), path)
    model = build_model(cfg).train()
    losses = model(labelled())
    assert {"loss_sem_seg", "loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"} == set(losses)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    masks = model.distillation.method.masks()["logits"]
    assert masks["spatial"].shape == (2, 5, 16, 24) and masks["channel"].shape == (2, 5, 5)
    image = labelled(1)[0]["image"].permute(1, 2, 0).numpy()
    assert masks_of(model, cfg, image)["logits"]["spatial"].shape == (5, 16, 24)
    assert strides_of(model, cfg, image) == {"logits": 4}


def test_the_backbone_can_be_tapped_too(tmp_path, storage):
    path = save_config(segmentor("FPN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "9"), tmp_path / "teacher.yaml")
    only = build_model(distillation_config(segmentor(), path, "DISTILL.TAPS", "['backbone']")).train()
    assert list(only.distillation.levels) == ["p2", "p3", "p4", "p5", "p6"] and "loss_acam_spatial" in only(labelled())
    with refused("teacher", "9 classes at logits", "the student's 5", "{taps} or another {method}"):
        build_model(distillation_config(segmentor(), path))
    path = save_config(segmentor(), tmp_path / "teacher.yaml")
    both = build_model(
        distillation_config(
            segmentor(), path, "DISTILL.TAPS", "['backbone', 'logits']", "DISTILL.LEVELS", "['p5', 'logits']"
        )
    ).train()
    both(labelled())
    assert {k: v["spatial"].shape[1] for k, v in both.distillation.method.masks().items()} == {"p5": 6, "logits": 5}


def test_nothing_is_inherited_by_default(tmp_path):
    """The paper's segmentation rows have no inheritance."""
    path = save_config(segmentor(), tmp_path / "teacher.yaml")
    torch.manual_seed(3)
    model = build_model(distillation_config(segmentor(), path))
    own, teacher = model.sem_seg_head.predictor, model.distillation.teacher.network.sem_seg_head.predictor
    assert not torch.equal(own.weight, teacher.weight)


def test_the_checkpoint_is_the_plain_segmentor_and_the_teacher_is_in_none(tmp_path):
    path = save_config(segmentor(), tmp_path / "teacher.yaml")
    model = build_model(distillation_config(segmentor(), path))
    missing, unexpected = build_model(segmentor()).load_state_dict(model.state_dict())
    assert not missing and not unexpected
    teacher = {id(p) for p in model.distillation.teacher.network.parameters()}
    assert not teacher & {id(p) for p in model.parameters()}
    assert not any(isinstance(m, nn.Module) and m is model.distillation.teacher.network for m in model.modules())


@pytest.mark.parametrize("size", [(64, 96), (64, 80), (48, 80)])
@pytest.mark.parametrize("student", ["DeepLabV3", "FPN"])
def test_a_teacher_that_needs_padding_gets_crops_or_padding_of_its_multiple(student, size, tmp_path, storage):
    """A pyramid adds maps of neighbouring strides; one as a student is padded to what the teacher needs."""
    path = save_config(segmentor("FPN"), tmp_path / "teacher.yaml")
    crop = ["INPUT.CROP.SIZE", str(size)] if size[0] == 64 else ["INPUT.CROP.ENABLED", "False"]
    model = build_model(distillation_config(segmentor(student, *crop), path)).train()
    if student == "FPN" or size == (64, 96):
        assert "loss_acam_spatial" in model(labelled(size=size))
    else:
        with refused(
            "teacher", rf"batch \(2, 3, {size[0]}, {size[1]}\)", "", "multiples of 32.*or crops, of such sides"
        ):
            model(labelled(size=size))


def test_masks_of_an_image_of_any_size(tmp_path):
    """The teacher here needs multiples of 32, which crops have and whole images have not."""
    path = save_config(segmentor("FPN"), tmp_path / "teacher.yaml")
    cfg = distillation_config(segmentor("DeepLabV3", "INPUT.MIN_SIZE_TEST", "0"), path)
    image = torch.zeros(60, 90, 3, dtype=torch.uint8).numpy()
    assert masks_of(build_model(cfg), cfg, image)["logits"]["spatial"].shape == (5, 64 // 16, 96 // 16)


def test_a_teacher_without_logits_is_an_error_with_the_keys(rcnn_teacher):
    with refused("taps", "logits", "backbone or classes of the teacher, a GeneralizedRCNN", "{method}"):
        build_model(distillation_config(segmentor(), rcnn_teacher))


@SEM_SEG_HEADS_REGISTRY.register()
class ManyLayersHead(SemSegFPNHead):
    """A head whose ``layers`` is something else."""

    def forward(self, features, targets=None):
        self.__dict__["layers"] = nn.ModuleList()
        x = self.predictor(sum(head(features[name]) for head, name in zip(self.scale_heads, self.in_features)))
        return (None, self.losses(x, targets)) if self.training else (x, {})


def test_any_head_with_a_predictor_can_teach(tmp_path, storage):
    path = save_config(segmentor("FPN", "MODEL.SEM_SEG_HEAD.NAME", "ManyLayersHead"), tmp_path / "teacher.yaml")
    model = build_model(distillation_config(segmentor(), path)).train()
    assert "loss_acam_spatial" in model(labelled())
    assert not model.distillation.teacher.network.sem_seg_head.predictor._forward_hooks
