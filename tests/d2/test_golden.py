"""Golden numbers of the Detectron2 engine; see tests/golden.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from acam_kd.core import DISTILLER_REGISTRY

from ..golden import as_recorded, calm, check, fingerprint, two_steps
from .conftest import ROOT, detector_config, distillation_config, inputs, save_config
from .test_segmentation import labelled, segmentor

METHODS = sorted(name for name, method in DISTILLER_REGISTRY if not method.families)
CASES = [("retinanet", method) for method in METHODS]
CASES += [("rcnn", method) for method in ("ACAMKD", "FGD", "KD", "DKD", "NKD", "PKD+KD")]
CASES += [("segmentor", method) for method in ("ACAMKD", "Mimic", "CWD", "AT", "MasKD", "KD", "NKD", "AT+PKD")]
ENGINE = "Detectron2"


@pytest.fixture(autouse=True)
def no_fusion():
    """Detectron2's focal loss is a script whose first calls are rounded otherwise."""
    torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])


@pytest.mark.parametrize(("kind", "method"), CASES, ids=lambda x: x)
def test_two_steps(kind, method, storage, tmp_path):
    torch.manual_seed(11)
    wide = [] if "PKD" in method else ["MODEL.FPN.OUT_CHANNELS", 24]  # PKD aligns no channels
    if kind == "segmentor":
        student, teacher, batch = segmentor(), segmentor("FPN", *wide), labelled()
    else:
        base = {"retinanet": "Base-RetinaNet.yaml", "rcnn": "Base-RCNN-FPN.yaml"}[kind]
        student, batch = detector_config(base), inputs()
        teacher = detector_config(base, *wide, "MODEL.RESNETS.DEPTH", 101)
    torch.save({"model": calm(build_model(teacher), batch).state_dict()}, tmp_path / "t.pth")
    files = save_config(teacher, tmp_path / "t.yaml"), "DISTILL.TEACHER.WEIGHTS", str(tmp_path / "t.pth")
    cfg = distillation_config(student, *files, "DISTILL.METHOD", method)
    offered = ("logits", "backbone") if kind == "segmentor" else ("backbone", "classes")
    for name, settings in as_recorded(method, offered).items():
        cfg.DISTILL[name.upper()].update({key.upper(): value for key, value in settings.items()})
    model = build_model(cfg).train()
    found = two_steps(model, batch)
    check(f"{ENGINE}, {kind}, {method}, two steps", {**found, "weights": fingerprint(model.state_dict())})


@pytest.mark.parametrize("method", ["ACAMKD", "PKD+KD"])
def test_train_net(method, arguments, tmp_path):  # noqa: F811
    teacher = build_model(detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6))
    with EventStorage():
        torch.save({"model": calm(teacher, inputs()).state_dict()}, tmp_path / "t.pth")
    weights = "DISTILL.TEACHER.WEIGHTS", tmp_path / "t.pth"
    own = ["DISTILL.PKD.LEVELS", "['all']"] if "PKD" in method else ["DISTILL.ACAMKD.FEATURES", "raw"]
    command = arguments("DISTILL.METHOD", method, *weights, *own, "OUTPUT_DIR", tmp_path / "run")
    # in a process of its own: in this one Detectron2's scripts may have been rounded otherwise before
    subprocess.run([sys.executable, ROOT / "train_net.py", *command], check=True, cwd=ROOT, capture_output=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    losses = {name: value for line in lines for name, value in line.items() if "loss" in name}
    state = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)["model"]
    check(f"{ENGINE}, train_net.py, {method}", {"losses": [losses], "weights": fingerprint(state)}, rel=0.1)
