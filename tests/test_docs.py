"""The examples in docstrings and in docs/own_loops.md are run."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re

import lightning
import pytest
import torch

import acam_kd
from acam_kd.data.shapes import make_shapes

from .conftest import MISSING

PAGE = "docs/own_loops.md"


def modules():
    names = [m.name for m in pkgutil.walk_packages(acam_kd.__path__, "acam_kd.")]
    return ["acam_kd", *(n for n in names if not (MISSING and n.startswith("acam_kd.d2")))]


@pytest.mark.parametrize("name", modules())
def test_docstrings(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def examples(root):
    text = (root / PAGE).read_text()
    return re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run(root, title):
    code = dict(examples(root))[title]
    assert len([line for line in code.splitlines() if line.strip()]) < 20
    scope: dict = {}
    exec(compile(code, title, "exec"), scope)
    return scope


def test_every_example_is_tested(root):
    titles = [title for title, _ in examples(root)]
    assert titles == ["A classifier", "DeepLabV3 with a criterion of one's own", "A LightningModule",
                      "Detectron2: a config file", "Detectron2: a LazyConfig"]  # fmt: skip


def test_a_classifier(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(root, "A classifier")
    import torchvision

    plain = torchvision.models.resnet18(num_classes=5)
    plain.load_state_dict(torch.load("student.pth"), strict=True)


def test_deeplab(root):
    student = run(root, "DeepLabV3 with a criterion of one's own")["student"]
    assert student.classifier[4].weight.grad.abs().sum() > 0 and "loss_cwd_kl" in student.distillation.losses


@pytest.mark.slow
def test_lightning_saves_and_resumes(root, tmp_path):
    task = run(root, "A LightningModule")["Task"]
    torch.manual_seed(0)
    batches = [
        ([torch.rand(3, 64, 96)] * 2, [{"boxes": torch.tensor([[5.0, 5, 50, 50]]), "labels": torch.tensor([1])}] * 2)
    ]

    def fit(steps, checkpoint=None):
        torch.manual_seed(1)
        module = task()
        trainer = lightning.Trainer(
            max_epochs=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return module

    fit(1)
    saved = torch.load(tmp_path / "1.ckpt", weights_only=False)
    assert not [k for k in saved["state_dict"] if "distillation" in k] and saved["distiller"]
    resumed = fit(2, tmp_path / "1.ckpt")
    assert any(not torch.equal(v, saved["distiller"][k]) for k, v in resumed.student.distillation.state_dict().items())
    fresh = task()
    with pytest.raises(acam_kd.RunError):
        fresh.student.distillation.load_state_dict({"wrong": torch.zeros(1)})


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_detectron2_by_a_config_file(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    trainer = run(root, "Detectron2: a config file")["trainer"]
    assert type(trainer.model).__name__ == "RetinaNet" and "distiller" in trainer.checkpointer.checkpointables


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_detectron2_by_a_lazyconfig(root):
    model = run(root, "Detectron2: a LazyConfig")["model"]
    assert model.method == "ACAMKD" and model._target_ in ("acam_kd.distill", acam_kd.distill)


UNLABELLED = "docs/unlabelled.md"


def blocks(root):
    return re.findall(r"^```python\n(.*?)^```", (root / UNLABELLED).read_text(), re.DOTALL | re.MULTILINE)


def test_the_program_that_leaves_few_labels(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("acam_kd.data.shapes.SPLITS", {"train": 6, "val": 2})
    folder = make_shapes("datasets", size=64)
    code = blocks(root)[0].replace("shapes_160_0", folder.name).replace(", 40\n", ", 2\n", 1)
    exec(compile(code, UNLABELLED, "exec"), {})
    content = json.loads((tmp_path / "datasets/few/train.json").read_text())
    others = {path.name for path in (tmp_path / "datasets/few/others").iterdir() if path.is_file()}
    named = {image["file_name"] for image in content["images"]}
    assert len(named) == 2 and len(others) == 4 and not named & others and content["annotations"]


def test_a_loop_with_images_without_labels(root):
    scope: dict = {}
    exec(compile(blocks(root)[2], UNLABELLED, "exec"), scope)
    assert list(scope["unlabelled"]) == ["loss_unlabelled_kd_kl"]
    assert all(p.grad is not None for p in scope["student"].parameters())


@pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")
def test_detectron2_with_images_without_labels(root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    scope = run(root, "Detectron2: a config file")
    scope["cfg"].DATASETS.UNLABELLED = ["acam_shapes_train"]
    exec(compile(blocks(root)[1], UNLABELLED, "exec"), scope)
    assert any(type(hook).__name__ == "UnlabelledFeed" for hook in scope["trainer"].model._forward_hooks.values())
