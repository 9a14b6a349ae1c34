"""The way of a trained student to its use: export, evaluation of the file, prediction; files that cannot be used."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import warnings
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torchvision.models.detection import transform

from acam_kd.cli import main
from acam_kd.core.errors import ConfigError, RunError
from acam_kd.data import shapes
from acam_kd.data.coco import find_split
from acam_kd.export import checked
from acam_kd.export.agreement import Agreement, compare
from acam_kd.export.checked import export_model
from acam_kd.export.exported import ENTRY, Metadata, load_exported
from acam_kd.tv import deployed
from acam_kd.tv.card import Card
from acam_kd.tv.deployed import Deployed
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.models import build_model, plain

from .conftest import refuses

NAMES = {1: "a", 2: "b", 3: "c"}


def certain(name, size=96):
    """A model with detections whose scores differ, as those of an untrained one do not."""
    torch.manual_seed(0)
    model = build_model(name, num_classes=4, size=size)
    generator = torch.Generator().manual_seed(1)
    for key, value in model.named_parameters():
        if value.dim() == 4 and ("cls_logits" in key or "classification_head" in key):
            value.data = torch.randn(value.shape, generator=generator) * (0.25 if "ssd" in name else 0.02)
        if "retinanet" in name and key.endswith("cls_logits.bias"):
            value.data.fill_(-2)
        if value.dim() == 2 and "cls_score" in key:
            value.data = torch.randn(value.shape, generator=generator)
    if "_bn" in name or "ssd" in name:  # statistics of features, else these vanish
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None
        target = {"boxes": torch.tensor([[1.0, 1, 50, 50]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 96, 96, dtype=torch.uint8)
        with torch.no_grad():
            model(pixels(), [target, target])
    return model


def pixels():
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, 12, 12, generator=generator).repeat_interleave(8, 1).repeat_interleave(8, 2) for _ in "ab"]


def metadata(model, name, size=96):
    zeros, ones = (0.0,) * 3, (1.0,) * 3
    return Metadata(name, model.outputs, NAMES, 4, size, zeros, ones, method="PKD", teacher="big")


@pytest.fixture(scope="module")
def images():
    return pixels()


def write_run(folder, name, size, categories=NAMES):
    """The folder of a finished run, without the run."""
    folder.mkdir(exist_ok=True)
    RunFolder(folder).write_student(Card(name, 4, size, categories), plain(certain(name, size)))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "fcos", "fcos_mobilenet_v3_small_fpn64", 96)


@pytest.fixture(scope="module")
def pictures(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"p{number}.png"), (image * 255).byte().permute(1, 2, 0).numpy())
    return folder


def export(run, kind, path, pictures, *more):
    main(["export", str(run), "--format", kind, "--output", str(path), "--images", str(pictures), *more])


# Agreement.


def detections(boxes, scores, labels):
    return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": torch.tensor(labels)}


ONE = detections([[0.0, 0, 9, 9], [20.0, 20, 40, 40]], [0.9, 0.6], [1, 2])


@pytest.mark.parametrize(
    ("other", "agreeing"),
    [
        (detections([[20.0, 20, 40, 40], [0.0, 0, 9, 9]], [0.6, 0.9], [2, 1]), 4),  # another order
        (detections([[0.0, 0, 9, 9.05], [20.0, 20, 40, 40]], [0.9005, 0.6], [1, 2]), 4),
        (detections([[0.0, 0, 9, 9.2], [20.0, 20, 40, 40]], [0.9, 0.6], [1, 2]), 2),
        (detections([[0.0, 0, 9, 9], [20.0, 20, 40, 40]], [0.9, 0.602], [1, 2]), 2),
        (detections([[0.0, 0, 9, 9], [20.0, 20, 40, 40]], [0.9, 0.6], [1, 1]), 2),
    ],
)
def test_detections_match_within_the_tolerances(other, agreeing):
    found = compare(ONE, other)
    assert (found.agreeing, found.compared, bool(found)) == (agreeing, 4, agreeing == 4)


def test_a_missing_detection_and_another_pixel_are_seen():
    assert not compare(ONE, detections([[0.0, 0, 9, 9]], [0.9], [1]))
    low = detections([[0.0, 0, 9, 9], [20.0, 20, 40, 40], [1.0, 1, 2, 2]], [0.9, 0.6, 0.05], [1, 2, 1])
    assert compare(ONE, low)  # below the lowest score that counts
    semantic = torch.zeros(10, 10, dtype=torch.long)
    other = semantic.clone()
    other[0, 0] = 1
    assert not compare({"semantic": semantic}, {"semantic": other})
    assert not compare({"semantic": semantic}, {"semantic": semantic[:5]})


# Every format.


def test_a_check_in_which_nothing_was_found_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.onnx").touch()
    found = [checked.Comparison(96, 128, Agreement(0, 0, False)), checked.Comparison(96, 96, Agreement(0, 0, False))]
    monkeypatch.setattr("acam_kd.tv.run_export.export_run", lambda *_, **__: found)
    arguments = ["export", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "x.onnx")]
    main(arguments)
    assert capsys.readouterr().out.splitlines()[-2].endswith("which therefore says little: give --images with objects")
    found.append(checked.Comparison(96, 96, Agreement(2, 2, False)))
    main(arguments)
    assert "says little" not in capsys.readouterr().out


def test_logs_of_the_exporters_are_kept_back(caplog):
    logger = logging.getLogger("an.exporter")
    logger.setLevel(logging.INFO)
    with checked._silent():
        logger.error("a graph of 900 lines")
    logger.error("another")
    assert caplog.messages == ["another"]


@pytest.mark.filterwarnings("ignore")  # the tracers are deprecated, and warn of constants
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
def test_export_of_a_detector(run, pictures, tmp_path, capsys, kind):
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    export(run, kind, tmp_path / "new" / "model", pictures)
    assert capsys.readouterr().out.count("agree at") == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a user would see torch's own on every use
        exported = load_exported(tmp_path / "new" / "model")
    assert (exported.metadata.name, exported.metadata.categories) == ("fcos_mobilenet_v3_small_fpn64", NAMES)
    assert exported.metadata.size == 96 and exported.metadata.weights == "student.pth"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "torchscript"])
@pytest.mark.parametrize(
    "name",
    ["retinanet_mobilenet_v3_small_fpn32_bn", "fasterrcnn_mobilenet_v3_small_fpn32_bn", "ssdlite320_mobilenet_v3_large",
     "maskrcnn_mobilenet_v3_small_fpn32_bn", "lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large",
     "ssdlite320_mobilenet_v2", "mobile_deeplabv3_mobilenet_v2",
     "fcos_timm:mobilenetv3_small_050_fpn64_bn"],
)  # fmt: skip
def test_export_of_every_kind_of_model(name, kind, images, tmp_path):
    if "timm:" in name:
        pytest.importorskip("timm")
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        if name.startswith("maskrcnn"):
            images = images[:1]  # random weights have near-ties in the other one; see docs/export.md
    size = None if name.startswith(("ssd", "deeplab", "lraspp", "mobile")) else 96
    model = Deployed(certain(name, size))
    found = export_model(model, metadata(model, name, size), images, tmp_path / "file", kind=kind)
    assert len(found) == 4 * len(images) and all(each.agreement for each in found)
    assert sum(each.agreement.compared for each in found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["onnx", "torch-export"])
def test_segmentation_with_a_size(images, tmp_path, kind):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    model = Deployed(certain("lraspp_mobilenet_v3_large", 96))
    export_model(model, metadata(model, "lraspp_mobilenet_v3_large"), images, tmp_path / "file", kind=kind)
    exported = load_exported(tmp_path / "file")
    (found,) = exported([images[0]])
    assert torch.equal(found["semantic"], model(images[0][None])[0][0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_format_that_a_model_cannot_have_is_one_line_and_no_file(images, tmp_path, capsys):
    model = Deployed(certain("fasterrcnn_mobilenet_v3_small_fpn32_bn"))
    with pytest.raises(RunError, match="cannot be exported as torch-export"):
        export_model(model, metadata(model, "fasterrcnn"), images, tmp_path / "file", kind="torch-export")
    assert not [*tmp_path.iterdir()] and capsys.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
def test_a_file_that_disagrees_is_not_written(images, tmp_path, monkeypatch):
    model = Deployed(certain("fcos_mobilenet_v3_small_fpn64"))

    def other(_, metadata, path, example):
        checked._make_script(
            Deployed(build_model("fcos_mobilenet_v3_small_fpn64", num_classes=4, size=96)), metadata, path, example
        )

    monkeypatch.setattr(checked, "_make_program", other)
    with pytest.raises(RunError, match="the torch-export file disagrees with torch: .* at 96 x 128"):
        export_model(model, metadata(model, "fcos"), images, tmp_path / "file", kind="torch-export")
    assert not [*tmp_path.iterdir()]


# Files that cannot be used.


def test_other_files_are_no_exported_models(run, tmp_path):
    (tmp_path / "text").write_text("text")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("a", "b")
    for path in (run / "student.pth", tmp_path / "zip"):
        with refuses("student", "without metadata", "acam-kd export"):
            load_exported(path)
    pytest.importorskip("onnxruntime")
    with refuses("student", "cannot be read"):
        load_exported(tmp_path / "text")


def test_a_file_of_another_version_is_named():
    text = json.dumps(
        {**dataclasses.asdict(metadata(Deployed(certain("fcos_mobilenet_v3_small_fpn64")), "f")), "version": 9}
    )
    with refuses("student", "file of version 9", "version 1", "export the run anew"):
        Metadata.read(text, "file")
    assert ENTRY.endswith(".json")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(run, pictures, tmp_path, monkeypatch, package):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(SystemExit) as error:
        export(run, "onnx", tmp_path / "x.onnx", pictures)
    assert str(error.value).startswith(f"acam-kd: --format: found onnx, for which {package} cannot be imported")
    assert "pip install 'acam-kd[export]'" in str(error.value) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "{none}", "--format", "torchscript", "--output", "f"], "the run: found no finished run in {none}"),
        (["predict", "{none}", "{pictures}", "--output", "f"], "the run: found no finished run in {none}"),
        (["predict", "{run}", "{none}", "--output", "f"], "IMAGES: found no file {none}"),
        (
            ["predict", "{run}", "{pictures}", "--output", "f", "--checkpoint", "best"],
            "--checkpoint: found best, but no file",
        ),
        (
            ["export", "{run}", "--format", "torchscript", "--output", "f"],
            "--images: found none: the validation images of",
        ),
    ],
)
def test_bad_input_is_one_line(run, pictures, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    words = {"none": str(tmp_path / "none"), "run": str(run), "pictures": str(pictures)}
    with pytest.raises(SystemExit) as error:
        main([word.format(**words) for word in arguments])
    assert str(error.value).startswith("acam-kd: " + message.format(**words)) and "\n" not in str(error.value)
    assert not [*tmp_path.iterdir()]


# Predictions.


def test_predictions_are_those_of_the_model(run, pictures, tmp_path):
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(SystemExit, match="text.jpg, which cannot be read"):
        main(["predict", str(run), str(pictures), str(tmp_path / "text.jpg"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    main(["predict", str(run), str(pictures), "--output", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "images.json",
        "p0.jpg",
        "p1.jpg",
        "predictions.json",
    ]
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    content = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == ["p0.png", "p1.png"]
    model = certain("fcos_mobilenet_v3_small_fpn64").eval()
    image = cv2.imread(str(pictures / "p0.png"))[:, :, ::-1]
    with torch.no_grad():
        (found,) = model([torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255])
    own = [result for result in results if result["image_id"] == 1]
    assert [r["score"] for r in own] == pytest.approx(found["scores"].tolist()) and own
    x0, y0, x1, y1 = found["boxes"][0].tolist()
    assert own[0]["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-3)


def test_a_video_is_predicted_frame_by_frame(run, tmp_path):
    writer = cv2.VideoWriter(str(tmp_path / "v.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 96))
    for value in (10, 200):
        writer.write(np.full((96, 96, 3), value, np.uint8))
    writer.release()
    main(["predict", str(run), str(tmp_path / "v.avi"), "--output", str(tmp_path / "out")])
    capture = cv2.VideoCapture(str(tmp_path / "out" / "v.mp4"))
    assert capture.isOpened() and int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == 2
    capture.release()
    assert [e["file_name"] for e in json.loads((tmp_path / "out" / "images.json").read_text())["images"]] == [
        "v.avi#0",
        "v.avi#1",
    ]
    (tmp_path / "w.mp4").write_text("text")
    with pytest.raises(SystemExit, match="a video that OpenCV reads"):
        main(["predict", str(run), str(tmp_path / "w.mp4"), "--output", str(tmp_path / "other")])


def test_label_maps_are_pngs(pictures, tmp_path):
    run = write_run(tmp_path / "run", "lraspp_mobilenet_v3_large", 64, {0: "x", **NAMES})
    main(["predict", str(run), str(pictures), "--output", str(tmp_path / "out")])
    labels = cv2.imread(str(tmp_path / "out" / "labels" / "p0.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (96, 96) and labels.max() <= 3
    assert not (tmp_path / "out" / "predictions.json").exists()


# Evaluation of a file.


@pytest.mark.filterwarnings("ignore")
def test_an_exported_file_has_the_metric_of_its_run(tmp_path, pictures, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 2, "val": 3})
        data = shapes.make_shapes(tmp_path / "data", size=64)
    names = {c["id"]: c["name"] for c in json.loads(Path(find_split(data, "val").json_file).read_text())["categories"]}
    run = tmp_path / "run"
    run.mkdir()
    torch.manual_seed(0)
    model = build_model("fcos_mobilenet_v3_small_fpn64", num_classes=7, size=64)
    RunFolder(run).write_student(Card("fcos_mobilenet_v3_small_fpn64", 7, 64, names), model)
    export(run, "torchscript", tmp_path / "x.pt", pictures)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("acam_kd.tv.measure.latency", lambda *_: 1.0)
        main(["eval", "--data", str(data), "--student", str(tmp_path / "x.pt"), "--beside", str(run), "--workers", "0"])
    metrics, _, *rows, machine = capsys.readouterr().out.splitlines()
    assert [row.split()[1] for row in rows] == [f"{json.loads(metrics)['AP']:.2f}"] * 2
    assert machine.startswith("median of 50 single images, warm, on ")
    other = write_run(tmp_path / "other", "fcos_mobilenet_v3_small_fpn64", 64)
    export(other, "torchscript", tmp_path / "y.pt", pictures)
    with pytest.raises(SystemExit, match="--student: found .*y.pt with the categories"):
        main(["eval", "--data", str(data), "--student", str(tmp_path / "y.pt")])


def test_an_unknown_format_and_a_size_of_a_file_are_refused(images, tmp_path):
    model = Deployed(certain("fcos_mobilenet_v3_small_fpn64"))
    with pytest.raises(ConfigError, match="format: found tflite, expected one of onnx, torchscript, torch-export"):
        export_model(model, metadata(model, "fcos"), images, tmp_path / "x", kind="tflite")


@pytest.mark.filterwarnings("ignore")
def test_a_trace_resizes_to_the_sizes_of_torch():
    """In float32, as in a trace of torchvision's own, 428 x 640 would become 159 x 239 instead of 160 x 239."""

    class Resizing(torch.nn.Module):
        def forward(self, image):
            return transform._resize_image_and_masks(image, 160, 266)[0]

    with deployed._sizes_in_double():
        trace = torch.jit.trace(Resizing(), (torch.zeros(3, 160, 213),), check_trace=False)
    for height, width in ((428, 640), *itertools.product(range(150, 500, 7), (131, 480))):
        image = torch.zeros(3, height, width)
        assert trace(image).shape == Resizing()(image).shape, (height, width)
