"""Images without labels in Detectron2: the hook, the loader, the command, two processes, bad settings."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

import acam_kd
from acam_kd.d2 import build_unlabelled_loader, feed_unlabelled, student_config
from acam_kd.d2.unlabelled import batch_of, unlabelled_dicts

from .conftest import ROOT, detector_config, distillation_config, inputs, refused, save_config
from .running import run
from .test_segmentation import labelled, segmentor


@pytest.fixture
def pictures(tmp_path):
    """Four images in a folder."""
    random = np.random.default_rng(0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        pixels = random.integers(0, 255, (48 + 16 * (number % 2), 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return str(folder)


def student_of(config, *opts, tmp_path):
    teacher = save_config(config, tmp_path / "teacher.yaml")
    return build_model(distillation_config(config, teacher, "DISTILL.METHOD", "PKD", *opts)).train()


def images(n=2):
    return [{"image": x["image"]} for x in inputs(n)]


@pytest.mark.parametrize("base", ["Base-RetinaNet.yaml", "Base-RCNN-FPN.yaml"])
def test_the_hook_adds_the_losses_of_the_batch_that_the_student_prepares(base, tmp_path, storage):
    model = student_of(detector_config(base), tmp_path=tmp_path)
    plain = {*model(inputs())}
    feed = feed_unlabelled(model, [images()] * 9, weight=0.5)
    losses = model(inputs())
    (name,) = {*losses} - plain
    assert name == "loss_unlabelled_pkd_pearson"
    alone = model.distillation.unlabelled(batch_of(model, images()))[name]
    assert torch.allclose(losses[name], 0.5 * alone)
    losses[name].backward()
    assert model.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert {*model(inputs())} == plain - {x for x in plain if "pkd" in x}
    twin = copy.deepcopy(model)
    assert len(twin.eval()(images())) == 2
    feed.remove()
    assert {*model(inputs())} == plain


def test_the_start_and_a_removed_distillation_count(tmp_path, storage):
    model = student_of(detector_config("Base-RetinaNet.yaml"), tmp_path=tmp_path)
    feed_unlabelled(model, iter([images()] * 9), start=2)
    found = []
    for step in range(4):
        storage.iter = step
        found.append(any("unlabelled" in name for name in model(inputs())))
    assert found == [False, False, True, True]
    model.distillation.remove()
    assert not any("unlabelled" in name for name in model(inputs()))


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, storage):
    model = student_of(detector_config("Base-RetinaNet.yaml"), tmp_path=tmp_path)
    feed_unlabelled(model, [[{"image": torch.full((3, 64, 64), float("nan"))}]])
    with pytest.raises(acam_kd.core.RunError, match="loss_unlabelled_pkd_pearson = nan"):
        model(inputs())


def test_a_segmentor_learns_from_pictures_of_its_own_loader(pictures, tmp_path):
    cfg = segmentor()
    teacher = save_config(cfg, tmp_path / "teacher.yaml")
    cfg = distillation_config(
        cfg, teacher, "DISTILL.METHOD", "CWD", "DATASETS.UNLABELLED", [pictures], "DISTILL.UNLABELLED.BATCH", 2
    )
    model = build_model(cfg).train()
    loader = build_unlabelled_loader(cfg)
    batch = next(iter(loader))
    assert len(batch) == 2 and all(x["image"].shape == (3, 64, 96) for x in batch)
    assert not any("sem_seg" in x or "instances" in x for x in batch)
    feed_unlabelled(model, loader)
    losses = model(labelled())
    assert [name for name in losses if "unlabelled" in name] == ["loss_unlabelled_cwd_kl"]
    sum(losses.values()).backward()


def test_annotations_of_registered_datasets_are_left_out(pictures, tmp_path):
    DatasetCatalog.register("pictures_with_boxes", lambda: [
        {"file_name": f"{pictures}/0.png", "height": 48, "width": 64, "image_id": 1, "annotations": [{"bbox": "none"}]}
    ])  # fmt: skip
    cfg = detector_config("Base-RetinaNet.yaml")
    cfg = distillation_config(cfg, "x", "DATASETS.UNLABELLED", ["pictures_with_boxes", pictures])
    try:
        found = unlabelled_dicts(cfg)
    finally:
        DatasetCatalog.remove("pictures_with_boxes")
    assert len(found) == 5 and {*found[0]} == {"file_name", "height", "width", "image_id"}
    assert not hasattr(student_config(cfg).DATASETS, "UNLABELLED")


def test_the_command_trains_on_both(arguments, pictures, tmp_path):  # noqa: F811
    run(arguments(
        "OUTPUT_DIR", tmp_path / "run", "DISTILL.METHOD", "PKD+FGD", "DATASETS.UNLABELLED", [pictures], "DISTILL.UNLABELLED.BATCH",
        2, "DISTILL.UNLABELLED.START", 1, "SOLVER.MAX_ITER", 2, "TEST.EVAL_PERIOD", 0,
    ))  # fmt: skip
    text = (tmp_path / "run/metrics.json").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert any("loss_unlabelled_pkd_pearson" in line for line in found)
    log = (tmp_path / "run/log.txt").read_text()
    assert "FGD is left out on unlabelled images: it needs boxes" in log


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DISTILL.UNLABELLED.WEIGHT", -1.0], "DISTILL.UNLABELLED.WEIGHT: found -1.0, expected >= 0 and finite"),
        (["DISTILL.UNLABELLED.BATCH", 0], "DISTILL.UNLABELLED.BATCH: found 0, expected a multiple of"),
        (["DISTILL.UNLABELLED.START", 4], "DISTILL.UNLABELLED.START: found 4, expected 0 to below the 4"),
        (["DISTILL.METHOD", "", "DISTILL.INHERIT", "never"], "DATASETS.UNLABELLED: found images without labels"),
        (["DISTILL.METHOD", "FGD"], "DISTILL.METHOD: found FGD, which needs boxes, for unlabelled images"),
        (["DATASETS.UNLABELLED", ["/nowhere"]], "DATASETS.UNLABELLED: found /nowhere, expected folders of images"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(arguments, pictures, tmp_path, opts, message):  # noqa: F811
    with pytest.raises(SystemExit) as stop:
        run(arguments("OUTPUT_DIR", tmp_path / "run", "DATASETS.UNLABELLED", [pictures], *opts))
    assert str(stop.value).startswith(f"train_net.py: {message}") and "\n" not in str(stop.value)


def test_validation_images_are_refused(arguments, data, pictures, tmp_path):  # noqa: F811
    first = sorted((data / "val").iterdir())[0]
    shutil.copy(first, f"{pictures}/other{first.suffix}")
    with pytest.raises(SystemExit, match="DATASETS.UNLABELLED: found 1 of 5 images that are validation images"):
        run(arguments("OUTPUT_DIR", tmp_path / "run", "DATASETS.UNLABELLED", [pictures]))


def test_a_student_without_a_distillation_is_refused():
    with refused("unlabelled", "a RetinaNet without a distillation"):
        feed_unlabelled(build_model(detector_config("Base-RetinaNet.yaml")), [])


@pytest.mark.slow
def test_two_processes_have_both_losses_in_one_step(arguments, pictures, tmp_path):  # noqa: F811
    command = arguments(
        "OUTPUT_DIR", tmp_path / "run", "DISTILL.METHOD", "MGD", "DATASETS.UNLABELLED", [pictures],
        "DISTILL.UNLABELLED.BATCH", 2, "DISTILL.UNLABELLED.START", 1, "SOLVER.MAX_ITER", 4,
    )  # fmt: skip
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from detectron2.engine import launch\nfrom tests.d2.test_train import worker\n"
        "if __name__ == '__main__':\n"
        f"    launch(worker, 2, dist_url='auto', args=({command!r}, {str(tmp_path / 'out')!r}))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.load(tmp_path / "out") == [True, 2]
    assert "loss_unlabelled_mgd" in (tmp_path / "run/metrics.json").read_text()
