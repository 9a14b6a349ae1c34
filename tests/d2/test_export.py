"""Every kind of a Detectron2 student on its way to use: its exported form, files of each format, evaluation of these."""

from __future__ import annotations

import json
from functools import partial

import cv2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch.nn import BatchNorm2d, Conv2d, Linear

from acam_kd.cli import main
from acam_kd.core.errors import RunError
from acam_kd.d2 import add_segmentation_config
from acam_kd.d2.deployed import DeployedD2
from acam_kd.d2.export import export_run
from acam_kd.d2.predict import load_predictor
from acam_kd.d2.sem_seg_heads import _means
from acam_kd.data import shapes
from acam_kd.export.exported import as_pixels, load_exported

from .conftest import NARROW, ROOT, TINY

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracers are deprecated, and warn of constants

THINGS = {str(3 * number): name for number, name in enumerate("abc", 1)}  # ids of a dataset need not begin at 1
FPN = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.RESNETS.OUT_FEATURES", "['res2','res3','res4','res5']",
       "MODEL.FPN.IN_FEATURES", "['res2','res3','res4','res5']", "MODEL.RESNETS.STEM_TYPE", "basic",
       "MODEL.RESNETS.RES4_DILATION", "1", "MODEL.RESNETS.RES5_DILATION", "1", "MODEL.RESNETS.DEPTH", "50",
       "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead", "MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p2','p3','p4','p5']"]  # fmt: skip
KINDS = {
    "retinanet": ("Base-RetinaNet.yaml", []),
    "faster": ("Base-RCNN-FPN.yaml", []),
    "mask": ("Base-RCNN-FPN.yaml", ["MODEL.MASK_ON", "True"]),
    "keypoints": ("Base-RCNN-FPN.yaml", ["MODEL.KEYPOINT_ON", "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "3",
                                         "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", "(8,)"]),
    "cascade": ("Base-RCNN-FPN.yaml", ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
                                       "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True"]),
    "reppoints": ("quick_schedules/tiny_reppoints.yaml", ["MODEL.REPPOINTS.NUM_CLASSES", "3",
                                                          "MODEL.FPN.NORM", "BN"]),
    "deeplabv3": ("shapes_seg/student.yaml", []),
    "pspnet": ("shapes_seg/student.yaml", ["MODEL.SEM_SEG_HEAD.NAME", "PSPHead"]),
    "semantic_fpn": ("shapes_seg/student.yaml", FPN),
}  # fmt: skip
EXPORTED = [kind for kind in KINDS if kind != "keypoints"]
# Mean and deviation of the outputs of layers, by type and last part of the name; few of a dense head's pass its threshold.
SPREAD = {
    (Conv2d, "cls_score"): (-5.5, 1.2), (Conv2d, "bbox_pred"): (0, 0.2), (Linear, "cls_score"): (0, 1),
    (Linear, "bbox_pred"): (0, 1), (Conv2d, "objectness_logits"): (0, 1), (Conv2d, "anchor_deltas"): (0, 0.2),
    (Conv2d, "predictor"): (3, 1.5), (Conv2d, "init_points"): (0, 1), (Conv2d, "refine_points"): (0, 0.2),
}  # fmt: skip
SEMANTIC = ("deeplabv3", "pspnet", "semantic_fpn")


@torch.no_grad()
def spread_scores(model, pictures):
    """Let the scores of a picture differ, none of them 0 or 1, and the boxes differ a little from their anchors.

    Initial weights do neither: without statistics of batch normalisation the features are huge, and scores are equal.
    """
    images = torch.stack([torch.tensor(cv2.imread(str(path))) for path in sorted(pictures.iterdir())])
    images = images.permute(0, 3, 1, 2).float()
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the mean over all calls
    model.backbone.train()((images - model.pixel_mean) / model.pixel_std)
    model.eval()
    called = set()

    def standardise(module, inputs, output, shift, scale):
        """Give the outputs of a layer a mean and a deviation over all places, at its first call."""
        if module in called:
            return None
        called.add(module)
        over = [0, *range(2, output.dim())]
        deviation, mean = torch.std_mean(output, over)
        factor = scale / deviation
        module.weight *= factor.view(-1, *[1] * (output.dim() - 1))
        module.bias.copy_((module.bias - mean) * factor + shift)
        return module(*inputs)

    hooks = []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        for kind, layer in SPREAD:
            if isinstance(module, kind) and last == layer:
                mean, scale = SPREAD[kind, layer]
                hooks.append(module.register_forward_hook(partial(standardise, shift=mean, scale=scale)))
        if last == "score_lowres":
            module.weight *= 1e-3  # else its heatmaps overflow
    model([{"image": image} for image in images])
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def spread_labels(model, pictures):
    """Let every class win somewhere."""
    image = torch.tensor(cv2.imread(str(min(pictures.iterdir())))).permute(2, 0, 1)[None]
    features = model.backbone((image - model.pixel_mean) / model.pixel_std)
    logits, _ = model.sem_seg_head(features)
    deviation, mean = torch.std_mean(logits, (0, 2, 3))
    predictor = model.sem_seg_head.predictor
    predictor.weight /= deviation[:, None, None, None]
    predictor.bias.copy_((predictor.bias - mean) / deviation)


def write_run(folder, kind, pictures):
    """The folder of a finished run, without the run: weights whose scores differ, unlike those of a new model."""
    base, opts = KINDS[kind]
    cfg = get_cfg()
    add_segmentation_config(cfg)
    content = cfg.load_yaml_with_base(str(ROOT / "configs" / base))
    content.pop("DISTILL", None)
    cfg.merge_from_other_cfg(type(cfg)(content))
    cfg.merge_from_list([*TINY, *NARROW, "INPUT.MIN_SIZE_TEST", "96", "INPUT.MAX_SIZE_TEST", "160", *opts])
    folder.mkdir()
    (folder / "student_config.yaml").write_text(cfg.dump())
    classes = {"things": THINGS, "stuff": ["background", *"abcdef"]}
    (folder / "classes.json").write_text(json.dumps(classes))
    torch.manual_seed(0)
    model = build_model(cfg)
    spread_labels(model.eval(), pictures) if kind in SEMANTIC else spread_scores(model.eval(), pictures)
    torch.save({"model": model.state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(shapes, "SPLITS", {"val": 2})
    folder = shapes.make_shapes(tmp_path_factory.mktemp("data"), size=96) / "val"
    patch.undo()
    return folder


@pytest.mark.parametrize("kind", EXPORTED)
def test_the_exported_form_predicts_as_detectron2(kind, pictures, tmp_path):
    """On an image that needs no resizing, and is no multiple of the strides."""
    predictor = load_predictor(str(write_run(tmp_path / "run", kind, pictures)))
    image = cv2.imread(str(min(pictures.iterdir())))[:, :, ::-1].copy()
    image = cv2.resize(image, (131, 96))
    expected = predictor(image)
    deployed = DeployedD2(predictor.model, predictor.order, [*map(int, THINGS)])
    found = dict(zip(deployed.outputs, deployed(as_pixels(image)[None])))
    if kind in SEMANTIC:
        assert (found["semantic"][0].numpy() == expected.semantic).all() and len(set(expected.semantic.flat)) > 1
        return
    order = found["scores"].argsort(descending=True)
    assert len(order) == len(expected.scores) > 3
    assert found["scores"][order].tolist() == pytest.approx(expected.scores.tolist(), abs=1e-5)
    assert found["boxes"][order].numpy() == pytest.approx(expected.boxes, abs=1e-3)
    assert found["labels"][order].tolist() == expected.labels.tolist() and {*expected.labels} <= {3, 6, 9}
    if kind == "mask":
        assert ((found["masks"][order][:, 0].numpy() >= 0.5) == expected.masks).mean() > 0.999


@pytest.mark.parametrize("kind", ["mask", "keypoints", "deeplabv3"])
def test_predictions_of_every_kind(kind, pictures, tmp_path, capsys):
    run, out = write_run(tmp_path / "run", kind, pictures), tmp_path / "out"
    main(["predict", str(run), str(pictures), "--output", str(out), "--score", "0.3"])
    said = capsys.readouterr().out.splitlines()[-1]
    images = json.loads((out / "images.json").read_text())["images"]
    assert {path.stem for path in pictures.iterdir()} == {path.stem for path in out.glob("*.jpg")} and len(images) == 2
    if kind in SEMANTIC:
        assert said == f"2 images, label maps in {out / 'labels'}" and not (out / "predictions.json").exists()
        assert len({*cv2.imread(str(min((out / "labels").iterdir())), cv2.IMREAD_UNCHANGED).flat}) > 1
        return
    results = json.loads((out / "predictions.json").read_text())
    drawn = sum(result["score"] >= 0.3 for result in results)
    assert (
        said == f"2 images, {len(results)} detections, {drawn} of them from a score of 0.3 on, which are drawn: {out}"
    )
    assert 0 < drawn < len(results) and {result["category_id"] for result in results} <= {3, 6, 9}
    field = {"mask": "segmentation", "keypoints": "keypoints"}[kind]
    assert all(field in result for result in results)
    if kind == "keypoints":
        assert {len(result["keypoints"]) for result in results} == {9}
        x0, y0, width, height = results[0]["bbox"]
        x, y = results[0]["keypoints"][:2]
        assert x0 - 1 <= x <= x0 + width + 1 and y0 - 1 <= y <= y0 + height + 1


def test_a_run_of_another_trainer_is_one_line(pictures, tmp_path):
    (tmp_path / "model_final.pth").touch()
    for command in (["predict", str(tmp_path), str(pictures), "--output", str(tmp_path / "out")],
                    ["export", str(tmp_path), "--format", "onnx", "--output", str(tmp_path / "out")],
                    ["eval", "--data", str(pictures.parent), "--student", str(tmp_path)]):  # fmt: skip
        with pytest.raises(SystemExit, match="model_final.pth without student_config.yaml in .*LazyConfig") as error:
            main(command)
        assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_the_best_checkpoint_is_predicted_exported_and_evaluated(pictures, tmp_path, monkeypatch):
    """Its file differs from the last one's: it finds the third class alone."""
    run = write_run(tmp_path / "run", "retinanet", pictures)
    weights = torch.load(run / "model_final.pth")
    weights["model"]["head.cls_score.bias"].view(-1, len(THINGS))[:, :2] = -50
    torch.save(weights, run / "model_best.pth")
    for checkpoint, ids in (("last", {3, 6, 9}), ("best", {9})):
        out = tmp_path / checkpoint
        main(["predict", str(run), str(pictures), "--output", str(out), "--checkpoint", checkpoint])
        results = json.loads((out / "predictions.json").read_text())
        assert {result["category_id"] for result in results} == ids
    path = tmp_path / "file"
    main(["export", str(run), "--format", "torchscript", "--output", str(path), "--images", str(pictures),
          "--checkpoint", "best"])  # fmt: skip
    exported = load_exported(path)
    assert exported.metadata.weights == "model_best.pth"
    image = as_pixels(cv2.imread(str(min(pictures.iterdir())))[:, :, ::-1].copy())
    assert {*exported([image])[0]["labels"].tolist()} == {9}
    seen = []
    monkeypatch.setattr("acam_kd.tv.measure.measure", lambda model, *_, **__: seen.append(model) or _Row())
    monkeypatch.setattr("acam_kd.tv.measure.table", lambda rows: "")
    main(["eval", "--data", str(pictures.parent), "--student", str(run), "--checkpoint", "best"])
    assert seen[0].file.name == "model_best.pth" and {*seen[0].network([image])[0]["labels"].tolist()} == {9}


class _Row:
    metrics = {"AP": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript"])
@pytest.mark.parametrize("kind", EXPORTED)
def test_every_kind_of_student_is_exported(kind, format, pictures, tmp_path, capfd):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    run = write_run(tmp_path / "run", kind, pictures)
    capfd.readouterr()
    found = export_run(str(run), tmp_path / "file", kind=format, images=[str(pictures)])
    assert len(found) == 8 and all(each.agreement for each in found)
    assert all(each.agreement.compared for each in found) and "%" not in capfd.readouterr().out
    exported = load_exported(tmp_path / "file")
    assert exported.metadata.shorter == 96 and ("masks" in exported.metadata.outputs) == (kind == "mask")
    if kind in SEMANTIC:
        pair = torch.rand(2, 3, 70, 90)
        (maps,) = exported.run(pair)
        assert maps.shape == (2, 70, 90) and torch.equal(maps[1], exported.run(pair[1:])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["retinanet", "faster", "mask", "cascade"])
def test_torch_export_of_a_detector_is_refused_in_one_line(kind, pictures, tmp_path):
    run = write_run(tmp_path / "run", kind, pictures)
    found = r"cannot be exported as torch-export \(Could not guard on data-dependent expression .* choose another format; see"
    with pytest.raises(RunError, match=found):
        export_run(str(run), tmp_path / "file", kind="torch-export", images=[str(pictures)])
    assert not (tmp_path / "file").exists()


@pytest.mark.slow
def test_masks_of_a_file_have_the_size_of_the_image(pictures, tmp_path):
    run = write_run(tmp_path / "run", "mask", pictures)
    export_run(str(run), tmp_path / "file", kind="torchscript", images=[str(pictures)])
    exported = load_exported(tmp_path / "file")
    image = cv2.resize(cv2.imread(str(min(pictures.iterdir())))[:, :, ::-1].copy(), (150, 120))
    (found,) = exported([as_pixels(image)])
    expected = load_predictor(str(run))(image)
    assert found["masks"].shape == (len(expected.scores), 1, 120, 150)
    order = found["scores"].argsort(descending=True)
    assert ((found["masks"][order][:, 0].numpy() >= 0.5) == expected.masks).mean() > 0.99
    (none,) = exported([torch.zeros(3, 120, 150)])
    assert none["masks"].shape[1:] == (1, 120, 150)


@pytest.mark.parametrize("size", [(7, 11), (6, 24), (5, 4)])
def test_means_of_parts_are_adaptive_pooling(size):
    x = torch.rand(2, 3, *size)
    for bins in (1, 2, 3, 6):
        torch.testing.assert_close(_means(x, bins), torch.nn.functional.adaptive_avg_pool2d(x, bins))


@pytest.mark.parametrize("kind", [pytest.param("mask", marks=pytest.mark.slow), "deeplabv3"])
def test_run_and_file_have_one_metric(kind, pictures, tmp_path, capsys, monkeypatch):
    run = write_run(tmp_path / "run", kind, pictures)
    names = [category["name"] for category in json.loads((pictures.parent / "val.json").read_text())["categories"]]
    things = {str(number): name for number, name in enumerate(names, 10)}
    (run / "classes.json").write_text(json.dumps({"things": things, "stuff": ["background", *names]}))
    export_run(str(run), tmp_path / "file", kind="torchscript", images=[str(pictures)])
    weights = torch.load(run / "model_final.pth")
    torch.save({**weights, "optimizer": torch.zeros(2**20)}, run / "model_final.pth")  # which the size leaves out
    monkeypatch.setattr("acam_kd.tv.measure.latency", lambda *_: 1.0)
    main(["eval", "--data", str(pictures.parent), "--student", str(tmp_path / "file"), "--beside", str(run),
          "--workers", "0"])  # fmt: skip
    metrics, _, *rows, _ = capsys.readouterr().out.splitlines()
    metric = "mIoU" if kind in SEMANTIC else "AP"
    assert [row.split()[1] for row in rows] == [f"{json.loads(metrics)[metric]:.2f}"] * 2
    assert [len(row.split()) for row in rows] == [5, 7]  # a run knows its parameters
    sizes = [(tmp_path / "file").stat().st_size, sum(tensor.nbytes for tensor in weights["model"].values())]
    assert [row.split()[-3] for row in rows] == [f"{size / 2**20:.1f}" for size in sizes]
    assert ("segm/AP" in json.loads(metrics)) == (kind == "mask")
    with pytest.raises(SystemExit, match="--size: found 64, expected 96, which is in .*file; leave --size out"):
        main(["eval", "--data", str(pictures.parent), "--student", str(tmp_path / "file"), "--size", "64"])
