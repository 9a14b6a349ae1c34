"""LazyConfigs in Detectron2's own ``tools/lazyconfig_train_net.py``, unchanged and with the lines that it is told."""

from __future__ import annotations

import runpy
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.fcos import FCOS
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import CosineParamScheduler

import acam_kd
from acam_kd import ConfigError
from acam_kd.d2 import add_distillation_config, checkpoint_distiller, guard_gradients, load_teacher

from .conftest import ROOT, detector_config, inputs, save_config, save_weights
from .test_segmentation import labelled, segmentor

TOOL = Path(detectron2.__file__).resolve().parent.parent / "tools" / "lazyconfig_train_net.py"
LAZY = ROOT / "configs" / "lazy"
LINES = """
    from acam_kd.d2 import checkpoint_distiller
    checkpoint_distiller(checkpointer)
"""


@pytest.fixture(autouse=True)
def no_fusion():
    torch.jit.set_fusion_strategy([("STATIC", 0), ("DYNAMIC", 0)])


def small(cfg, teacher, weights):
    """The config on models of a few channels and a dataset in memory."""
    model = cfg.model
    cfg.train.device, cfg.train.max_iter, cfg.train.init_checkpoint = "cpu", 4, ""
    cfg.train.eval_period, cfg.train.amp.enabled, cfg.train.checkpointer = 100, False, {"period": 2}
    model.alpha = 1e-9  # the teacher is random
    model.teacher.model, model.teacher.weights, model.teacher.device = teacher, weights, "cpu"
    cfg.dataloader.train.dataset.names = "lazy_train"
    cfg.dataloader.train.total_batch_size, cfg.dataloader.train.num_workers = 2, 0
    cfg.dataloader.test.dataset.names = "lazy_train"
    del cfg.dataloader["evaluator"]
    cfg.optimizer.lr = 0.001
    return cfg


@pytest.fixture
def dataset(tmp_path):
    import cv2

    images = []
    for number, x in enumerate(inputs(1)):
        path = str(tmp_path / f"{number}.png")
        cv2.imwrite(path, x["image"].permute(1, 2, 0).numpy())
        boxes = [{"bbox": b.tolist(), "bbox_mode": 0, "category_id": 0} for b in x["instances"].gt_boxes]
        images.append({"file_name": path, "image_id": number, "height": 64, "width": 96, "annotations": boxes})
    DatasetCatalog.register("lazy_train", lambda: images)
    MetadataCatalog.get("lazy_train").thing_classes = ["a"]
    yield
    DatasetCatalog.remove("lazy_train")
    MetadataCatalog.remove("lazy_train")


@pytest.fixture
def teacher(tmp_path):
    cfg = detector_config("Base-RetinaNet.yaml", "MODEL.FPN.OUT_CHANNELS", 24)
    return save_config(cfg, tmp_path / "t.yaml"), save_weights(cfg, tmp_path / "t.pth")


def fcos(teacher, tmp_path):
    cfg = small(LazyConfig.load(str(LAZY / "acam_fcos_r50_retinanet_r101.py")), *teacher)
    bottom_up = cfg.model.student.backbone.bottom_up
    bottom_up.stem.norm, bottom_up.stages.norm, bottom_up.freeze_at = "BN", "BN", 0
    (resize, _) = cfg.dataloader.train.mapper.augmentations
    resize.short_edge_length, resize.max_size = [64], 96
    cfg.train.output_dir = str(tmp_path / "out")
    return cfg


class Config:
    """The tool's own main, with a config that is made in memory."""

    def __init__(self, source=""):
        text = TOOL.read_text()
        if source:
            text = text.replace("    checkpointer.resume_or_load", f"{source}\n    checkpointer.resume_or_load", 1)
            assert source in text
        self.path = source and text

    def run(self, cfg, tmp_path, *flags):
        path = tmp_path / "config.yaml"
        LazyConfig.save(cfg, str(path))
        script = TOOL
        if self.path:
            script = tmp_path / "lazyconfig_train_net.py"
            script.write_text(self.path)
        tool = runpy.run_path(str(script))
        tool["main"](tool["default_argument_parser"]().parse_args(["--config-file", str(path), *flags]))


def test_the_configs_name_models_that_exist():
    for path in sorted(LAZY.glob("*.py")):
        cfg = LazyConfig.load(str(path))
        assert cfg.model._target_ in ("acam_kd.distill", acam_kd.distill)
        assert {"dataloader", "optimizer", "lr_multiplier", "train"} <= cfg.keys()


def test_fcos_learns_from_retinanet(teacher, dataset, tmp_path):
    cfg = fcos(teacher, tmp_path)
    model = instantiate(cfg.model).train()
    assert isinstance(model, FCOS) and set(model.distillation.levels) == {"p3", "p4", "p5", "p6", "p7"}
    assert model.distillation.teacher.pixels.identity
    batch = inputs()
    with EventStorage():
        losses = model(batch)
    sum(losses.values()).backward()
    assert {"loss_fcos_cls", "loss_acam_spatial"} <= set(losses)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_without_an_event_storage_steps_are_counted(tmp_path):
    """A segmentor's own forward needs none; detectors of Detectron2 do."""
    student, teacher = (build_model(segmentor()).train() for _ in range(2))
    acam_kd.distill(student, teacher, method="CWD", period=2)
    assert [len(student(labelled())) for _ in range(3)] == [2, 1, 2] and student.distillation.iteration == 2


@pytest.mark.slow
def test_detectron2s_own_tool_trains_resumes_and_says_what_is_lost(teacher, dataset, tmp_path):
    cfg = fcos(teacher, tmp_path)
    cfg.train.max_iter = 2
    torch.manual_seed(0)
    Config().run(cfg, tmp_path)
    saved = torch.load(tmp_path / "out" / "model_0000001.pth", weights_only=False)
    plain = instantiate(cfg.model.student)
    assert set(saved["model"]) == set(plain.state_dict()) and "distiller" not in saved
    cfg.train.max_iter = 4
    Config().run(cfg, tmp_path, "--resume")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert log.count("NEW distiller") == 1 and "checkpoint_distiller(checkpointer)" in log
    assert (tmp_path / "out" / "model_0000003.pth").is_file()


@pytest.mark.slow
def test_a_copy_of_the_tool_with_those_lines_resumes_exactly(teacher, dataset, tmp_path):
    """One image and no flips, so that the order of the data, which Detectron2 does not resume, cannot matter."""
    cfg = fcos(teacher, tmp_path)
    cfg.dataloader.train.mapper.augmentations = cfg.dataloader.train.mapper.augmentations[:1]
    cfg.lr_multiplier = L(CosineParamScheduler)(start_value=1.0, end_value=1.0)
    tool = Config(LINES)

    def run(folder, iterations, *flags):
        cfg.train.output_dir, cfg.train.max_iter = str(tmp_path / folder), iterations
        cfg.train.seed = 3
        tool.run(cfg, tmp_path, *flags)
        return torch.load(Path(cfg.train.output_dir) / f"model_{iterations - 1:07d}.pth", weights_only=False)

    whole = run("whole", 4)
    first = run("parts", 2)
    second = run("parts", 4, "--resume")
    assert "NEW distiller" not in (tmp_path / "parts" / "log.txt").read_text() and first["distiller"]
    for entry in ("model", "distiller"):
        assert set(whole[entry]) == set(second[entry])
        for name, value in whole[entry].items():
            assert torch.equal(value, second[entry][name]), name
    assert any(not torch.equal(v, second["distiller"][k]) for k, v in first["distiller"].items())


def test_layer_wise_rates_of_a_vit_are_those_of_the_plain_model(teacher, tmp_path):
    cfg = LazyConfig.load(str(LAZY / "acam_vitdet_b_r101.py"))
    rcnn = detector_config("Base-RCNN-FPN.yaml", "MODEL.MASK_ON", True)
    cfg.model.teacher.model = save_config(rcnn, tmp_path / "r.yaml")
    cfg.model.teacher.weights, cfg.model.teacher.device = "random", "cpu"
    student = cfg.model.student
    net = student.backbone.net
    net.embed_dim, net.depth, net.num_heads, net.img_size, net.window_size = 16, 12, 2, 128, 0
    student.backbone.square_pad = 128
    student.backbone.out_channels = 16
    for head in (student.roi_heads.box_head, student.roi_heads.mask_head):
        head.conv_dims, head.input_shape.channels = [16, 16], 16
    student.roi_heads.box_head.fc_dims = [16]
    student.roi_heads.box_predictor.input_shape.channels = 16
    student.proposal_generator.head.in_channels = 16
    plain, distilled = instantiate(student), instantiate(cfg.model).train()

    def rates(model):
        cfg.optimizer.params.model = model
        optimizer = instantiate(cfg.optimizer)
        names = {id(p): n for n, p in model.named_parameters()}
        return {names[id(p)]: g["lr"] for g in optimizer.param_groups for p in g["params"]}

    there, here = rates(plain), rates(distilled)
    assert len(set(there.values())) > 6
    assert {n: r for n, r in here.items() if not n.startswith("distillation.")} == there
    with EventStorage():
        losses = distilled(inputs(size=(90, 120)))
    sum(losses.values()).backward()
    assert {"loss_mask", "loss_acam_spatial"} <= set(losses) and "p6" in distilled.distillation.levels


def test_a_lazyconfig_is_not_a_cfgnode(teacher):
    with pytest.raises(ConfigError) as error:
        add_distillation_config(LazyConfig.load(str(LAZY / "acam_fcos_r50_retinanet_r101.py")))
    assert error.value.argument == "cfg" and "L(acam_kd.distill)" in error.value.hint


def test_checkpoint_distiller_takes_a_checkpointer_and_says_so(teacher, tmp_path):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.engine import SimpleTrainer

    model = acam_kd.distill(load_teacher(*teacher, device="cpu"), load_teacher(*teacher, device="cpu"), method="ACAMKD")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [inputs()], optimizer)
    with pytest.raises(ConfigError) as error:
        checkpoint_distiller(trainer)
    assert "checkpoint_distiller(checkpointer)" in error.value.hint
    checkpointer = DetectionCheckpointer(model, str(tmp_path), trainer=trainer)
    checkpoint_distiller(checkpointer)
    assert checkpointer.checkpointables["distiller"] is model.distillation


def test_without_a_config_it_logs_and_draws_too(teacher, tmp_path):
    student = load_teacher(*teacher, device="cpu").train()
    student.vis_period = 10
    acam_kd.distill(student, load_teacher(*teacher, device="cpu"), method="ACAMKD")
    with EventStorage(19) as storage:
        student(inputs())
        assert storage.latest()["distill/distillation_to_task"][0] >= 0
        storage.iter = 20
        student(inputs())
    (picture,) = storage._vis_data
    assert picture[0] == "distill/spatial masks" and picture[2] == 20
    with torch.no_grad():
        student.head.cls_score.bias.fill_(float("nan"))
    with EventStorage(7), pytest.raises(acam_kd.RunError) as error:
        student(inputs())
    assert error.value.where == "iteration 7" and "loss_cls" in error.value.what


class Every4(torch.optim.SGD):
    """Accumulates, as Detectron2's maintainers advise."""

    calls = 0

    def zero_grad(self, set_to_none=True):
        if self.calls % 4 == 0:
            super().zero_grad(set_to_none)

    def step(self, closure=None):
        self.calls += 1
        if self.calls % 4 == 0:
            super().step(closure)


def test_accumulated_gradients_are_clipped_once(tmp_path):
    """F7: clip(g1 + g2 + g3 + g4), not the sum of clipped sums."""
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)  # its step is hooked from now on
    weight = torch.nn.Linear(2, 1, bias=False)
    weight.weight.data.zero_()
    optimizer = Every4(weight.parameters(), lr=1.0)
    guard_gradients(optimizer, weight, 35.0, every=4)
    for gradient in ([100.0, 0], [0, 100.0], [0, 0], [0, 0]) * 2:
        optimizer.zero_grad()
        (weight.weight * torch.tensor(gradient)).sum().backward()
        optimizer.step()
    side = 2 * 35.0 / 2**0.5
    torch.testing.assert_close(-weight.weight.data, torch.tensor([[side, side]]), rtol=1e-4, atol=1e-3)
    optimizer.zero_grad()
    (weight.weight * float("nan")).sum().backward()
    for _ in range(3):
        optimizer.step()
    with pytest.raises(acam_kd.RunError) as error:
        optimizer.step()
    assert error.value.where == "step 2" and "weight" in error.value.what


@pytest.mark.parametrize(("arguments", "argument"), [((-1.0, 1), "max_gradient_norm"), ((1.0, 0), "every")])
def test_a_guard_that_makes_no_sense_is_refused(arguments, argument):
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError) as error:
        guard_gradients(torch.optim.SGD(model.parameters(), lr=1.0), model, arguments[0], every=arguments[1])
    assert error.value.argument == argument
