"""Masks of Detectron2 runs: in the event storage, from a checkpoint, and as a command."""

from __future__ import annotations

import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.modeling import build_model
from detectron2.structures import ImageList

from acam_kd.d2.visualize import image_files, load_for_masks, load_moment, masks_of, read_rgb, strides_of
from acam_kd.report.panels import GAP, LINE, MARGIN, TILE

from .conftest import ROOT, broken, distillation_config, inputs, refused, save_config


@pytest.fixture
def cfg(retinanet, retinanet_teacher):
    return distillation_config(retinanet, retinanet_teacher)


def save(cfg, path, seed=0, **entries):
    """A checkpoint as a trainer writes it, with units that make masks worth looking at."""
    torch.manual_seed(seed)
    model = build_model(cfg)
    with torch.no_grad():
        for p in model.distillation.method.parameters():
            p.add_(torch.randn_like(p))
    checkpointer = DetectionCheckpointer(model, str(path.parent), distiller=model.distillation)
    checkpointer.save(path.stem, iteration=9, **entries)
    return str(path)


def picture(path, size=(48, 80)):
    pixels = np.random.default_rng(3).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), pixels)
    return str(path)


@pytest.mark.parametrize("period", [0, 3])
def test_the_storage_gets_a_picture_every_vis_period_iterations(cfg, storage, period):
    cfg.VIS_PERIOD = period
    model = build_model(cfg).train()
    model.vis_period = 0  # Detectron2's own pictures
    for storage.iter in range(7):
        model(inputs())
    ours = [(step, image) for name, image, step in storage._vis_data if name == "distill/spatial masks"]
    assert [step for step, _ in ours] == ([0, 3, 6] if period else [])
    for _, image in ours:
        assert image.shape == (
            3,
            2 * MARGIN + LINE + 5 * (TILE * 2 // 3 + 2 * LINE + 2 * GAP) + GAP,
            7 * (TILE + GAP) - GAP + 2 * MARGIN,
        )
        assert image.dtype == np.uint8


@pytest.mark.parametrize("layout", ["BGR", "RGB"])
def test_the_picture_shows_the_first_image_in_its_colours(cfg, storage, layout):
    cfg.VIS_PERIOD, cfg.INPUT.FORMAT = 1, layout
    cfg.DISTILL.TEACHER.OPTS = ["INPUT.FORMAT", layout]
    model = build_model(cfg).train()
    batch = inputs()
    batch[0]["image"][:] = torch.tensor([200, 100, 0])[:, None, None]
    model(batch)
    picture = next(image for name, image, _ in storage._vis_data if name == "distill/spatial masks")
    x, y = MARGIN + 5, MARGIN + LINE + GAP + LINE + GAP + 5  # in the image of the first row
    assert picture[:, y, x].tolist() == ([0, 100, 200] if layout == "BGR" else [200, 100, 0])


def test_detectrons_own_pictures_stay(rcnn, rcnn_teacher, storage):
    cfg = distillation_config(rcnn, rcnn_teacher, "VIS_PERIOD", 2)
    model = build_model(cfg).train()
    model(inputs())
    names = [name for name, _, _ in storage._vis_data]
    assert "distill/spatial masks" in names and any("GT" in name for name in names)


@pytest.mark.parametrize("opts", [["DISTILL.METHOD", "Mimic"], ["DISTILL.ACAMKD.SPATIAL_MASKING", ""]])
def test_no_picture_without_spatial_masks(retinanet, retinanet_teacher, storage, opts):
    model = build_model(distillation_config(retinanet, retinanet_teacher, "VIS_PERIOD", 1, *opts)).train()
    model.vis_period = 0
    model(inputs())
    assert storage._vis_data == []


@pytest.mark.parametrize("layout", ["BGR", "RGB"])
def test_masks_of_a_checkpoint_equal_a_direct_computation(cfg, tmp_path, layout):
    """By hand: resize, channel order, normalise, pad, backbones, distiller."""
    cfg.INPUT.FORMAT = layout
    cfg.DISTILL.TEACHER.OPTS = ["INPUT.FORMAT", layout]
    weights = save(cfg, tmp_path / "model.pth")
    model = load_for_masks(cfg, weights)
    image = read_rgb(picture(tmp_path / "a.png", (48, 77)))
    got = masks_of(model, cfg, image)

    small = ResizeShortestEdge([64, 64], cfg.INPUT.MAX_SIZE_TEST).get_transform(image).apply_image(image)
    assert small.shape == (64, 103, 3)
    pixels = torch.tensor(small.astype("float32")).permute(2, 0, 1)
    pixels = pixels if layout == "RGB" else pixels.flip(0)
    normalised = (pixels - model.pixel_mean) / model.pixel_std
    batch = ImageList.from_tensors([normalised], 32).tensor
    assert batch.shape == (1, 3, 64, 128)
    other = build_model(cfg).eval()
    checkpoint = torch.load(weights)
    other.load_state_dict(checkpoint["model"])
    other.distillation.load_state_dict(checkpoint["distiller"])
    with torch.no_grad():
        other.distillation.method(other.backbone(batch), other.distillation.teacher.network(batch))
    want = other.distillation.method.masks()
    assert list(got) == ["p3", "p4", "p5", "p6", "p7"] and set(got["p3"]) == {"spatial", "channel"}
    assert got["p3"]["spatial"].shape == (6, 8, 16) and got["p3"]["channel"].shape == (6, 16)
    for level, kinds in want.items():
        for kind, masks in kinds.items():
            np.testing.assert_allclose(got[level][kind], masks[0].numpy(), rtol=1e-5, atol=1e-6)
    assert got["p3"]["spatial"].std() > 0.01
    assert strides_of(model, cfg, image) == {f"p{k}": pytest.approx(2**k * 48 / 64) for k in range(3, 8)}


def test_looking_changes_nothing(cfg, tmp_path):
    model = load_for_masks(cfg, save(cfg, tmp_path / "model.pth")).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    image = read_rgb(picture(tmp_path / "a.png"))
    first, second = masks_of(model, cfg, image), masks_of(model, cfg, image)
    assert model.training and model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all((first[x]["spatial"] == second[x]["spatial"]).all() for x in first)
    assert not model.backbone._forward_pre_hooks


def test_another_moment(cfg, tmp_path):
    paths = [save(cfg, tmp_path / f"{seed}.pth", seed) for seed in (1, 2)]
    image = read_rgb(picture(tmp_path / "a.png"))
    model = load_for_masks(cfg, paths[0])
    first = masks_of(model, cfg, image)
    load_moment(model, paths[1])
    second, fresh = masks_of(model, cfg, image), masks_of(load_for_masks(cfg, paths[1]), cfg, image)
    assert np.abs(first["p3"]["spatial"] - second["p3"]["spatial"]).max() > 0.01
    assert (fresh["p3"]["spatial"] == second["p3"]["spatial"]).all()


def test_a_student_that_is_no_dense_detector(rcnn, rcnn_teacher, tmp_path):
    """It pads and normalises inside its forward."""
    rcnn.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    cfg = distillation_config(rcnn, rcnn_teacher)
    model = load_for_masks(cfg, save(cfg, tmp_path / "model.pth"))
    assert masks_of(model, cfg, read_rgb(picture(tmp_path / "a.png")))["p2"]["spatial"].shape == (6, 16, 32)


@pytest.mark.parametrize(
    ("opts", "argument", "found", "expected"),
    [
        (["DISTILL.METHOD", ""], "method", "^$", "a method with masks"),
        (["MODEL.META_ARCHITECTURE", "RetinaNet"], "MODEL.META_ARCHITECTURE", "RetinaNet", "DistillationMetaArch"),
        (["INPUT.FORMAT", "L"], "INPUT.FORMAT", "L", "RGB or BGR"),
    ],
)
def test_wrong_configs(cfg, tmp_path, opts, argument, found, expected):
    weights = save(cfg, tmp_path / "model.pth")
    cfg.merge_from_list(opts)
    with refused(argument, found, expected):
        load_for_masks(cfg, weights)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.FPN.OUT_CHANNELS", 24], "does not fit the config"),
        (["DISTILL.METHOD", "Mimic"], "of ACAMKD, this run of Mimic"),
    ],
)
def test_checkpoints_of_another_config(cfg, tmp_path, opts, message):
    weights = save(cfg, tmp_path / "model.pth")
    cfg.merge_from_list(opts)
    with broken(message, weights):
        load_for_masks(cfg, weights)


def test_a_method_without_masks(retinanet, retinanet_teacher, tmp_path):
    cfg = distillation_config(retinanet, retinanet_teacher, "DISTILL.METHOD", "Mimic")
    model = load_for_masks(cfg, save(cfg, tmp_path / "model.pth"))
    with refused("method", "Mimic", "makes masks from an image alone"):
        masks_of(model, cfg, read_rgb(picture(tmp_path / "a.png")))


def test_wrong_checkpoints(cfg, tmp_path):
    with refused("weights", "no file .*gone.pth", "a checkpoint"):
        load_for_masks(cfg, str(tmp_path / "gone.pth"))
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with broken("cannot be read as a checkpoint", "text.pth"):
        load_for_masks(cfg, str(tmp_path / "text.pth"))
    torch.save({"model": {}, "iteration": 3}, tmp_path / "plain.pth")
    with refused("weights", "plain.pth with model, iteration", "'distiller'", "checkpoint_distiller"):
        load_for_masks(cfg, str(tmp_path / "plain.pth"))
    torch.save([1], tmp_path / "list.pth")
    with refused("weights", "list.pth with list", "'distiller'"):
        load_for_masks(cfg, str(tmp_path / "list.pth"))
    whole = torch.load(save(cfg, tmp_path / "model.pth"))
    whole["model"].popitem()
    torch.save(whole, tmp_path / "cut.pth")
    with broken("does not fit the config: 1 tensors are missing", "cut.pth"):
        load_for_masks(cfg, str(tmp_path / "cut.pth"))


def test_image_files(tmp_path):
    (tmp_path / "in").mkdir()
    paths = [picture(tmp_path / "in" / name) for name in ("b.jpg", "a.PNG")]
    (tmp_path / "in" / "notes.txt").write_text("")
    single = picture(tmp_path / "c.png")
    assert image_files([str(tmp_path / "in"), single]) == [paths[1], paths[0], single]
    with refused("images", "b.jpg and .*b.png", "names that differ"):
        image_files([paths[0], picture(tmp_path / "b.png")])
    (tmp_path / "empty").mkdir()
    with refused("images", "none in .*empty"):
        image_files([str(tmp_path / "empty")])
    with refused("images", "no file .*gone.jpg"):
        read_rgb(str(tmp_path / "gone.jpg"))
    with refused("images", "notes.txt: ", "a readable image"):
        read_rgb(str(tmp_path / "in" / "notes.txt"))


def command(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "projects"), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-m", "acam_kd.cli", "masks", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_the_tool(cfg, tmp_path):
    weights = [save(cfg, tmp_path / f"model_{seed}.pth", seed) for seed in (1, 2)]
    image = picture(tmp_path / "cells.png", (60, 90))
    arguments = ["--config-file", save_config(cfg, tmp_path / "run.yaml"), "--images", image, "--weights", *weights]
    out = tmp_path / "out"
    done = command(*arguments, "--output", out, "DISTILL.LEVELS", "['p3', 'p4']")
    assert done.returncode == 1 and "does not fit the config" in done.stderr and "Traceback" not in done.stderr
    done = command(*arguments, "--output", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:] == [str(out / "cells_spatial.png"), str(out / "cells_channel.png")]
    rows = 5 * 2  # levels and moments
    spatial = cv2.imread(str(out / "cells_spatial.png"))
    assert spatial.shape[:2] == (
        2 * MARGIN + LINE + rows * (TILE * 2 // 3 + 2 * LINE + 2 * GAP) + GAP,
        7 * (TILE + GAP) - GAP + 2 * MARGIN,
    )
    assert cv2.imread(str(out / "cells_channel.png")) is not None
    done = command(*arguments, "--output", out, "NO.SUCH.KEY", "1")
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("acam-kd: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("methods", ["ACAMKD+KD", "KD+ACAMKD"])
def test_masks_beside_a_class_head(retinanet, retinanet_teacher, tmp_path, storage, methods):
    """Predictions of a class head lie on no map, and a method without masks may come first."""
    cfg = distillation_config(retinanet, retinanet_teacher, "DISTILL.METHOD", methods, "VIS_PERIOD", 1)
    model = build_model(cfg).train()
    model.vis_period = 0
    model(inputs())
    assert [name for name, _, _ in storage._vis_data] == ["distill/spatial masks"]
    model = load_for_masks(cfg, save(cfg, tmp_path / "model.pth"))
    image = read_rgb(picture(tmp_path / "a.png"))
    assert list(masks_of(model, cfg, image)) == list(strides_of(model, cfg, image)) == ["p3", "p4", "p5", "p6", "p7"]


def test_masks_beside_a_box_head(rcnn, rcnn_teacher, tmp_path):
    cfg = distillation_config(rcnn, rcnn_teacher, "DISTILL.METHOD", "ACAMKD+DKD")
    model = load_for_masks(cfg, save(cfg, tmp_path / "model.pth"))
    assert "p6" in masks_of(model, cfg, read_rgb(picture(tmp_path / "a.png")))
    cfg.DISTILL.METHOD = "FGD"
    model = load_for_masks(cfg, save(cfg, tmp_path / "fgd.pth"))
    with refused("method", "FGD", "one that makes masks from an image alone"):
        masks_of(model, cfg, read_rgb(picture(tmp_path / "b.png")))
