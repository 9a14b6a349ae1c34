"""Mixup and CutMix: labels follow the images, and methods that cannot take them say so."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from acam_kd.tv.mixing import Mixing, build_mixing
from acam_kd.tv.models import build_model
from acam_kd.tv.training import train
from tests.tv.conftest import refuses
from tests.tv.test_classification import folders, teacher, tiny  # noqa: F401


@pytest.fixture
def model():
    return build_model("resnet8", num_classes=3, size=16)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_as_the_images_are(model, kind):
    images = [torch.full((3, 16, 16), value) for value in (0.0, 1.0)]
    torch.manual_seed(0)
    for _ in range(5):
        mixed, targets = Mixing(model, 3, **{kind: 1.0})(images, [{"label": 0, "image_id": 7}, {"label": 2}])
        for image, target in zip(mixed, targets):
            assert target["scores"].tolist() == pytest.approx(
                [1 - image.mean().item(), 0, image.mean().item()], abs=1e-5
            )
            assert target["label"] == target["scores"].argmax()
        assert targets[0]["image_id"] == 7


def test_the_loss_is_the_cross_entropy_with_the_mixed_labels(model):
    images, targets = Mixing(model, 3, mixup=1.0)(
        [torch.rand(3, 16, 16) for _ in range(4)], [{"label": k % 3} for k in range(4)]
    )
    loss = model.train()(images, targets)["loss_classification"]
    shares = torch.stack([target["scores"] for target in targets])
    logits = model.network(model.batch(images))
    assert loss.item() == pytest.approx(-(shares * F.log_softmax(logits, 1)).sum(1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["KD", "NKD"])
def test_a_run_with_both(folders, teacher, tmp_path, method):  # noqa: F811
    result = train(
        tiny(folders, teacher=str(teacher), method=method, mixup=0.2, cutmix=1.0, iterations=3), tmp_path / "run"
    )
    assert result["metrics"]["top1"] >= 0


@pytest.mark.parametrize("method", ["USKD", "PSKD", "MCMI", "DKD", "KD+DKD"])
def test_methods_that_need_one_class_say_so(folders, model, method):  # noqa: F811
    with refuses("cutmix", method.rpartition("+")[2]):
        build_mixing(tiny(folders, method=method, cutmix=1.0), model, 3)


def test_classifiers_alone(folders):  # noqa: F811
    with refuses("mixup", "for"):
        build_mixing(tiny(folders, mixup=0.2), build_model("fcos_mobilenet_v3_small_fpn64", num_classes=2), 3)
    assert build_mixing(tiny(folders), build_model("resnet8", num_classes=3), 3) is None
