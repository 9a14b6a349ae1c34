"""The first stage on real Detectron2 teachers, and the second with what it wrote."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from acam_kd.d2 import register_coco_datasets, token_learning
from acam_kd.d2.adapter import logits_module, pyramid
from acam_kd.data import shapes
from acam_kd.methods.parts.token_files import build_tokens, save_tokens
from acam_kd.methods.parts.token_learning import TokenLearning

from .conftest import ROOT, detector_config, distillation_config, inputs, refused, save_config, save_weights
from .test_segmentation import HEADS, labelled, segmentor

TEACHERS = {
    "retinanet": ("Base-RetinaNet.yaml", []),
    "mask rcnn": ("Base-RCNN-FPN.yaml", ["MODEL.MASK_ON", True]),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A few images of three classes, as a dataset of Detectron2's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 4, "val": 2})
        folder = shapes.make_shapes(tmp_path_factory.mktemp("drawn"), size=64)
    entry = ["drawn_for_tokens", str(folder / "train.json"), str(folder / "train")]
    register_coco_datasets([entry])
    yield entry
    DatasetCatalog.remove(entry[0])
    MetadataCatalog.remove(entry[0])


def pair(teacher, drawn, tmp_path, *opts):
    """A RetinaNet student and a teacher of a kind, with the drawn images."""
    base, own = TEACHERS[teacher]
    number = str(len(shapes.CLASSES))
    classes = ["MODEL.RETINANET.NUM_CLASSES", number, "MODEL.ROI_HEADS.NUM_CLASSES", number]
    # An untrained network makes large numbers of whole grey levels, at which all masks are 0 or 1.
    config = detector_config(base, *own, *classes, "INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", "[1e4, 1e4, 1e4]")
    path = save_config(config, tmp_path / "t.yaml")
    weights = save_weights(config, tmp_path / "t.pth")
    data = ["DATASETS.TRAIN", (drawn[0],), "SOLVER.IMS_PER_BATCH", 2, "SEED", 3]
    student = detector_config("Base-RetinaNet.yaml", *classes)
    return distillation_config(student, path, *data, "DISTILL.INHERIT", "never", *opts, weights=weights)


@pytest.fixture
def watched(monkeypatch):
    """What is learnt on, as it was before."""
    seen = {}

    def keep(learning, batches, **named):
        seen["start"] = copy.deepcopy(learning.state_dict())
        seen["teacher"] = learning.teacher
        seen["before"] = copy.deepcopy(learning.teacher.state_dict())
        seen["tokens"] = learning.tokens
        return original(learning, batches, **named)

    original = token_learning.learn_tokens
    monkeypatch.setattr(token_learning, "learn_tokens", keep)
    return seen


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", ["MasKD", "FreeKD"])
def test_tokens_are_learnt_and_used(teacher, method, drawn, tmp_path, watched, storage):
    cfg = pair(teacher, drawn, tmp_path, f"DISTILL.{method.upper()}.NUM_TOKENS", 3)
    path = str(tmp_path / "new" / "tokens.pth")
    (logged,) = token_learning.learn(cfg, method, path, iterations=3)
    assert {"loss_tokens_diversity"} < set(logged) and all(value >= 0 for value in logged.values())
    assert all(torch.equal(v, watched["before"][k]) for k, v in watched["teacher"].state_dict().items())
    learnt = watched["tokens"]
    for name, value in learnt.state_dict().items():
        assert not torch.equal(value, watched["start"][f"tokens.{name}"]), name
    cfg.merge_from_list(["DISTILL.METHOD", method, f"DISTILL.{method.upper()}.TOKENS", path])
    model = build_model(cfg).train()
    assert model.distillation.method.warnings() == {} and len(model.distillation.levels) >= 3
    for own, other in model.distillation.levels.items():
        assert torch.equal(model.distillation.method.tokens[own].tokens, learnt[other].tokens)
    losses = model(inputs())
    sum(losses.values()).backward()
    assert any(name.startswith(f"loss_{method.lower()}") for name in losses)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_teacher_gets_its_own_order_of_channels(drawn, tmp_path):
    cfg = pair("mask rcnn", drawn, tmp_path)
    _, teacher_cfg = token_learning.build_teacher(cfg)
    data = token_learning._data_config(cfg, teacher_cfg)
    assert data.INPUT.FORMAT == "RGB" != cfg.INPUT.FORMAT and data.MODEL.MASK_ON and not cfg.MODEL.MASK_ON
    assert data.INPUT.MIN_SIZE_TRAIN == cfg.INPUT.MIN_SIZE_TRAIN and data.SOLVER.IMS_PER_BATCH == 2


def test_faults_are_named(drawn, tmp_path):
    cfg = pair("retinanet", drawn, tmp_path)
    output = str(tmp_path / "tokens.pth")
    cfg.DATASETS.TRAIN = ("nowhere",)
    with refused("DATASETS.TRAIN", "nowhere", "a registered dataset"):
        token_learning.learn(cfg, "MasKD", output, iterations=1)
    cfg.DATASETS.TRAIN = (drawn[0],)
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASSES", "9"]
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    with refused("MODEL.RETINANET.NUM_CLASSES", "9", f"{len(shapes.CLASSES)}, the classes of dataset {drawn[0]}"):
        token_learning.learn(cfg, "MasKD", output, iterations=1)
    assert not (tmp_path / "tokens.pth").exists()


def test_untrained_tokens_and_other_teachers_are_noticed(drawn, tmp_path):
    cfg = pair("retinanet", drawn, tmp_path, "DISTILL.METHOD", "MasKD")
    model = build_model(cfg)
    assert "untrained" in model.distillation.method.warnings()["tokens"]
    tokens = {f"p{n}": model.distillation.method.tokens[f"p{n}"] for n in (3, 4, 5)}
    path = str(tmp_path / "some.pth")
    save_tokens(path, "MasKD", tokens, {k: pyramid(model, ["backbone"])[k] for k in tokens})
    cfg.DISTILL.MASKD.TOKENS = path
    both = "none, or several, for p6 .stride 64, 16 channels.: its tokens are for p3 "
    with refused("MasKD.tokens", both, "exactly one", "set {tokens}"):
        build_model(cfg)


@pytest.mark.parametrize("head", HEADS)
def test_tokens_of_a_segmentor_are_for_its_logits(head, tmp_path, storage):
    teacher = build_model(segmentor(head))
    levels = pyramid(teacher, ["logits"])
    tokens = build_tokens("MasKD", levels)
    learning = TokenLearning(teacher, tokens, logits=logits_module(teacher))
    losses = learning(labelled(1))
    assert set(losses) == {"loss_sem_seg", "loss_tokens_diversity"}
    losses["loss_sem_seg"].backward()
    assert tokens["logits"].tokens.shape == (8, 5) and tokens["logits"].tokens.grad.abs().sum() > 0
    path = str(tmp_path / "tokens.pth")
    save_tokens(path, "MasKD", tokens, levels)
    cfg = distillation_config(segmentor(), save_config(segmentor(head), tmp_path / "t.yaml"))
    cfg.merge_from_list(["DISTILL.METHOD", "MasKD", "DISTILL.MASKD.TOKENS", path])
    model = build_model(cfg).train()
    assert model(labelled())["loss_maskd_feature"].requires_grad and model.distillation.levels == {"logits": "logits"}


def test_a_method_without_levels_to_read_is_named(tmp_path):
    cfg = distillation_config(segmentor(), save_config(segmentor(), tmp_path / "t.yaml"), "DISTILL.TAPS", "['logits']")
    with refused("method", "FreeKD", "one for logits", "FreeKD distils backbone; see {taps}"):
        token_learning._levels(cfg, "FreeKD", build_model(segmentor()))
    cfg.DISTILL.TAPS = []
    assert set(token_learning._levels(cfg, "FreeKD", build_model(segmentor()))) == {"p2", "p3", "p4", "p5", "p6"}


@pytest.mark.slow
def test_the_tool(drawn, tmp_path):
    cfg = pair("retinanet", drawn, tmp_path)
    config = save_config(cfg, tmp_path / "distil.yaml")
    command = [sys.executable, str(ROOT / "tools" / "learn_tokens.py"), "--config-file", config]
    output = tmp_path / "tokens.pth"
    good = [*command, "--output", str(output), "--iterations", "2", "--dataset", *drawn, "--method", "FreeKD"]
    done = subprocess.run([*good, "SOLVER.IMS_PER_BATCH", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == f"{output}: for DISTILL.FREEKD.TOKENS"
    assert "step 2/2  loss" in done.stderr
    assert torch.load(output, weights_only=True)["method"] == "FreeKD"
    bad = [*command, "--output", str(tmp_path / "x.pth"), "DATASETS.TRAIN", "('gone',)"]
    refused = subprocess.run(bad, capture_output=True, text=True)
    assert refused.returncode == 1 and refused.stderr.strip().splitlines()[-1].startswith(
        "learn_tokens.py: DATASETS.TRAIN: found gone, expected a registered dataset"
    )
