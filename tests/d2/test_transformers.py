"""Swin-FPN and ViTDet as students and teachers: networks, padding, training by the command, LazyConfigs."""

from __future__ import annotations

import inspect
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.model_zoo import get_config
from detectron2.modeling import SimpleFeaturePyramid, SwinTransformer, build_model
from detectron2.utils.events import EventStorage

import acam_kd
from acam_kd.d2 import add_distillation_config, add_segmentation_config, build_optimizer
from acam_kd.d2.adapter import D2Adapter

from .conftest import NARROW, ROOT, detector_config, inputs, refused
from .running import run as command
from .running import train

QUICK = ROOT / "configs" / "quick_schedules"
SIZES = [(70, 90), (64, 96)]


def tiny(name, *opts):
    """One of the quick detectors, of three classes: ``swin``, ``vitdet``, or ``resnet``."""
    if name == "resnet":
        return detector_config("Base-RetinaNet.yaml", *opts)
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(QUICK / f"tiny_{name}.yaml"))
    cfg.merge_from_list(["MODEL.RETINANET.NUM_CLASSES", 3, *NARROW, *opts])
    return cfg


def built(name, *opts):
    torch.manual_seed(0)
    return build_model(tiny(name, *opts))


# The networks.


def test_the_vit_is_detectron2s_vitdet_tensor_for_tensor():
    """Two blocks in place of twelve; every other setting is the default of the keys."""
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "vitdet_b.yaml"))
    net = get_config("common/models/mask_rcnn_vitdet.py").model
    node, theirs = cfg.MODEL.VIT, net.backbone.net
    assert (theirs.img_size, theirs.patch_size, theirs.embed_dim) == (node.IMG_SIZE, node.PATCH_SIZE, node.EMBED_DIM)
    assert (theirs.depth, theirs.num_heads, theirs.window_size) == (node.DEPTH, node.NUM_HEADS, node.WINDOW_SIZE)
    assert sorted([*node.GLOBAL_ATTENTION, *theirs.window_block_indexes]) == list(range(12))
    assert (theirs.drop_path_rate, net.backbone.square_pad) == (node.DROP_PATH_RATE, node.SQUARE_PAD)
    cfg.merge_from_list(["MODEL.VIT.DEPTH", 2, "MODEL.VIT.GLOBAL_ATTENTION", [1], "MODEL.DEVICE", "cpu"])
    theirs.depth, theirs.window_block_indexes = 2, [0]
    ours, theirs = build_model(cfg), instantiate(net)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert str(ours).replace("ViTPyramid", "SimpleFeaturePyramid") == str(theirs)
    assert torch.allclose(ours.pixel_mean, theirs.pixel_mean) and torch.allclose(ours.pixel_std, theirs.pixel_std)
    assert ours.input_format == theirs.input_format == "RGB"


def test_swins_keys_are_the_defaults_of_its_constructor():
    cfg = get_cfg()
    add_segmentation_config(cfg)
    defaults = inspect.signature(SwinTransformer).parameters
    for key, value in cfg.MODEL.SWIN.items():
        there = defaults[key.lower()].default
        assert value == (list(there) if isinstance(there, tuple) else there)


@pytest.mark.parametrize("name", ["swin", "vitdet"])
@pytest.mark.parametrize("kind", ["retinanet_", ""])
def test_levels_have_the_declared_shapes(name, kind):
    stages = ["MODEL.FPN.IN_FEATURES", ["p0", "p1", "p2", "p3"]] if name == "swin" and not kind else []
    whole = {"swin": f"build_{kind}swin_fpn_backbone", "vitdet": f"build_{kind}vitdet_backbone"}[name]
    cfg = tiny(name, "MODEL.BACKBONE.NAME", whole, *stages)
    if not kind:
        cfg.merge_from_list(["MODEL.RETINANET.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]])
    backbone = build_model(cfg).backbone
    maps = backbone(torch.zeros(1, 3, 64, 96))
    strides = (8, 16, 32, 64, 128) if kind else (4, 8, 16, 32, 64)
    assert [shape.stride for shape in backbone.output_shape().values()] == list(strides)
    for level, stride in zip(maps, strides):
        assert maps[level].shape == (1, 16, -(-64 // stride), -(-96 // stride))


@pytest.mark.parametrize(("square", "size"), [(0, (96, 96)), (128, (128, 128)), (64, (64, 64))])
def test_a_vits_batches_are_padded(square, size):
    model = built("vitdet", "MODEL.VIT.SQUARE_PAD", square)
    batch = [inputs(size=SIZES[0])[0], inputs(size=SIZES[1])[0]] if square != 64 else inputs(size=(40, 60))
    assert model.preprocess_image(batch).tensor.shape[2:] == size
    assert isinstance(model.backbone, SimpleFeaturePyramid)


# Pairs.


@pytest.mark.parametrize("square", [0, 160], ids=["stride", "square"])
@pytest.mark.parametrize(
    ("student", "teacher"),
    [("swin", "resnet"), ("vitdet", "resnet"), ("resnet", "swin"), ("resnet", "vitdet"), ("vitdet", "swin")],
)
def test_each_learns_from_each_whatever_their_padding(student, teacher, square):
    """Images of 70 x 90 and 64 x 96: no multiples of a stride, and the two models would pad them to other sizes."""
    square = ["MODEL.VIT.SQUARE_PAD", square]
    model, other = (built(name, *(square if name == "vitdet" else [])) for name in (student, teacher))
    acam_kd.distill(model, other, method="ACAMKD", alpha=0.001)
    model.train()
    assert model.distillation.levels == {f"p{i}": f"p{i}" for i in range(3, 8)}
    batch = [inputs(size=SIZES[0])[0], inputs(size=SIZES[1])[0]]
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert {"loss_cls", "loss_acam_spatial"} <= set(losses) and all(x.isfinite() for x in losses.values())
    trunk = model.backbone.net if student == "vitdet" else model.backbone.bottom_up
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trunk.parameters() if p.requires_grad)
    assert all(p.grad is None for p in other.parameters())
    model.distillation.remove()
    assert set(model.state_dict()) == set(built(student, *(square if student == "vitdet" else [])).state_dict())


@pytest.mark.parametrize(("name", "trunk"), [("swin", "backbone.bottom_up."), ("vitdet", "backbone.net.")])
def test_neck_and_head_are_inherited_and_the_trunk_is_not(name, trunk):
    model, other = built(name), built(name)
    for p in other.parameters():
        p.data.add_(1)
    assert D2Adapter(model).trunk == trunk
    acam_kd.distill(model, other, method="PKD", inherit="auto")
    theirs = other.state_dict()
    own = {k: v for k, v in model.state_dict().items() if k not in ("pixel_mean", "pixel_std")}
    same = {k for k, v in own.items() if torch.equal(v, theirs[k])}
    parameters = {k for k, _ in model.named_parameters() if not k.startswith("distillation")}
    assert same & parameters == {k for k in parameters if not k.startswith(trunk)}
    assert {k.split(".")[1] for k in same & parameters if k.startswith("backbone")} >= (
        {"fpn_lateral3"} if name == "swin" else {"simfp_3"}
    )


# Weights and optimizers.


def test_a_swin_classifiers_file_arrives_in_the_trunk(tmp_path):
    """Under the names of Swin's authors, which Detectron2 finds by its query."""
    torch.manual_seed(5)
    trunk = built("swin").backbone.bottom_up
    there = {k: torch.rand_like(v.float()) for k, v in trunk.state_dict().items() if "index" not in k}
    there = {k: v for k, v in there.items() if not k.startswith("norm")}
    others = {"norm.weight": torch.zeros(192), "norm.bias": torch.zeros(192), "head.weight": torch.zeros(10, 192)}
    torch.save({"model": {**there, **others}}, tmp_path / "swin.pth")
    model = built("swin")
    DetectionCheckpointer(model).load(f"{tmp_path / 'swin.pth'}?matching_heuristics=True")
    state = model.backbone.bottom_up.state_dict()
    assert len(there) > 60 and all(torch.equal(state[k], v) for k, v in there.items())


def test_adamw_spares_positions_and_norms():
    model = built("swin")
    cfg = tiny("swin", "SOLVER.OPTIMIZER", "ADAMW", "SOLVER.WEIGHT_DECAY", 0.05, "SOLVER.BASE_LR", 0.001)
    optimizer = build_optimizer(cfg, model)
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {id(p): n for n, p in model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert set(decay) == {n for n, p in model.named_parameters() if p.requires_grad}
    spared = {n for n, value in decay.items() if value == 0}
    assert {n for n in decay if "relative_position" in n or ".norm1." in n} <= spared
    assert {decay[n] for n in decay if n.endswith("qkv.weight")} == {0.05}
    assert not isinstance(build_optimizer(tiny("swin"), model), torch.optim.AdamW)
    with refused("SOLVER.OPTIMIZER", "Adam", "one of SGD, ADAMW"):
        build_optimizer(tiny("swin", "SOLVER.OPTIMIZER", "Adam"), model)


@pytest.mark.parametrize(
    ("name", "key", "value", "allowed"),
    [
        ("swin", "MODEL.FPN.IN_FEATURES", ["res3", "res4"], "some of p0, p1, p2, p3"),
        ("swin", "MODEL.SWIN.DEPTHS", [2, 2, 2], "four numbers of each"),
        ("swin", "MODEL.SWIN.NUM_HEADS", [1, 5, 2, 2], "a divisor of 48 for stage 1"),
        ("vitdet", "MODEL.VIT.NUM_HEADS", 5, "a divisor of MODEL.VIT.EMBED_DIM, 48"),
        ("vitdet", "MODEL.VIT.GLOBAL_ATTENTION", [1, 4], "blocks among 0 to 3"),
        ("vitdet", "MODEL.BACKBONE.FREEZE_AT", 2, "0: no part of a ViT is frozen"),
    ],
)
def test_wrong_values_are_named_with_their_key(name, key, value, allowed):
    with refused(key, allowed=allowed):
        built(name, key, value)


def test_frozen_stages_of_swin():
    trunk = built("swin", "MODEL.BACKBONE.FREEZE_AT", 2).backbone.bottom_up
    assert not any(p.requires_grad for part in (trunk.patch_embed, trunk.layers[0]) for p in part.parameters())
    assert all(p.requires_grad for p in trunk.layers[1].parameters())
    assert all(p.requires_grad for p in built("swin").parameters())


# By the command.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["swin", "vitdet"])
def test_the_quick_config_trains_evaluates_resumes_and_leaves_a_plain_student(name, data, tmp_path):  # noqa: F811
    own = [
        "--config-file", str(QUICK / f"acam_{name}_instant.yaml"),
        "--dataset", "own_train", str(data / "train.json"), str(data / "train"),
        "--dataset", "own_val", str(data / "val.json"), str(data / "val"),
    ]  # fmt: skip
    opts = [
        "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)", "SOLVER.MAX_ITER", "4", "SEED", "3",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.CHECKPOINT_PERIOD", "2", "INPUT.MIN_SIZE_TRAIN", "(72,)",
        "INPUT.MIN_SIZE_TEST", "72", "DISTILL.TEACHER.CHECK", "False", "OUTPUT_DIR",
    ]  # fmt: skip
    whole = train([*own, *opts, str(tmp_path / "whole")])
    train([*own, *opts, str(tmp_path / "parts")], until=2)
    parts = train([*own, "--resume", *opts, str(tmp_path / "parts")])
    names = dict(whole.model.named_parameters())
    assert parts.start_iter == 2
    assert all(torch.equal(value, names[n]) for n, value in parts.model.named_parameters())
    found = command([*own, "--eval-only", *opts, str(tmp_path / "whole"), "MODEL.WEIGHTS",
                     str(tmp_path / "whole" / "model_final.pth")])  # fmt: skip
    assert {"AP", "AP50"} <= set(found["bbox"])
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(tmp_path / "whole" / "student_config.yaml"))
    state = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=False)["model"]
    build_model(cfg).load_state_dict(state, strict=True)


def test_a_student_of_other_parts_has_no_key_of_a_transformer(tmp_path):
    from acam_kd.d2 import exported_student_config

    for name, node in (("acam_instant", ""), ("acam_swin_instant", "SWIN"), ("acam_vitdet_instant", "VIT")):
        cfg = get_cfg()
        add_distillation_config(cfg)
        cfg.merge_from_file(str(QUICK / f"{name}.yaml"))
        exported = exported_student_config(cfg)
        assert {"SWIN", "VIT"} & {*exported.MODEL} == ({node} if node else set())
        assert "OPTIMIZER" not in exported.SOLVER


# LazyConfigs.


def mask_rcnn(bottom_up=None):
    """Detectron2's Mask R-CNN, of few channels; on a Swin if one is given."""
    model = get_config("common/models/mask_rcnn_fpn.py").model
    backbone = model.backbone
    backbone.out_channels = model.proposal_generator.head.in_channels = 16
    for head in (model.roi_heads.box_head, model.roi_heads.mask_head):
        head.input_shape.channels = 16
    model.roi_heads.box_head.fc_dims = [16]
    model.roi_heads.box_predictor.input_shape.channels = 16
    model.roi_heads.mask_head.conv_dims = [16, 16]
    if bottom_up is not None:
        backbone.bottom_up, backbone.in_features = bottom_up, ("p0", "p1", "p2", "p3")
    return model


SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 4}


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_lazyconfigs_swin_is_student_and_teacher(role):
    models = {"student": mask_rcnn(), "teacher": mask_rcnn(), role: mask_rcnn(L(SwinTransformer)(**SWIN))}
    model = instantiate(L(acam_kd.distill)(**models, method="MGD")).train()
    assert list(model.distillation.levels) == ["p2", "p3", "p4", "p5"]
    with EventStorage():
        losses = model(inputs(size=(70, 90)))
    sum(losses.values()).backward()
    assert {"loss_mask", "loss_mgd_generation"} <= set(losses)
    assert all(p.grad is not None for p in model.backbone.bottom_up.parameters() if p.requires_grad)


def test_the_swin_teacher_of_configs_lazy_is_detectron2s():
    """Its projects/ViTDet trained the weights that the file names; they are not part of the package."""
    project = Path(detectron2.__file__).resolve().parent.parent / "projects/ViTDet/configs/COCO"
    if not project.is_dir():
        pytest.skip("Detectron2's projects are not here")
    ours = LazyConfig.load(str(ROOT / "configs/lazy/acam_r50_swin_b.py")).model.teacher.model
    theirs = LazyConfig.load(str(project / "cascade_mask_rcnn_swin_b_in21k_50ep.py")).model
    for model in (ours, theirs):
        net = model.backbone.bottom_up
        assert (net.embed_dim, [*net.depths], [*net.num_heads]) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
        net.embed_dim, net.depths = 32, [1, 1, 1, 1]
    ours, theirs = instantiate(ours), instantiate(theirs)
    assert str(ours) == str(theirs)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
