"""A classifier's way to its use: prediction of images, export, evaluation of the file."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd.cli import main
from acam_kd.export.agreement import compare
from acam_kd.export.exported import load_exported
from acam_kd.tv.deployed import Deployed
from acam_kd.tv.models import build_model
from acam_kd.tv.predict import load_student
from tests.tv.test_classification import CLASSES, folders, teacher  # noqa: F401


@pytest.mark.parametrize(("name", "size"), [("resnet8", 16), ("mobilenet_v3_small", 128)])
@pytest.mark.parametrize("shape", [(40, 61), (61, 40), (16, 16), (300, 200)])
def test_the_exported_form_cuts_the_same_square(name, size, shape):
    model = build_model(name, num_classes=3, size=size).eval()
    image = torch.rand(3, *shape)
    with torch.no_grad():
        torch.testing.assert_close(Deployed(model)(image[None])[0][0], model([image])[0]["scores"])


def test_other_probabilities_are_seen():
    one = {"scores": torch.tensor([0.7, 0.2, 0.1])}
    assert compare(one, {"scores": torch.tensor([0.7005, 0.2, 0.0995])})
    found = compare(one, {"scores": torch.tensor([0.71, 0.19, 0.1])})
    assert not found and str(found) == "1 of 3 classes agree"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_the_file_has_the_metrics_of_its_run(folders, teacher, tmp_path, capsys, kind):  # noqa: F811
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    path = tmp_path / "student.bin"
    main(["export", str(teacher), "--format", kind, "--output", str(path)])
    assert "3 of 3 classes agree" in capsys.readouterr().out
    exported, (model, _) = load_exported(path), load_student(str(teacher))
    assert exported.metadata.outputs == ("probabilities",) and exported.metadata.size == 16
    image = torch.rand(3, 33, 57)
    with torch.no_grad():
        torch.testing.assert_close(exported([image])[0]["scores"], model([image])[0]["scores"], rtol=1e-4, atol=1e-5)
    main(["eval", "--data", str(folders), "--student", str(path), "--beside", str(teacher), "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    values = [line.split()[1] for line in lines if str(tmp_path) in line or str(teacher) in line]
    assert len(values) == 2 and values[0] == values[1]


def test_predictions_of_images_are_classes(folders, teacher, tmp_path, capsys):  # noqa: F811
    main(["predict", str(teacher), str(folders / "val" / "bee"), "--output", str(tmp_path)])
    assert "4 images, the most probable classes of each" in capsys.readouterr().out
    results = json.loads((tmp_path / "predictions.json").read_text())
    about = json.loads((tmp_path / "images.json").read_text())
    assert [entry["name"] for entry in about["categories"]] == [*CLASSES]
    assert len(results) == 4 * 3 and set(results[0]) == {"image_id", "category_id", "score"}
    model, _ = load_student(str(teacher))
    pixels = np.array(Image.open(folders / "val" / "bee" / "0.png"))
    with torch.no_grad():
        scores = model([torch.from_numpy(pixels).permute(2, 0, 1) / 255])[0]["scores"]
    assert [entry["category_id"] for entry in results[:3]] == scores.argsort(descending=True).tolist()
    assert [entry["score"] for entry in results[:3]] == pytest.approx(sorted(scores.tolist(), reverse=True))
    drawn = cv2.imread(str(tmp_path / "0.jpg"))
    assert min(drawn.shape[:2]) >= 160
