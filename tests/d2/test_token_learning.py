"""Tokens that a run with Detectron2 learns: on real teachers, once, and without a trace in the training."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import defaults
from detectron2.modeling import build_model
from torch.nn.parallel import DistributedDataParallel

import train_net
from acam_kd.d2 import register_coco_datasets, token_learning
from acam_kd.d2.adapter import D2Adapter, logits_module, pyramid
from acam_kd.data import shapes
from acam_kd.methods.parts import token_runs
from acam_kd.methods.parts.token_files import build_tokens, save_tokens
from acam_kd.methods.parts.token_learning import TokenLearning
from acam_kd.methods.parts.token_runs import TokenFile

from .conftest import ROOT, detector_config, distillation_config, inputs, refused, save_config, save_weights
from .test_segmentation import HEADS, labelled, segmentor

TEACHERS = {
    "retinanet": ("Base-RetinaNet.yaml", []),
    "mask rcnn": ("Base-RCNN-FPN.yaml", ["MODEL.MASK_ON", True]),
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A few images of three classes, as a dataset of Detectron2's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 4, "val": 2})
        folder = shapes.make_shapes(tmp_path_factory.mktemp("drawn"), size=64)
    entry = ["drawn_for_tokens", str(folder / "train.json"), str(folder / "train")]
    register_coco_datasets([entry])
    yield entry
    DatasetCatalog.remove(entry[0])
    MetadataCatalog.remove(entry[0])


def pair(teacher, drawn, tmp_path, *opts):
    """A RetinaNet student and a teacher of a kind, with the drawn images."""
    base, own = TEACHERS[teacher]
    number = str(len(shapes.CLASSES))
    classes = ["MODEL.RETINANET.NUM_CLASSES", number, "MODEL.ROI_HEADS.NUM_CLASSES", number]
    # An untrained network makes large numbers of whole grey levels, at which all masks are 0 or 1.
    config = detector_config(base, *own, *classes, "INPUT.FORMAT", "RGB", "MODEL.PIXEL_STD", "[1e4, 1e4, 1e4]")
    path = save_config(config, tmp_path / "t.yaml")
    weights = save_weights(config, tmp_path / "t.pth")
    data = ["DATASETS.TRAIN", (drawn[0],), "SOLVER.IMS_PER_BATCH", 2, "SEED", 3]
    student = detector_config("Base-RetinaNet.yaml", *classes)
    return distillation_config(student, path, *data, "DISTILL.INHERIT", "never", *opts, weights=weights)


@pytest.fixture
def watched(monkeypatch):
    """Record the teacher and the tokens before learning changes anything."""
    seen = {}

    def keep(learning, batches, **named):
        seen["start"] = copy.deepcopy(learning.state_dict())
        seen["teacher"] = learning.teacher
        seen["before"] = copy.deepcopy(learning.teacher.state_dict())
        seen["tokens"] = learning.tokens
        return original(learning, batches, **named)

    original = token_runs.learn_tokens
    monkeypatch.setattr(token_runs, "learn_tokens", keep)
    return seen


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("method", ["MasKD", "FreeKD"])
def test_tokens_are_learnt_and_used(teacher, method, drawn, tmp_path, watched, storage):
    cfg = pair(teacher, drawn, tmp_path)
    path = str(tmp_path / "tokens.pth")
    (logged,) = token_learning.learn(cfg, TokenFile(path, method, num_tokens=3, iterations=3))
    assert {"loss_tokens_diversity"} < set(logged) and all(value >= 0 for value in logged.values())
    assert all(torch.equal(v, watched["before"][k]) for k, v in watched["teacher"].state_dict().items())
    learnt = watched["tokens"]
    for name, value in learnt.state_dict().items():
        assert not torch.equal(value, watched["start"][f"tokens.{name}"]), name
    node = f"DISTILL.{method.upper()}"
    cfg.merge_from_list(["DISTILL.METHOD", method, f"{node}.NUM_TOKENS", 3, f"{node}.TOKENS", path])
    model = build_model(cfg).train()
    assert model.distillation.method.warnings() == {} and len(model.distillation.levels) >= 3
    for own, other in model.distillation.levels.items():
        assert torch.equal(model.distillation.method.tokens[own].tokens, learnt[other].tokens)
    losses = model(inputs())
    sum(losses.values()).backward()
    assert any(name.startswith(f"loss_{method.lower()}") for name in losses)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_teacher_gets_its_own_order_of_channels(drawn, tmp_path):
    cfg = pair("mask rcnn", drawn, tmp_path)
    _, teacher_cfg = token_learning.build_teacher(cfg)
    data = token_learning._data_config(cfg, teacher_cfg)
    assert data.INPUT.FORMAT == "RGB" != cfg.INPUT.FORMAT and data.MODEL.MASK_ON and not cfg.MODEL.MASK_ON
    assert data.INPUT.MIN_SIZE_TRAIN == cfg.INPUT.MIN_SIZE_TRAIN and data.SOLVER.IMS_PER_BATCH == 2


def test_faults_are_named(drawn, tmp_path):
    cfg = pair("retinanet", drawn, tmp_path)
    wanted = TokenFile(str(tmp_path / "tokens.pth"), "MasKD", iterations=1)
    cfg.DATASETS.TRAIN = ("nowhere",)
    with refused("DATASETS.TRAIN", "nowhere", "a registered dataset"):
        token_learning.learn(cfg, wanted)
    cfg.DATASETS.TRAIN = (drawn[0],)
    cfg.DISTILL.TEACHER.OPTS = ["MODEL.RETINANET.NUM_CLASSES", "9"]
    cfg.DISTILL.TEACHER.WEIGHTS = "random"
    with refused("MODEL.RETINANET.NUM_CLASSES", "9", f"{len(shapes.CLASSES)}, the classes of dataset {drawn[0]}"):
        token_learning.learn(cfg, wanted)
    assert not (tmp_path / "tokens.pth").exists()


def test_untrained_tokens_and_other_teachers_are_noticed(drawn, tmp_path):
    cfg = pair("retinanet", drawn, tmp_path, "DISTILL.METHOD", "MasKD")
    model = build_model(cfg)
    assert "untrained" in model.distillation.method.warnings()["tokens"]
    tokens = {f"p{n}": model.distillation.method.tokens[f"p{n}"] for n in (3, 4, 5)}
    path = str(tmp_path / "some.pth")
    save_tokens(path, "MasKD", tokens, {k: pyramid(model, ["backbone"])[k] for k in tokens})
    cfg.DISTILL.MASKD.TOKENS = path
    both = "none, or several, for p6 .stride 64, 16 channels.: its tokens are for p3 "
    with refused("MasKD.tokens", both, "exactly one", "set {tokens}"):
        build_model(cfg)


@pytest.mark.parametrize("head", HEADS)
def test_tokens_of_a_segmentor_are_for_its_logits(head, tmp_path, storage):
    teacher = build_model(segmentor(head))
    levels = pyramid(teacher, ["logits"])
    tokens = build_tokens("MasKD", levels)
    learning = TokenLearning(teacher, tokens, logits=logits_module(teacher))
    losses = learning(labelled(1))
    assert set(losses) == {"loss_sem_seg", "loss_tokens_diversity"}
    losses["loss_sem_seg"].backward()
    assert tokens["logits"].tokens.shape == (8, 5) and tokens["logits"].tokens.grad.abs().sum() > 0
    path = str(tmp_path / "tokens.pth")
    save_tokens(path, "MasKD", tokens, levels)
    cfg = distillation_config(segmentor(), save_config(segmentor(head), tmp_path / "t.yaml"))
    cfg.merge_from_list(["DISTILL.METHOD", "MasKD", "DISTILL.MASKD.TOKENS", path])
    model = build_model(cfg).train()
    assert model(labelled())["loss_maskd_feature"].requires_grad and model.distillation.levels == {"logits": "logits"}


def test_a_method_without_levels_to_read_is_named():
    adapter = D2Adapter(build_model(segmentor()))
    with refused("method", "FreeKD", "one for logits", "FreeKD distils backbone; see {taps}"):
        token_runs._levels(adapter, "FreeKD", ["logits"])
    assert set(token_runs._levels(adapter, "FreeKD", [])) == {"p2", "p3", "p4", "p5", "p6"}


# Whole runs of train_net.py


@pytest.fixture
def command(drawn, tmp_path):
    """Makes the command line of a run of two steps."""
    cfg = pair("retinanet", drawn, tmp_path, "DATASETS.TEST", (), "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (),
               "SOLVER.BASE_LR", 1e-4, "SOLVER.CHECKPOINT_PERIOD", 1, "DISTILL.METHOD", "MasKD",
               "DISTILL.MASKD.TOKEN_ITERATIONS", 2, "DISTILL.MASKD.NUM_TOKENS", 2)  # fmt: skip
    path = save_config(cfg, tmp_path / "run.yaml")
    return lambda out, *opts, flags=(): ["--config-file", path, *flags, "OUTPUT_DIR", str(out), *map(str, opts)]


def run(arguments):
    train_net.main(train_net.parser().parse_args(arguments))


def checkpoint(folder):
    return torch.load(folder / "model_final.pth", weights_only=False)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(torch.as_tensor(v), torch.as_tensor(b[k])) for k, v in a.items())


def levels_of(path):
    return torch.load(path, weights_only=True)["levels"]


def fresh(*arguments):
    """Run train_net.py in a process of its own, where no TorchScript was called before."""
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]\nfrom tests.d2.test_token_learning import *\n"
    code += f"register_coco_datasets([{arguments[0]!r}]); run({arguments[1]!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_learnt_and_given_tokens_give_the_same_run_bit_for_bit(command, drawn, tmp_path):
    """Detectron2's focal loss is TorchScript, whose rounding depends on the calls before."""
    path = tmp_path / "own" / "tokens_maskd.pth"
    done = fresh(drawn, command(tmp_path / "own"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("learning the tokens of MasKD in 2 steps") == 1 and "step 2/2  loss" in done.stdout
    done = fresh(drawn, command(tmp_path / "given", "DISTILL.MASKD.TOKENS", path))
    assert done.returncode == 0 and "learning" not in done.stdout, done.stderr[-3000:]
    own, given = checkpoint(tmp_path / "own"), checkpoint(tmp_path / "given")
    assert same(own["model"], given["model"]) and same(own["distiller"], given["distiller"])
    learnt = levels_of(path)["p3"]["state"]["tokens"]
    assert any(torch.equal(value, learnt) for value in own["distiller"].values())


@pytest.mark.slow
def test_a_resumed_run_reads_them_and_another_teacher_is_refused(command, tmp_path, monkeypatch):
    learnt = []
    original = token_learning.learn
    monkeypatch.setattr(token_learning, "learn", lambda cfg, wanted: learnt.append(wanted) or original(cfg, wanted))
    run(command(tmp_path / "run"))
    run(command(tmp_path / "run", "SOLVER.MAX_ITER", 3, flags=["--resume"]))
    assert [wanted.path for wanted in learnt] == [str(tmp_path / "run" / "tokens_maskd.pth")]
    assert checkpoint(tmp_path / "run")["iteration"] == 2
    with pytest.raises(SystemExit) as error:
        run(command(tmp_path / "run", "DISTILL.TEACHER.WEIGHTS", "random"))
    assert str(error.value).startswith("train_net.py: DISTILL.MASKD.TOKENS: found ")
    assert str(error.value).endswith(
        "tokens_maskd.pth, learnt on a teacher with other weights, expected tokens of this teacher; delete the file, or "
        "set DISTILL.MASKD.TOKENS to another one"
    )
    with pytest.raises(SystemExit, match="^train_net.py: DISTILL.MASKD.TOKEN_ITERATIONS: found 0, expected >= 1$"):
        run(command(tmp_path / "other", "DISTILL.MASKD.TOKEN_ITERATIONS", 0))
    with pytest.raises(SystemExit, match="^train_net.py: DISTILL.TEACHER.WEIGHTS: found no file "):
        run(command(tmp_path / "run", "DISTILL.TEACHER.WEIGHTS", tmp_path / "gone.pth"))


@pytest.mark.slow
def test_the_first_of_two_processes_learns_while_the_other_polls(command, drawn, tmp_path):
    """Over gloo, where every collective call gives up long before the tokens are learnt."""
    script = tmp_path / "two.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from datetime import timedelta\nfrom detectron2.engine import launch\n"
        "from tests.d2.test_token_learning import worker\n"
        "if __name__ == '__main__':\n"
        f"    arguments = {command(tmp_path / 'run')!r}, {drawn!r}\n"
        "    launch(worker, 2, dist_url='auto', timeout=timedelta(seconds=20), args=arguments)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert output.count("learning the tokens of MasKD in 2 steps") == 1
    assert (tmp_path / "run/model_final.pth").is_file() and not list(tmp_path.rglob("*.lock"))
    alone = TokenFile(str(tmp_path / "alone.pth"), "MasKD", num_tokens=2, iterations=2)
    token_learning.learn(train_net.setup(train_net.parser().parse_args(command(tmp_path / "x"))), alone)
    here, there = levels_of(alone.path), levels_of(tmp_path / "run/tokens_maskd.pth")
    for level, entry in here.items():  # this process has run scripts before, which round otherwise then
        for name, value in entry["state"].items():
            assert (value - there[level]["state"][name]).norm() <= 0.01 * value.norm(), (level, name)


def worker(arguments, drawn):
    """Train in one of two processes, where learning takes longer than the process group waits."""
    defaults.create_ddp_model = lambda model, **kwargs: DistributedDataParallel(model, **kwargs)  # it asks for a GPU
    learn = token_learning.learn
    token_learning.learn = lambda cfg, wanted: time.sleep(25) or learn(cfg, wanted)
    register_coco_datasets([drawn])
    run(arguments)
