"""The meta-architecture in real Detectron2: pairs, losses, logging, what is trained and what is saved."""

from __future__ import annotations

import copy
import logging
import pickle
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import RetinaNet, build_model

from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.d2 import DistillationMetaArch, exported_student_config
from acam_kd.d2.names import key
from acam_kd.methods import Mimic

from .conftest import ROOT, broken, detector_config, distillation_config, inputs, refused, save_config, save_weights

PAIRS = {
    "retinanet": ("Base-RetinaNet.yaml", "Base-RetinaNet.yaml", []),
    "faster rcnn": ("Base-RCNN-FPN.yaml", "Base-RCNN-FPN.yaml", []),
    "mask rcnn": ("Base-RCNN-FPN.yaml", "Base-RCNN-FPN.yaml", ["MODEL.MASK_ON", True]),
    "retinanet from faster rcnn": ("Base-RetinaNet.yaml", "Base-RCNN-FPN.yaml", []),
    "faster rcnn from retinanet": ("Base-RCNN-FPN.yaml", "Base-RetinaNet.yaml", []),
    "proposal network": ("Base-RCNN-FPN.yaml", "Base-RCNN-FPN.yaml", ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("boxes", [True, False])
def test_pairs_train_every_parameter(pair, boxes, storage, tmp_path):
    student, teacher, opts = PAIRS[pair]
    wide = detector_config(teacher, "MODEL.FPN.OUT_CHANNELS", 24, "MODEL.RESNETS.DEPTH", 101)
    cfg = distillation_config(detector_config(student, *opts), save_config(wide, tmp_path / "t.yaml"))
    model = build_model(cfg).train()
    losses = model(inputs(boxes=boxes))
    assert {"loss_acam_spatial", "loss_acam_channel", "loss_acam_diversity"} < set(losses)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    out = model.eval()(inputs())
    assert len(out) == 2 and ("instances" in out[0] or "proposals" in out[0])


def test_panoptic_fpn_is_a_student(storage, rcnn_teacher):
    student = detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 4,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    )  # fmt: skip
    model = build_model(distillation_config(student, rcnn_teacher)).train()
    batch = [{**x, "sem_seg": torch.zeros(64, 96, dtype=torch.int64)} for x in inputs()]
    losses = model(batch)
    assert {"loss_sem_seg", "loss_acam_spatial"} < set(losses)
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_evaluation_is_the_plain_student(retinanet, retinanet_teacher):
    model = build_model(distillation_config(retinanet, retinanet_teacher)).eval()
    plain = build_model(retinanet).eval()
    plain.load_state_dict(model.state_dict())
    got, want = model(inputs())[0]["instances"], plain(inputs())[0]["instances"]
    assert torch.equal(got.pred_boxes.tensor, want.pred_boxes.tensor) and torch.equal(got.scores, want.scores)


def test_the_student_starts_alike_under_every_method(retinanet, retinanet_teacher):
    starts = []
    for method in ("", "Mimic", "ACAMKD"):
        torch.manual_seed(5)
        opts = ["DISTILL.METHOD", method, "DISTILL.INHERIT", "never"]
        starts.append(build_model(distillation_config(retinanet, retinanet_teacher, *opts)).state_dict())
    for other in starts[1:]:
        assert all(torch.equal(v, starts[0][k]) for k, v in other.items())


def test_no_teacher_is_built_for_the_student_alone(retinanet, storage):
    cfg = distillation_config(retinanet, "nowhere.yaml", "DISTILL.METHOD", "", "DISTILL.INHERIT", "never")
    model = build_model(cfg).train()
    assert set(model(inputs())) == {"loss_cls", "loss_box_reg"} and not hasattr(model, "distillation")


def test_state_is_the_plain_students(retinanet, retinanet_teacher):
    model = build_model(distillation_config(retinanet, retinanet_teacher))
    assert set(model.state_dict()) == set(build_model(retinanet).state_dict())
    plain = [name for name, _ in build_model(retinanet).named_parameters()]
    names = [name for name, _ in model.named_parameters()]
    assert names[: len(plain)] == plain and len(names) > len(plain)
    assert all(name.startswith("distillation.method.") for name in names[len(plain) :])
    assert not [name for name in model.distillation.state_dict() if "teacher" in name]


def test_stock_imagenet_weights_load_beside_a_teacher(retinanet, retinanet_teacher, tmp_path):
    """In a peer with the teacher as a submodule this stops with "Cannot match one checkpoint key to multiple keys"."""
    model = build_model(distillation_config(retinanet, retinanet_teacher, "DISTILL.INHERIT", "never"))
    bottom_up = copy.deepcopy(model.backbone.bottom_up)
    weights = {
        k: torch.randn_like(v).numpy() if v.dtype.is_floating_point else v.numpy()
        for k, v in bottom_up.state_dict().items()
    }
    with open(tmp_path / "R-50.pkl", "wb") as file:
        pickle.dump({"model": weights, "__author__": "test", "matching_heuristics": True}, file)
    DetectionCheckpointer(model).load(str(tmp_path / "R-50.pkl"))
    loaded = model.backbone.bottom_up.state_dict()
    assert all((loaded[k].numpy() == v).all() for k, v in weights.items())


def test_weights_of_another_number_of_classes_load_as_into_the_student(retinanet, retinanet_teacher, tmp_path, caplog):
    five = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 5)
    weights = save_weights(five, tmp_path / "five.pth")
    model = build_model(distillation_config(retinanet, retinanet_teacher))
    DetectionCheckpointer(model).load(weights)
    source = torch.load(weights)["model"]
    assert torch.equal(model.state_dict()["head.bbox_pred.weight"], source["head.bbox_pred.weight"])
    assert model.state_dict()["head.cls_score.bias"].shape == (27,)


def test_it_is_the_student(retinanet, retinanet_teacher):
    model = build_model(distillation_config(retinanet, retinanet_teacher))
    assert type(model) is RetinaNet and model.device == torch.device("cpu")
    with pytest.raises(AttributeError, match="nonsense"):
        model.nonsense  # noqa: B018
    twin = copy.deepcopy(model)
    assert twin.backbone is not model.backbone and twin.distillation is not model.distillation
    assert twin.distillation.teacher is model.distillation.teacher
    assert twin.distillation._student is twin
    assert set(pickle.loads(pickle.dumps(model)).state_dict()) == set(model.state_dict())


@pytest.mark.parametrize("method", ["ACAMKD", "KD"])
def test_the_teacher_is_left_as_it_is(method, rcnn, rcnn_teacher, storage):
    """It gets no gradient, its statistics stay, and no flag or mode of it is written."""
    model = build_model(distillation_config(rcnn, rcnn_teacher, "DISTILL.METHOD", method)).train()
    network = model.distillation.teacher.network
    next(network.children()).train()
    flags = [p.requires_grad for p in network.parameters()], [m.training for m in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    sum(model(inputs()).values()).backward()
    assert flags == ([p.requires_grad for p in network.parameters()], [m.training for m in network.modules()])
    assert len(set(flags[1])) == 2 and all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    own = {id(p) for p in network.parameters()}
    assert not own & {id(p) for p in model.parameters()} and network not in list(model.modules())


def test_as_a_part_of_another_module_it_loads_what_it_saved(retinanet, retinanet_teacher):
    first, second = (
        torch.nn.Sequential(build_model(distillation_config(retinanet, retinanet_teacher))) for _ in range(2)
    )
    second.load_state_dict(first.state_dict(), strict=True)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    assert second[0].distillation._new  # what its method has learnt was not in there
    incomplete = {k: v for k, v in first.state_dict().items() if "cls_score.bias" not in k}
    with pytest.raises(RuntimeError, match="cls_score.bias"):
        second.load_state_dict(incomplete)


def test_the_batch_tells_whether_the_teacher_can_take_it(rcnn_teacher, storage):
    """A pyramid needs multiples of 32, and the student's batches are not padded."""
    c4 = detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res4']",
        "MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.IN_FEATURES", "['res4']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]",
    )  # fmt: skip
    model = build_model(distillation_config(c4, rcnn_teacher)).train()
    assert "loss_acam_spatial" in model(inputs(size=(64, 96)))
    for _ in range(2):  # in no step is it the library's message
        with refused("teacher", r"batch \(2, 3, 60, 90\)", "takes it", "multiples of 32.*whose backbone is like"):
            model(inputs(size=(60, 90)))
    assert "loss_acam_spatial" in model(inputs(size=(64, 96)))


def test_a_method_registered_too_late_is_named(retinanet, retinanet_teacher, monkeypatch):
    cfg = distillation_config(retinanet, retinanet_teacher, "DISTILL.METHOD", "Late")
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Late", Mimic)
    with refused("method", "Late", "registered before", "import its module first"):
        build_model(cfg)


def test_a_new_distiller_in_a_resumed_run_is_a_warning(retinanet, retinanet_teacher, storage, caplog):
    cfg = distillation_config(retinanet, retinanet_teacher)
    forgotten, restored = build_model(cfg).train(), build_model(cfg).train()
    restored.distillation.load_state_dict(forgotten.distillation.state_dict())
    storage.iter = 5
    with caplog.at_level(logging.WARNING, logger="detectron2.acam_kd"):
        restored(inputs())
        assert "NEW distiller" not in caplog.text
        forgotten(inputs())
        forgotten(inputs())
    assert caplog.text.count("iteration 5 with a NEW distiller") == 1


def test_levels_can_be_chosen_and_a_wrong_one_lists_the_known(retinanet, retinanet_teacher):
    model = build_model(distillation_config(retinanet, retinanet_teacher, "DISTILL.LEVELS", "['p4', 'p5']"))
    assert list(model.distillation.method.levels) == ["p4", "p5"]
    with refused("levels", "p2", "the student: p3, p4, p5, p6, p7"):
        build_model(distillation_config(retinanet, retinanet_teacher, "DISTILL.LEVELS", "['p2']"))


def test_pyramids_without_a_common_stride_are_both_printed(retinanet, tmp_path):
    c4 = detector_config(
        "Base-RCNN-FPN.yaml", "MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res2']",
        "MODEL.META_ARCHITECTURE", "ProposalNetwork", "MODEL.RPN.IN_FEATURES", "['res2']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]",
    )  # fmt: skip
    both = r"student: p3 \(stride 8.*teacher: res2 \(stride 4, 8 channels\)"
    with refused("teacher", "no stride", "same strides", both):
        build_model(distillation_config(retinanet, save_config(c4, tmp_path / "c4.yaml")))


@pytest.mark.parametrize(
    ("opts", "argument", "value", "allowed"),
    [
        (["DISTILL.METHOD", "ACAM"], "method", "ACAM", "one of ACAMKD, .*Mimic"),
        (["DISTILL.ACAMKD.FUSION", "Sum"], "ACAMKD.fusion", "Sum", "one of CrossAttentionFusion"),
        (["DISTILL.ACAMKD.SPATIAL_MASKING", "Soft"], "ACAMKD.spatial_masking", "Soft", "one of .*SpatialMasking"),
        (["DISTILL.ACAMKD.NUM_MASKS", -1], "ACAMKD.num_masks", "-1", ">= 0"),
        (["DISTILL.TAPS", "['logit']"], "taps", "logit", "a list of backbone, logits, classes"),
        (["DISTILL.TAPS", "['logits']"], "taps", "logits", "backbone or classes of the student, a RetinaNet"),
        (["DISTILL.ACAMKD.ALPHA", -1.0], "ACAMKD.alpha", "-1", ">= 0 and finite"),
        (
            ["DISTILL.STUDENT_META_ARCHITECTURE", "RetinaNot"],
            "DISTILL.STUDENT_META_ARCHITECTURE",
            "RetinaNot",
            ".*RetinaNet",
        ),
        (["DISTILL.INHERIT", "yes"], "inherit", "yes", "auto, always, never"),
        (["DISTILL.LOG_PERIOD", 0], "log_period", "0", ">= 1"),
        (["INPUT.FORMAT", "L"], "teacher", "BGR", "the student's L"),
    ],
)
def test_bad_values_are_named(retinanet, retinanet_teacher, opts, argument, value, allowed):
    with refused(argument, value, allowed):
        build_model(distillation_config(retinanet, retinanet_teacher, *opts))
    assert key(argument).startswith(("DISTILL.", "INPUT."))


def test_channel_order_and_statistics_are_the_teachers(retinanet, tmp_path, storage):
    """An image of the mean colour is zero to the student and must be zero to the teacher, whose order is RGB."""
    rgb = detector_config(
        "Base-RetinaNet.yaml", "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[30.0, 20.0, 10.0]",
        "MODEL.PIXEL_STD", "[58.0, 57.0, 56.0]",
    )  # fmt: skip
    retinanet.MODEL.PIXEL_MEAN = [10.0, 20.0, 30.0]
    model = build_model(distillation_config(retinanet, save_config(rgb, tmp_path / "rgb.yaml"))).train()
    seen = []
    model.distillation.teacher.network.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    batch = inputs()
    for x in batch:
        x["image"] = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 96)
    model(batch)
    assert seen[0].abs().max() < 1e-5
    for x in batch:  # one unit more of blue, which is first in BGR
        x["image"] = torch.tensor([11, 20, 30], dtype=torch.uint8).view(3, 1, 1).expand(3, 64, 96)
    model(batch)
    torch.testing.assert_close(seen[1][0, :, 0, 0], torch.tensor([0, 0, 1 / 56.0]), atol=1e-5, rtol=1e-4)


def test_inheritance_is_automatic_for_one_type_and_reported(
    retinanet, retinanet_teacher, rcnn_teacher, tmp_path, caplog
):
    weights = save_weights(retinanet, tmp_path / "t.pth")
    source = torch.load(weights)["model"]
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        student = build_model(distillation_config(retinanet, retinanet_teacher, weights=weights)).state_dict()
    for name, value in student.items():
        same = torch.equal(value, source[name])
        if not name.startswith("backbone.bottom_up."):
            assert same, name
    assert not torch.equal(
        student["backbone.bottom_up.stem.conv1.weight"], source["backbone.bottom_up.stem.conv1.weight"]
    )
    assert "inherited" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        build_model(distillation_config(retinanet, rcnn_teacher))
    assert "nothing is inherited: the student is a RetinaNet, the teacher a " in caplog.text


def test_other_numbers_of_classes_are_skipped_with_the_reason(retinanet, tmp_path, caplog):
    teacher = save_config(
        detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 5), tmp_path / "five.yaml"
    )
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        build_model(distillation_config(retinanet, teacher))
    assert "head.cls_score.bias: (27,) here, (45,) in the teacher" in caplog.text


def test_a_cascade_teacher_is_another_type(rcnn, tmp_path, caplog):
    cascade = detector_config(
        "Base-RCNN-FPN.yaml",
        "MODEL.ROI_HEADS.NAME",
        "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        True,
    )
    teacher = save_config(cascade, tmp_path / "cascade.yaml")
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        build_model(distillation_config(rcnn, teacher))
        build_model(distillation_config(rcnn, teacher, "DISTILL.INHERIT", "always"))
    assert "nothing is inherited" in caplog.text and re.search(r"inherited \d+ tensors", caplog.text)


def test_metrics_go_to_the_storage_and_the_log(retinanet, retinanet_teacher, storage, caplog):
    model = build_model(distillation_config(retinanet, retinanet_teacher, "DISTILL.LOG_PERIOD", 2)).train()
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        model(inputs())
        assert not [key for key in storage.latest() if "distill" in key]
        storage.step()
        model(inputs())
    written = storage.latest()
    assert written["distill/distillation_to_task"][0] > 0
    for level in ("p3", "p4", "p5", "p6", "p7"):
        for kind in ("spatial", "channel"):
            for quantity in ("mean", "std", "min_sum", "dice", "mse"):
                assert f"distill/{level}/{kind}_{quantity}" in written
    assert "p7: spatial_mean" in caplog.text


def test_a_collapse_warns_once_with_level_and_key(retinanet, retinanet_teacher, storage, caplog):
    opts = ["DISTILL.LOG_PERIOD", 1, "DISTILL.ACAMKD.MASK_GRADIENT", "full", "DISTILL.ACAMKD.FEATURES", "raw"]
    model = build_model(distillation_config(retinanet, retinanet_teacher, *opts)).train()
    with torch.no_grad():  # the fused map becomes 1 everywhere
        model.distillation.method.fusion["p5"].value.weight.copy_(torch.eye(16)[:, :, None, None])
        model.distillation.method.align["p5"].weight.zero_()
        model.distillation.method.align["p5"].bias.fill_(1.0)
    with caplog.at_level(logging.WARNING, logger="detectron2.acam_kd"):
        for vanished in (5, 6):
            with torch.no_grad():
                model.distillation.method.masking["channel"]["p5"].units[:vanished].fill_(-20.0)
            model(inputs())
            storage.step()
    assert "5 of 6 channel masks of level p5" in caplog.text and caplog.text.count("masks collapsed") == 1
    assert "DISTILL.ACAMKD.MASK_GRADIENT to 'detached'" in caplog.text


def test_non_finite_losses_name_term_level_and_iteration(retinanet, retinanet_teacher, storage):
    model = build_model(distillation_config(retinanet, retinanet_teacher)).train()
    storage.iter = 41
    with torch.no_grad():
        next(model.distillation.teacher.network.fpn_output4.parameters()).fill_(float("inf"))
    with broken(r"loss_acam_spatial.*p4/spatial_mse", "iteration 41", "learning rate"):
        model(inputs())


def test_amp_trains_teacher_and_student_under_one_autocast(retinanet, retinanet_teacher, storage):
    model = build_model(distillation_config(retinanet, retinanet_teacher)).train()
    dtypes = []
    model.distillation.teacher.network.fpn_output4.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    model.backbone.fpn_output4.register_forward_hook(lambda m, a, out: dtypes.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model(inputs())
    assert dtypes == [torch.bfloat16] * 2
    assert all(losses[k].dtype == torch.float32 for k in losses if "acam" in k)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_students_config_loads_in_stock_detectron2(retinanet, retinanet_teacher, tmp_path):
    cfg = distillation_config(retinanet, retinanet_teacher)
    path = save_config(exported_student_config(cfg), tmp_path / "student.yaml")
    stock = get_cfg()
    stock.merge_from_file(path)
    plain = build_model(stock)
    missing, unexpected = plain.load_state_dict(build_model(cfg).state_dict(), strict=False)
    assert missing == [] and unexpected == [] and stock.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_it_is_registered_by_import():
    from detectron2.modeling import META_ARCH_REGISTRY

    assert META_ARCH_REGISTRY.get("DistillationMetaArch") is DistillationMetaArch
    assert (ROOT / "train_net.py").is_file()
