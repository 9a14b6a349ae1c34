"""train_net.py as a user runs it: training, resuming, evaluating, several processes, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer, HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm

import train_net
from acam_kd.d2 import (
    add_distillation_config,
    checkpoint_distiller,
    guard_gradients,
    register_coco_datasets,
    student_config,
)
from acam_kd.d2.teacher_check import check_teacher
from acam_kd.d2.trunk import _torchvision
from acam_kd.data import shapes
from acam_kd.lock import Lock

from .conftest import ROOT, broken, detector_config, distillation_config, inputs, save_config, save_weights

OWN = ["own_train", "own_val"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """An own dataset: six images of shapes."""
    patch = pytest.MonkeyPatch()
    patch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})
    folder = shapes.make_shapes(tmp_path_factory.mktemp("data"), size=64)
    patch.undo()
    return folder


@pytest.fixture(autouse=True)
def forget_datasets():
    yield
    for name in OWN:
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def arguments(data, tmp_path):
    """Makes the command line of a tiny run; more KEY VALUE pairs as arguments."""
    save_config(detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6), tmp_path / "teacher.yaml")
    student = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6)
    cfg = distillation_config(
        student, "teacher.yaml", "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)",
        "SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "(3,)", "SOLVER.BASE_LR", 0.001,
        "SOLVER.CHECKPOINT_PERIOD", 2, "DISTILL.LOG_PERIOD", 2, "SEED", 3,
    )  # fmt: skip
    path = save_config(cfg, tmp_path / "run.yaml")
    return lambda *opts, flags=(): [
        "--config-file", path, "--dataset", "own_train", str(data / "train.json"), str(data / "train"),
        "--dataset", "own_val", str(data / "val.json"), str(data / "val"), *flags, *map(str, opts),
    ]  # fmt: skip


def run(command):
    return train_net.main(train_net.parser().parse_args(command))


def test_a_folder_in_which_a_run_trains_is_refused_and_left_as_it_is(arguments, tmp_path):
    """An evaluation may look into it all the same."""
    out = tmp_path / "out"
    with Lock(out):
        with pytest.raises(SystemExit) as error:
            run(arguments("OUTPUT_DIR", out))
        assert str(error.value).startswith(f"train_net.py: OUTPUT_DIR: found {out}, in which another run is at work (")
        assert str(error.value).endswith("wait for that run, end it, or choose another OUTPUT_DIR")
        assert os.listdir(out) == ["run.lock"]
        run(arguments("OUTPUT_DIR", out, flags=["--eval-only"]))
        assert (out / "run.lock").is_file()
    run(arguments("OUTPUT_DIR", out, "SOLVER.MAX_ITER", 1))
    assert (out / "model_final.pth").is_file() and not (out / "run.lock").exists()


class FixedOrder:
    """The same batch, and the same random numbers, at the same iteration, whenever the run was started."""

    def __init__(self, trainer):
        self.trainer = trainer

    def __iter__(self):
        while True:
            torch.manual_seed(self.trainer.iter)
            batch = inputs()
            for x in batch:
                x["image"] = (x["image"] + self.trainer.iter).to(torch.uint8)
            yield batch


def train(command, until=None):
    args = train_net.parser().parse_args(command)
    cfg = train_net.setup(args)
    trainer = train_net.Trainer(cfg)
    trainer._trainer.data_loader = FixedOrder(trainer)
    trainer.resume_or_load(resume=args.resume)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    if until is None:
        trainer.train()
    else:
        trainer.register_hooks([Kill(until)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


class Kill(HookBase):
    """Ends a run after so many iterations."""

    def __init__(self, iterations):
        self.iterations = iterations

    def after_step(self):
        if self.trainer.iter + 1 == self.iterations:
            raise KeyboardInterrupt


CHEAPER = ["DISTILL.PERIOD", 3, "DISTILL.CHANNELS_LAST", True, "DISTILL.TEACHER.PRECISION", "bfloat16"]


@pytest.mark.slow
@pytest.mark.parametrize("opts", [[], CHEAPER], ids=["default", "cheaper"])
def test_two_and_two_iterations_equal_four(arguments, tmp_path, opts):
    whole = train(arguments("OUTPUT_DIR", tmp_path / "whole", *opts))
    train(arguments("OUTPUT_DIR", tmp_path / "parts", *opts), until=2)
    parts = train(arguments("OUTPUT_DIR", tmp_path / "parts", *opts, flags=["--resume"]))
    assert parts.start_iter == 2
    names = dict(whole.model.named_parameters())
    assert any(name.startswith("distillation.method.fusion") for name in names)
    for name, value in parts.model.named_parameters():
        assert torch.equal(value, names[name]), name
    buffers = dict(whole.model.named_buffers())
    assert all(torch.equal(v, buffers[k]) for k, v in parts.model.named_buffers())
    a, b = (torch.load(tmp_path / x / "model_final.pth", weights_only=False) for x in ("whole", "parts"))
    assert all(torch.equal(v, b["distiller"][k]) for k, v in a["distiller"].items())
    momenta = [s["momentum_buffer"] for s in a["trainer"]["_trainer"]["optimizer"]["state"].values()]
    others = [s["momentum_buffer"] for s in b["trainer"]["_trainer"]["optimizer"]["state"].values()]
    assert all(torch.equal(x, y) for x, y in zip(momenta, others))


def test_a_classifiers_file_starts_the_trunk_and_is_not_read_again_on_resuming(arguments, tmp_path):
    opts = ("MODEL.RESNETS.STRIDE_IN_1X1", False, "OUTPUT_DIR", tmp_path / "run", "MODEL.WEIGHTS", tmp_path / "w.pth")
    command = arguments(*opts)
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    trainer = train_net.Trainer(train_net.setup(train_net.parser().parse_args(command)))
    trunk = trainer.checkpointer.model.backbone.bottom_up
    wanted = {name: torch.rand_like(value.float()) for name, value in trunk.state_dict().items()}
    torch.save({_torchvision(name): value for name, value in wanted.items()}, tmp_path / "w.pth")
    trainer.resume_or_load(resume=False)
    turned = {"stem.conv1.weight": wanted["stem.conv1.weight"].flip(1)}  # the config takes BGR
    state = trunk.state_dict()
    assert all(torch.equal(state[n], x) for n, x in {**wanted, **turned}.items() if "num_batches" not in n)
    trainer.checkpointer.save("model_0000000")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    resumed = train_net.Trainer(train_net.setup(train_net.parser().parse_args(arguments(*opts, flags=["--resume"]))))
    resumed.resume_or_load(resume=True)
    state = resumed.checkpointer.model.backbone.bottom_up.state_dict()
    assert torch.equal(state["res5.0.conv1.weight"], wanted["res5.0.conv1.weight"])
    with pytest.raises(SystemExit, match=r"MODEL.WEIGHTS: found .*w.pth, by name with 0 of the model's \d+ tensors"):
        run(arguments(*opts[:2], "OUTPUT_DIR", tmp_path / "other", *opts[4:]))


def test_every_checkpoint_is_the_plain_student(arguments, tmp_path):
    """Also that of a killed run; under the student's own config, as train_net wrote it, in stock Detectron2."""
    train(arguments("OUTPUT_DIR", tmp_path / "run"), until=2)
    stock = get_cfg()
    stock.merge_from_file(str(tmp_path / "run" / "student_config.yaml"))
    checkpoint = torch.load(tmp_path / "run" / "model_0000001.pth", weights_only=False)
    missing, unexpected = build_model(stock).load_state_dict(checkpoint["model"], strict=False)
    assert missing == [] and unexpected == []
    assert not [k for part in ("model", "distiller") for k in checkpoint[part] if "teacher" in k]


@pytest.mark.slow
def test_train_then_evaluate_without_a_teacher(arguments, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(arguments("OUTPUT_DIR", out))
    os.remove(tmp_path / "teacher.yaml")
    evaluated = []
    test = train_net.Trainer.test
    monkeypatch.setattr(train_net.Trainer, "test", lambda cfg, model: evaluated.append(model) or test(cfg, model))
    command = arguments("OUTPUT_DIR", out, "MODEL.WEIGHTS", out / "model_final.pth", flags=["--eval-only"])
    del command[2:6]  # nor the training set
    again = run(command)
    saved = torch.load(out / "model_final.pth", weights_only=False)["model"]
    assert all(torch.equal(v, saved[k]) for k, v in evaluated[0].state_dict().items())
    logged = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert logged[-1]["bbox/AP"] == pytest.approx(again["bbox"]["AP"], nan_ok=True)
    assert any("distill/p3/spatial_dice" in line and "loss_acam_spatial" in line for line in logged)
    assert [f for f in os.listdir(out) if f.startswith("events.out.tfevents")]


@pytest.mark.slow
def test_a_stock_trainer_in_somebody_elses_code(arguments, data, tmp_path):
    """The README's lines, without train_net.py."""
    config = arguments()[1]
    register_coco_datasets([["own_train", str(data / "train.json"), str(data / "train")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(config)
    cfg.DATASETS.TEST, cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER, cfg.OUTPUT_DIR = (), (), 2, str(tmp_path / "run")
    for resume in (False, True):
        cfg.SOLVER.MAX_ITER += 1
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        trainer = DefaultTrainer(cfg)
        checkpoint_distiller(trainer)
        guard_gradients(trainer.optimizer, trainer.model, max_norm=35.0)
        trainer.resume_or_load(resume=resume)
        trainer.train()
    assert trainer.start_iter == 3
    saved = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    assert all(torch.equal(v, saved["distiller"][k]) for k, v in trainer.model.distillation.state_dict().items())
    student = student_config(cfg)
    student.MODEL.WEIGHTS = str(tmp_path / "run/model_final.pth")
    assert "instances" in DefaultPredictor(student)(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.slow
def test_test_time_augmentation(arguments, rcnn, tmp_path):
    student = rcnn.clone()
    student.MODEL.ROI_HEADS.NUM_CLASSES = 6
    teacher = save_config(student, tmp_path / "t.yaml")
    path = save_config(distillation_config(student, teacher), tmp_path / "run.yaml")
    command = arguments(
        "OUTPUT_DIR",
        tmp_path / "run",
        "TEST.AUG.ENABLED",
        True,
        "TEST.AUG.MIN_SIZES",
        "(64,)",
        "SOLVER.MAX_ITER",
        1,
        "SOLVER.STEPS",
        "()",
    )
    command[1] = path
    command += ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "('own_val',)", "SOLVER.IMS_PER_BATCH", "2"]
    run(command)
    results = run([*command[:2], "--eval-only", *command[2:], "MODEL.WEIGHTS", str(tmp_path / "run/model_final.pth")])
    assert "bbox_TTA" in results and "bbox" in results


def test_gradients_are_clipped_over_the_whole_model(arguments, tmp_path):
    trainer = train(arguments("OUTPUT_DIR", tmp_path / "a", "DISTILL.MAX_GRADIENT_NORM", 1e-3), until=1)
    grads = [p.grad for p in trainer.model.parameters()]
    assert torch.stack(torch._foreach_norm(grads)).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_gradient_that_is_not_finite_stops_before_the_step(arguments, tmp_path):
    args = train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / "a"))
    trainer = train_net.Trainer(train_net.setup(args))
    weight = trainer.model.head.cls_score.weight
    before = weight.clone()
    trainer._trainer.data_loader = FixedOrder(trainer)
    weight.register_hook(lambda grad: grad * float("nan"))
    with broken("the gradient is not finite in head.cls_score.weight", "iteration 0"):
        trainer.train()
    assert torch.equal(weight, before) and not (tmp_path / "a" / "last_checkpoint").exists()


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(arguments, tmp_path):
    out = tmp_path / "a"
    train(arguments("OUTPUT_DIR", out), until=2)
    saved = (out / "model_0000001.pth").read_bytes()
    args = train_net.parser().parse_args(arguments("OUTPUT_DIR", out, flags=["--resume"]))
    trainer = train_net.Trainer(train_net.setup(args))
    trainer.resume_or_load(resume=True)
    with torch.no_grad():
        next(trainer.model.distillation.teacher.network.fpn_output3.parameters()).fill_(float("nan"))
    with broken("loss_acam_spatial = nan.*p3/", "iteration 2"):
        trainer.train()
    assert (out / "model_0000001.pth").read_bytes() == saved
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["DISTILL.METHOD", "DK"], "DISTILL.METHOD: found DK, expected one of ACAMKD, "),
        (["DISTILL.LEVELS", "['p2']"], "DISTILL.LEVELS: found p2, expected levels of the student: p3, "),
        (["DISTILL.TEACHER.CONFIG_FILE", "gone.yaml"], "DISTILL.TEACHER.CONFIG_FILE: found no file "),
        (["DISTILL.TEACHER.WEIGHTS", "gone.pth"], "DISTILL.TEACHER.WEIGHTS: found no file "),
        (
            ["MODEL.RETINANET.NUM_CLASSES", 5],
            "MODEL.RETINANET.NUM_CLASSES: found 5, expected 6, the classes of dataset own_train: plain disc, barred disc, "
            "plain square, barred square, plain triangle, ...",
        ),
        (["DATASETS.TRAIN", "('nowhere',)"], "DATASETS.TRAIN: found nowhere, expected a registered dataset"),
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS: found no file "),
        (
            ["TEST.AUG.ENABLED", True],
            "TEST.AUG.ENABLED: found True, expected False: Detectron2 has no test-time augmentation for RetinaNet",
        ),
        (["DISTILL.MAX_GRADIENT_NORM", -1.0], "DISTILL.MAX_GRADIENT_NORM: found -1.0, expected >= 0"),
        (["DISTILL.PERIOD", 0], "DISTILL.PERIOD: found 0, expected >= 1"),
        (["DISTILL.TEACHER.PRECISION", "half"], "DISTILL.TEACHER.PRECISION: found half, expected one of float32, "),
        (["DISTILL.ACAMKD.ALPHA", "much"], "DISTILL.ACAMKD.ALPHA: found 'much', expected float, as 1.0"),
        (["DISTILL.NOPE", 1], "NOPE"),
    ],
)
def test_bad_input_is_one_line(arguments, tmp_path, opts, message):
    with pytest.raises(SystemExit) as stop:
        run(arguments("OUTPUT_DIR", tmp_path / "run", *opts))
    assert str(stop.value).startswith("train_net.py: ") and message in str(stop.value)
    assert "\n" not in str(stop.value) and "{" not in str(stop.value)


def test_a_mistake_in_our_code_keeps_its_traceback(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train_net.Trainer, "__init__", lambda self, cfg: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        run(arguments("OUTPUT_DIR", tmp_path / "run"))


def worker(command, out):
    """One of two processes: DDP on CPU, where Detectron2 would ask for a GPU's index."""
    from detectron2.engine import defaults
    from torch.nn.parallel import DistributedDataParallel

    defaults.create_ddp_model = lambda model, **kwargs: DistributedDataParallel(model, **kwargs)
    trainer = train_net.Trainer(train_net.setup(train_net.parser().parse_args(command)))
    trainer.resume_or_load(resume=False)
    trainer._hooks = [h for h in trainer._hooks if type(h).__name__ != "EvalHook"]
    trainer.train()
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    both = comm.all_gather(flat)
    if comm.is_main_process():
        torch.save([torch.equal(both[0], both[1]), comm.get_world_size()], out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "opts", [[], CHEAPER, ["DISTILL.TEACHER.COMPILE", True]], ids=["default", "cheaper", "compile"]
)
def test_two_processes_stay_in_step(arguments, tmp_path, opts):
    """DistributedDataParallel without find_unused_parameters, over gloo."""
    command = arguments("OUTPUT_DIR", tmp_path / "run", *opts)
    code = (
        "import torch\nfrom functools import partial\ntorch.compile = partial(torch.compile, backend='eager')\n"
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from detectron2.engine import launch\nfrom tests.d2.test_train import worker\n"
        f"launch(worker, 2, dist_url='auto', args=({command!r}, {str(tmp_path / 'out')!r}))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    script = tmp_path / "two.py"
    script.write_text(code.replace("\nlaunch(", "\nif __name__ == '__main__':\n    launch("))
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "strides" not in done.stderr  # DistributedDataParallel's warning that gradients and buckets differ
    assert torch.load(tmp_path / "out") == [True, 2]
    checkpoint = torch.load(tmp_path / "run/model_final.pth", weights_only=False)
    assert not [k for k in (*checkpoint["model"], *checkpoint["distiller"]) if k.startswith("module.")]


@pytest.mark.slow
def test_the_instant_config_as_a_command(tmp_path):
    """The README's first command: from nothing to a COCO table."""
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path / "datasets")}
    command = [sys.executable, "train_net.py", "--config-file", "configs/quick_schedules/acam_instant.yaml"]
    done = subprocess.run(
        [*command, "OUTPUT_DIR", str(tmp_path / "out")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copypaste: AP,AP50,AP75,APs,APm,APl" in done.stdout + done.stderr


def test_help_names_the_dataset_option(capsys):
    with pytest.raises(SystemExit):
        train_net.parser().parse_args(["--help"])
    assert "NAME JSON IMAGES" in capsys.readouterr().out


@pytest.mark.slow
def test_a_checkpoint_of_version_0_1_resumes(arguments, tmp_path):
    """Its entry ``distiller`` is the method's plain state, without the method's name."""
    whole = train(arguments("OUTPUT_DIR", tmp_path / "whole"))
    train(arguments("OUTPUT_DIR", tmp_path / "old"), until=2)
    path = tmp_path / "old" / "model_0000001.pth"
    checkpoint = torch.load(path, weights_only=False)
    assert checkpoint["distiller"]._metadata[""]["method"] == "ACAMKD"
    checkpoint["distiller"] = dict(checkpoint["distiller"])
    torch.save(checkpoint, path)
    old = train(arguments("OUTPUT_DIR", tmp_path / "old", flags=["--resume"]))
    names = dict(whole.model.named_parameters())
    assert all(torch.equal(value, names[name]) for name, value in old.model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "what"), [("MGD", "of ACAMKD, this run of MGD"), ("", "other parameters")])
def test_a_run_whose_method_changed_says_so_in_one_line(arguments, tmp_path, method, what):
    train(arguments("OUTPUT_DIR", tmp_path / "run"), until=2)
    with pytest.raises(SystemExit) as error:
        run(arguments("OUTPUT_DIR", tmp_path / "run", "DISTILL.METHOD", method, "DISTILL.INHERIT", "never",
                      flags=["--resume"]))  # fmt: skip
    assert what in str(error.value) and "DISTILL.METHOD" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_a_last_checkpoint_that_is_gone_is_one_line(arguments, tmp_path):
    train(arguments("OUTPUT_DIR", tmp_path / "run"), until=2)
    (tmp_path / "run" / "model_0000001.pth").unlink()
    with pytest.raises(SystemExit, match="the checkpoint that last_checkpoint names is gone"):
        run(arguments("OUTPUT_DIR", tmp_path / "run", flags=["--resume"]))


@pytest.mark.slow
def test_a_coco_teacher_of_a_student_of_own_classes(arguments, tmp_path, capsys):
    """The names of an own dataset are known before its json is loaded."""
    of_coco = ["MODEL.RETINANET.NUM_CLASSES", 80, "DATASETS.TRAIN", ("coco_2017_train",)]
    save_config(detector_config("Base-RetinaNet.yaml", *of_coco), tmp_path / "teacher.yaml")
    pairs = "['plain disc=sports ball', 'barred disc=clock']"
    opts = ["OUTPUT_DIR", tmp_path / "out", "DISTILL.METHOD", "KD", "DISTILL.CLASS_MAP", pairs]
    run(arguments(*opts))
    (line,) = [text for text in capsys.readouterr().out.splitlines() if "classes: 2 of" in text]
    start = "classes: 2 of the student's 6 are among the teacher's 80: plain disc (sports ball), barred disc (clock); "
    assert (start + "left out, as the teacher does not know them: plain square, ") in line
    logged = [json.loads(text) for text in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert any(values.get("loss_kd_kl", 0) > 0 for values in logged) and (tmp_path / "out/model_final.pth").is_file()


@pytest.fixture
def known_teacher(arguments, tmp_path):
    """The weights of a teacher, which a run does not have to be able to learn from."""
    cfg = detector_config("Base-RetinaNet.yaml", "MODEL.RETINANET.NUM_CLASSES", 6, "MODEL.WEIGHTS", "")
    return save_weights(cfg, tmp_path / "teacher.pth")


@pytest.mark.slow
def test_the_teacher_is_measured_before_the_first_iteration(arguments, known_teacher, tmp_path):
    def said(run, *opts, flags=()):
        before = (tmp_path / run / "log.txt").read_text() if (tmp_path / run / "log.txt").is_file() else ""
        train_net.main(train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / run, *opts, flags=flags)))
        forget()
        lines = (tmp_path / run / "log.txt").read_text().removeprefix(before).splitlines()
        found = [n for n, line in enumerate(lines) if ": the teacher's AP on 3 of 3 images of own_val: " in line]
        start = next(n for n, line in enumerate(lines) if "Starting training" in line)
        assert all(n < start for n in found)
        return len(found)

    weights = ["DISTILL.TEACHER.WEIGHTS", known_teacher]
    assert said("run", *weights, "SOLVER.MAX_ITER", 1) == 1
    assert said("run", *weights, "SOLVER.MAX_ITER", 2, flags=["--resume"]) == 0
    assert said("random", "SOLVER.MAX_ITER", 1) == 0


def test_the_teacher_is_measured_where_it_knows_the_classes(data, known_teacher, tmp_path, arguments):
    """Its number is that of the evaluation of the same weights as a student."""
    register_coco_datasets([["own_val", str(data / "val.json"), str(data / "val")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(arguments()[1])
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", known_teacher, "OUTPUT_DIR", str(tmp_path)])
    found = check_teacher(cfg)
    assert found is not None and found >= 0
    other = cfg.clone()
    other.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASSES", "6"]
    assert check_teacher(other) == found
    for key, value in (("CHECK", False), ("WEIGHTS", "random")):
        other = cfg.clone()
        other.DISTILL.TEACHER[key] = value
        assert check_teacher(other) is None
    other = cfg.clone()
    other.MODEL.META_ARCHITECTURE, other.DISTILL.TEACHER.CONFIG_FILE = "RetinaNet", ""
    assert check_teacher(other) is None
    for kind, classes in (("coco", 2), ("lvis", 6)):
        MetadataCatalog.remove("own_val")
        MetadataCatalog.get("own_val").set(evaluator_type=kind, thing_classes=[*"abcdef"[:classes]])
        assert check_teacher(cfg) is None


def test_a_poor_teacher_is_a_warning(known_teacher, data, arguments, tmp_path, monkeypatch, caplog):
    register_coco_datasets([["own_val", str(data / "val.json"), str(data / "val")]])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(arguments()[1])
    cfg.merge_from_list(["DISTILL.TEACHER.WEIGHTS", known_teacher])
    for poor, warned in ((101.0, 1), (-1.0, 0)):
        caplog.clear()
        monkeypatch.setattr("acam_kd.d2.teacher_check.POOR", poor)
        check_teacher(cfg)
        said = [r for r in caplog.records if r.levelname == "WARNING" and "INPUT.FORMAT belong" in r.getMessage()]
        assert len(said) == warned


def test_measuring_the_teacher_moves_nothing(arguments, known_teacher, tmp_path):
    states = []
    for check in (True, False):
        out = tmp_path / str(check)
        run(arguments("OUTPUT_DIR", out, "DISTILL.TEACHER.WEIGHTS", known_teacher, "DISTILL.TEACHER.CHECK", check,
                      "SOLVER.MAX_ITER", 1))  # fmt: skip
        states.append(torch.load(out / "model_final.pth", weights_only=False)["model"])
        forget()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def forget():
    for name in OWN:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
