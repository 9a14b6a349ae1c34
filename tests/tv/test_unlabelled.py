"""Runs with images without labels: both loaders, resuming, checks, and the teacher's labels for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd.data.check import check_coco
from acam_kd.data.splits import find_any_split
from acam_kd.data.unlabelled import find_images
from acam_kd.tv.batches import Stream
from acam_kd.tv.build import build_models
from acam_kd.tv.labels import load_data
from acam_kd.tv.models import build_model
from acam_kd.tv.pseudo_labels import _label_map, check_models
from acam_kd.tv.segmentation import Segmentor
from acam_kd.tv.training import train
from acam_kd.tv.unlabelled import SEED, UnlabelledBatches, UnlabelledImages, check_unlabelled

from .conftest import refuses
from .test_training import interrupted, lines, same, student_of

NAMES = "background,disc,barred disc,triangle,barred triangle,square,barred square"


@pytest.fixture
def pictures(tmp_path):
    """Five images of two sizes, in two folders; one lies deeper."""
    random = np.random.default_rng(0)
    for name, size in {"a/0.png": 64, "a/1.jpg": 48, "a/deep/2.png": 64, "b/0.png": 64, "b/.hidden.png": 8}.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (size, 64, 3), dtype=np.uint8)).save(path)
    return [str(tmp_path / "pictures/a"), str(tmp_path / "pictures/b")]


@pytest.fixture
def distilling(settings, finished, pictures):
    return replace(
        settings, teacher=str(finished), method="PKD", student="retinanet_resnet18_fpn64", unlabelled=tuple(pictures),
        unlabelled_batch=2,
    )  # fmt: skip


@pytest.fixture
def segmenting(settings, data, tmp_path, pictures):
    """A segmentation run and its teacher."""
    root = tmp_path / "labelled"
    for split in ("train", "val"):
        shutil.copytree(data / split, root / split / "images")
        shutil.copytree(data / f"{split}_labels", root / split / "labels")
    splits = {f"{split}_split": find_any_split(root, split, NAMES) for split in ("train", "val")}
    settings = replace(settings, student="lraspp_mobilenet_v3_large", iterations=2, eval_period=2, **splits)
    train(settings, tmp_path / "teacher")
    return replace(
        settings, teacher=str(tmp_path / "teacher"), method="PKD", unlabelled=tuple(pictures), unlabelled_batch=2
    )


def test_find_images_goes_deep_and_leaves_hidden_files(pictures):
    found = find_images(pictures)
    assert [len(paths) for paths in found.values()] == [3, 1]
    assert all(os.path.isfile(path) for paths in found.values() for path in paths)


def test_a_run_trains_on_both_and_says_so(distilling, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr("acam_kd.tv.reports.LOG_PERIOD", 1)
    settings = replace(distilling, iterations=3, unlabelled_start=1)
    train(settings, tmp_path / "run")
    losses = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert ["loss_unlabelled_pkd_pearson" in line for line in losses] == [False, True, True]
    said = [record.getMessage() for record in caplog.records]
    assert "4 images without labels, 2 a step from step 1" in said
    assert any("images/s + " in text and " unlabelled  " in text for text in said)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["settings"]["unlabelled"] == [*settings.unlabelled]
    assert json.loads((tmp_path / "run/data.json").read_text())["unlabelled"]["files"] == 4
    train(replace(settings, unlabelled_weight=0.0), tmp_path / "zero")
    (last,) = [line for line in lines(tmp_path / "zero") if line.get("loss") and line["step"] == 3]
    assert last["loss_unlabelled_pkd_pearson"] == 0


@pytest.mark.parametrize("pseudo", [False, True])
def test_an_interrupted_run_is_resumed_bit_for_bit(distilling, tmp_path, pseudo):
    settings = replace(distilling, unlabelled_start=1, pseudo_labels=0.051 if pseudo else 0.0)
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "cut")
    if pseudo:  # made once
        made = tmp_path / "cut/pseudo_labels/boxes.json"
        before = made.stat().st_mtime_ns
    torch.rand(3)
    train(settings, tmp_path / "cut", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "cut"))
    assert not pseudo or made.stat().st_mtime_ns == before


def test_a_run_whose_pictures_changed_is_refused(distilling, pictures, tmp_path):
    interrupted(distilling, tmp_path / "run")
    with refuses("unlabelled_weight", "0.5", "1.0, as in the run in"):
        train(replace(distilling, unlabelled_weight=0.5), tmp_path / "run", resume=True)
    os.remove(f"{pictures[0]}/0.png")
    with refuses("unlabelled", "3 image files (they were 4)"):
        train(distilling, tmp_path / "run", resume=True)


def test_the_second_loader_has_its_own_order_and_no_target_of_use(distilling, pictures):
    images = UnlabelledImages(pictures, image_range="auto")
    batches = [*UnlabelledBatches(images, replace(distilling, unlabelled_start=2)).along(1, rank=0, world=1)]
    assert batches[0] is None and len(batches) == 3
    stream = Stream(4, batch_size=2, batches=4, seed=distilling.seed + SEED)
    stream.start = 2
    for (found, targets), items in zip(batches[1:], stream):
        assert all(torch.equal(image, images[item][0]) for image, item in zip(found, items))
        assert not any(target["semantic"].any() for target in targets)
    halves = [[*UnlabelledBatches(images, distilling).along(0, rank=rank, world=2)] for rank in (0, 1)]
    whole = [*UnlabelledBatches(images, distilling).along(0, rank=0, world=1)]
    for (both, _), (first, _), (second, _) in zip(whole, *halves):
        assert torch.equal(both[0], first[0]) and torch.equal(both[1], second[0])


@pytest.mark.parametrize("copy", ["copy", "lossless"])
def test_validation_images_are_found_by_content(distilling, data, pictures, tmp_path, copy):
    first = sorted((data / "val").iterdir())[0]
    if copy == "copy":
        shutil.copy(first, f"{pictures[1]}/other_name{first.suffix}")
    else:
        Image.open(first).convert("RGB").save(f"{pictures[1]}/other_name.tif")
    with refuses("unlabelled", "1 of 5 images that are validation images", "none of them", "take them out") as error:
        train(distilling, tmp_path / "run")
    assert "other_name" in str(error.value) and first.name in str(error.value)
    assert not (tmp_path / "run/settings.json").exists()


def test_bad_folders_and_images_are_one_line(distilling, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with refuses("unlabelled", "no images in", "files named .jpg"):
        train(replace(distilling, unlabelled=(str(tmp_path / "empty"),)), tmp_path / "run")
    with refuses("unlabelled", "no folder"):
        train(replace(distilling, unlabelled=(str(tmp_path / "none"),)), tmp_path / "run")
    with refuses("unlabelled", "inside of", "no image in common"):
        train(replace(distilling, unlabelled=(pictures[0], f"{pictures[0]}/deep")), tmp_path / "run")
    with open(f"{pictures[0]}/broken.png", "wb") as file:
        file.write(b"no image")
    with refuses("unlabelled", "broken.png, which cannot be read", "a whole image file"):
        train(distilling, tmp_path / "run")
    os.remove(f"{pictures[0]}/broken.png")
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(f"{pictures[0]}/deep.tif")
    with refuses("unlabelled", "of floating point", "a range that is known", "{image_range}"):
        train(distilling, tmp_path / "run")
    os.remove(f"{pictures[0]}/deep.tif")
    Image.new("RGB", (400, 4)).save(f"{pictures[0]}/long.png")
    with refuses("unlabelled", "long.png of 400 x 4 pixels"):
        train(distilling, tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "argument", "value", "hint"),
    [
        ({"unlabelled_weight": -1.0}, "unlabelled_weight", "-1.0", ""),
        ({"unlabelled_weight": float("nan")}, "unlabelled_weight", "nan", ""),
        ({"unlabelled_start": 4}, "unlabelled_start", "4", ""),
        ({"unlabelled_batch": 3}, "unlabelled_batch", "3", ""),
        ({"method": ""}, "unlabelled", "without a method", "{pseudo_labels}"),
        ({"pseudo_labels": 1.5}, "pseudo_labels", "1.5", ""),
        ({"pseudo_labels": 0.5, "teacher": ""}, "pseudo_labels", "without a teacher", "{teacher}"),
        ({"pseudo_labels": 0.5, "unlabelled_weight": 2.0}, "unlabelled_weight", "2.0", "count as labelled"),
        (
            {"unlabelled": (), "unlabelled_batch": 8, "unlabelled_weight": 2.0},
            "unlabelled_weight",
            "2.0",
            "{unlabelled}",
        ),
        ({"unlabelled": (), "unlabelled_batch": 8, "pseudo_labels": 0.5}, "pseudo_labels", "0.5", "{unlabelled}"),
    ],
)
def test_options_that_do_not_fit_are_refused(distilling, change, argument, value, hint):
    with refuses(argument, value, "", hint):
        check_unlabelled(replace(distilling, **change), world=2)


@pytest.mark.parametrize(("method", "student", "why"), [
    ("FGD", "retinanet_resnet18_fpn64", "FGD, which needs boxes"),
    ("KD", "fasterrcnn_resnet18_fpn32", "KD, which compares the classes of regions"),
])  # fmt: skip
def test_a_method_that_cannot_use_them_is_refused_before_the_first_step(distilling, tmp_path, method, student, why):
    settings = replace(distilling, method=method, student=student)
    if method == "KD":
        train(replace(settings, teacher="", method="", unlabelled=(), unlabelled_batch=8, iterations=1), tmp_path / "t")
        settings = replace(settings, teacher=str(tmp_path / "t"))
    with refuses("method", why, "neither boxes nor labels"):
        train(settings, tmp_path / "run")
    assert not (tmp_path / "run/settings.json").exists()


@pytest.mark.parametrize("student", ["retinanet", "fcos"])
def test_classes_of_dense_heads_are_compared_at_all_anchors(distilling, tmp_path, data, student):
    settings = replace(distilling, student=f"{student}_resnet18_fpn32", method="KD")
    model = build_model(settings.student, num_classes=7, size=64)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    settings = replace(settings, teacher=settings.student, teacher_weights=str(tmp_path / "teacher.pth"))
    built = build_models(settings, load_data(settings.train_split, settings.student, name="data")).student
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]
    found = UnlabelledBatches(None, settings).losses(built, built.distillation, images)
    (loss,) = found.values()
    loss.backward()
    head = built.head.classification_head.cls_logits
    assert head.weight.grad.abs().sum() > 0 and list(found)[0].startswith("loss_unlabelled_kd")


def test_a_segmentation_model_learns_from_them(segmenting, tmp_path, monkeypatch):
    monkeypatch.setattr("acam_kd.tv.reports.LOG_PERIOD", 1)
    train(replace(segmenting, crop=(48, 48), size=None), tmp_path / "run")
    (_, last) = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert last["loss_unlabelled_pkd_pearson"] > 0


def test_pseudo_boxes_are_the_teachers_and_pass_the_check(distilling, finished, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("acam_kd.tv.reports.LOG_PERIOD", 1)
    settings = replace(distilling, method="", pseudo_labels=0.051, iterations=2)
    train(settings, tmp_path / "run")
    made = tmp_path / "run/pseudo_labels"
    root = str(tmp_path / "pictures")
    content = check_coco(str(made / "boxes.json"), root, name="pseudo").content
    assert {image["file_name"] for image in content["images"]} == {"a/0.png", "a/1.jpg", "a/deep/2.png", "b/0.png"}
    assert content["annotations"] and all(a["score"] >= 0.051 for a in content["annotations"])
    labelled = load_data(settings.train_split, settings.student, name="data")
    teacher = build_model(json.loads((finished / "student.json").read_text())["name"], num_classes=7, size=64)
    teacher.load_state_dict(student_of(finished))
    (entry,) = [image for image in content["images"] if image["file_name"] == "a/1.jpg"]
    image = UnlabelledImages(pictures, image_range="auto")[1][0]
    with torch.no_grad():
        (output,) = teacher.eval()([image])
    sides = output["boxes"][:, 2:] - output["boxes"][:, :2]
    kept = (output["scores"] >= 0.051) & (sides > 0).all(1)  # this teacher finds lines, too
    mine = [a for a in content["annotations"] if a["image_id"] == entry["id"]]
    assert torch.allclose(torch.tensor([a["score"] for a in mine]), output["scores"][kept])
    assert [labelled.labels[a["category_id"]] for a in mine] == output["labels"][kept].tolist()
    losses = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert losses and not any("unlabelled" in name for line in losses for name in line)


class Fixed(torch.nn.Module):
    """Logits of three classes that are sure at the left and at the right, and not between."""

    def forward(self, batch):
        sure = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 9.0]]).T
        return {"out": sure[None, :, None].expand(len(batch), 3, batch.shape[2], 4)}


def test_a_label_map_is_the_largest_class_and_ignored_where_it_is_not_sure():
    label, sure = _label_map(Segmentor(Fixed()), torch.rand(3, 2, 4), 0.9)
    assert label.tolist() == 2 * [[0, 0, 255, 2]] and sure == 0.75 and label.dtype == np.uint8


def test_pseudo_label_maps_are_files_that_are_used(segmenting, tmp_path, monkeypatch):
    def halves(teacher, image, threshold):
        label = np.full(image.shape[1:], 255, dtype=np.uint8)
        label[:20], label[20:40] = 0, 3
        return label, 0.6

    monkeypatch.setattr("acam_kd.tv.pseudo_labels._label_map", halves)
    train(replace(segmenting, method="", pseudo_labels=0.5), tmp_path / "run")
    made = tmp_path / "run/pseudo_labels"
    assert sorted(str(path.relative_to(made)) for path in made.rglob("*.png")) == [
        "0/0.png", "0/1.png", "0/deep/2.png", "1/0.png"
    ]  # fmt: skip
    with Image.open(made / "0/1.png") as label:
        assert label.mode == "P" and np.array(label)[[0, 30, 47], 5].tolist() == [0, 3, 255]


def test_a_threshold_that_nothing_passes_is_refused(distilling, tmp_path):
    with refuses("pseudo_labels", "0.99, where no box has this score on 4 images", "a lower threshold"):
        train(replace(distilling, pseudo_labels=0.99), tmp_path / "run")


def test_a_teacher_of_other_classes_cannot_label(distilling, tmp_path):
    torch.save(build_model("fcos_resnet18_fpn32", num_classes=4).state_dict(), tmp_path / "other.pth")
    settings = replace(
        distilling, method="", teacher="fcos_resnet18_fpn32", teacher_weights=str(tmp_path / "other.pth"), teacher_classes=4,
        pseudo_labels=0.5,
    )  # fmt: skip
    with refuses("pseudo_labels", "a teacher of other classes", "the data's own"):
        train(settings, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--method", "MGD"], ["--method", "none", "--pseudo-labels", "0.051"]])
def test_two_processes_share_both_batches(data, finished, pictures, tmp_path, root, more):
    command = [
        sys.executable, "-m", "acam_kd.cli", "train", "--data", data, "--student", "retinanet_resnet18_fpn64",
        "--size", 64, "--batch-size", 2, "--workers", 0, "--accelerator", "cpu", "--devices", 2, "--iterations", 2,
        "--teacher", finished, "--inherit", "never", "--no-teacher-check", "--unlabelled", *pictures,
        "--unlabelled-batch", 2, "--output", tmp_path / "run", *more,
    ]  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(root / "projects"),
    }
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (losses,) = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert any(name.startswith("loss_unlabelled_mgd") for name in losses) == ("MGD" in more)
    if "MGD" not in more:
        content = json.loads((tmp_path / "run/pseudo_labels/boxes.json").read_text())
        assert [image["id"] for image in content["images"]] == [1, 2, 3, 4] and content["annotations"]


def test_a_classifier_is_refused():
    settings = types.SimpleNamespace(unlabelled=("more",), pseudo_labels=0.0, student_name="resnet20")
    with refuses("unlabelled", "a classifier, resnet20", "a detector or a segmentor"):
        check_models(settings, None)
