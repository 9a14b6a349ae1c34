"""Golden numbers of the torchvision engine; see tests/golden.py."""

from __future__ import annotations

import pytest
import torch

from acam_kd import cli
from acam_kd.core import DISTILLER_REGISTRY, Plan
from acam_kd.tv.distillation import build_distillation
from acam_kd.tv.models import build_model, plain

from ..golden import as_recorded, calm, check, fingerprint, two_steps

METHODS = sorted(name for name, method in DISTILLER_REGISTRY if not method.families)
CASES = [("fcos", method) for method in METHODS]
CASES += [("fasterrcnn", method) for method in ("ACAMKD", "FGD", "KD", "DKD", "NKD", "PKD+KD")]
CASES += [("lraspp", method) for method in ("ACAMKD", "Mimic", "CWD", "AT", "MasKD", "KD", "NKD", "AT+PKD")]
STUDENT = {
    "fcos": "fcos_mobilenet_v3_small_fpn64",
    "fasterrcnn": "fasterrcnn_mobilenet_v3_small_fpn32",
    "lraspp": "lraspp_mobilenet_v3_large",
}
TEACHER = {**STUDENT, "fcos": "fcos_resnet18_fpn32", "fasterrcnn": "fasterrcnn_resnet18_fpn64"}
ENGINE = "torchvision"


@pytest.mark.parametrize(("kind", "method"), CASES, ids=lambda x: x)
def test_two_steps(kind, method):
    torch.manual_seed(11)
    student, teacher = (
        build_model(names[kind], num_classes=4, size=None if kind == "lraspp" else 64)
        for names in (STUDENT, STUDENT if "PKD" in method else TEACHER)  # PKD aligns no channels
    )
    draw = torch.Generator().manual_seed(1)
    images = [torch.rand(3, 64, 96, generator=draw), torch.rand(3, 96, 64, generator=draw)]
    targets = [{"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}] * 2
    if kind == "lraspp":
        targets = [{"semantic": torch.randint(0, 4, image.shape[1:], generator=draw)} for image in images]
    offered = ("logits", "backbone") if kind == "lraspp" else ("backbone", "classes")
    plan = Plan(methods=as_recorded(method, offered), inherit="auto")
    build_distillation(student, calm(teacher, images, targets), plan)
    found = two_steps(student.train(), images, targets)
    state = plain(student).state_dict()
    check(f"{ENGINE}, {kind}, {method}, two steps", {**found, "weights": fingerprint(state)})


@pytest.mark.parametrize("method", ["ACAMKD", "PKD+KD"])
def test_acam_kd_train(method, data, finished, tmp_path):
    cli.main([
        "train", "--data", str(data), "--student", STUDENT["fcos"], "--teacher", str(finished), "--method", method,
        "--size", "64", "--iterations", "4", "--batch-size", "2", "--lr", "0.01", "--eval-period", "4", "--workers", "0",
        "--accelerator", "cpu", "--output", str(tmp_path / "run"),
        *(["--set", "PKD.levels=all"] if "PKD" in method else []),
    ])  # fmt: skip
    state = torch.load(tmp_path / "run" / "student.pth")
    check(f"{ENGINE}, acam-kd train, {method}", {"losses": [], "weights": fingerprint(state)}, rel=0.1)
