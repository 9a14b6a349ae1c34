"""README and docs keep their promises: links lead somewhere, Python runs, commands are understood."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch

import acam_kd
from acam_kd.cli import COMMANDS, _parser
from acam_kd.core import DISTILLER_REGISTRY

from .conftest import MISSING
from .pages import ROOT, anchors, blocks, commands, links, pages

PAGES = pages(ROOT)
COMMAND_LINES = [(page, words) for page in PAGES for words in commands(page)]
needs_detectron2 = pytest.mark.skipif(bool(MISSING), reason="Detectron2 is not installed")


def scripts(program):
    return [
        pytest.param(words, id=f"{page.stem}-{n}") for n, (page, words) in enumerate(COMMAND_LINES) if program in words
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


def test_every_method_is_in_the_table():
    table = (ROOT / "docs/choose_a_method.md").read_text()
    names = {name for name, _ in DISTILLER_REGISTRY} - {"ACAMKD"}
    assert names == set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))


def test_the_number_of_methods_is_true():
    count = len([name for name, cls in DISTILLER_REGISTRY if cls.__module__.startswith("acam_kd.")])
    said = {"Nineteen": 19, "Twenty": 20, "Twenty-one": 21}
    for page in ("README.md", "docs/index.md"):
        (word,) = re.findall(r"\b([\w-]+) methods(?:, one| are)", (ROOT / page).read_text())
        assert said[word] == count, page


@pytest.mark.parametrize("words", scripts("acam-kd"))
def test_commands_are_understood(words):
    args = _parser().parse_args(words[words.index("acam-kd") + 1 :])
    args.command.values(args)


def test_every_subcommand_is_in_some_page():
    shown = {words[words.index("acam-kd") + 1] for _, words in COMMAND_LINES if "acam-kd" in words}
    assert shown >= {command.name for command in COMMANDS}


@needs_detectron2
@pytest.mark.parametrize("words", scripts("train_net.py"))
def test_detectron2s_commands_are_understood(words, monkeypatch):
    from detectron2.config import get_cfg

    from acam_kd.d2.config import add_distillation_config
    from acam_kd.d2.train import parser

    monkeypatch.chdir(ROOT)
    args = parser().parse_args(words[words.index("train_net.py") + 1 :])
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)


def test_other_commands_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for _, words in COMMAND_LINES:
        if words[0] == "make":
            assert words[1] in targets, words
        if words[:2] == ["python", "-m"] and words[2].startswith("benchmarks"):
            assert importlib.util.find_spec(words[2]), words


def execute(page, number, **names):
    block = blocks(ROOT / page, "python")[number]
    exec(compile(block.text, str(block), "exec"), names)
    return names


def test_every_block_of_python_is_run_here_or_in_test_docs():
    counts = {str(page.relative_to(ROOT)): len(blocks(page, "python")) for page in PAGES}
    assert {name: n for name, n in counts.items() if n} == {
        "README.md": 2,
        "docs/camvid.md": 1,
        "docs/detectron2.md": 2,
        "docs/lazyconfig.md": 1,
        "docs/other_teachers.md": 1,
        "docs/own_loops.md": 5,
        "docs/torchvision.md": 1,
        "docs/unlabelled.md": 3,
    }


def test_sixty_seconds_of_python():
    scope = execute("README.md", 0)
    assert {"loss_acam_spatial", "loss_acam_channel"} < scope["losses"].keys()
    assert not hasattr(scope["student"], "distillation")
    assert all(parameter.grad is not None for parameter in scope["student"].head.parameters())


def test_a_method_in_twelve_lines():
    try:
        method = execute("README.md", 1)["Means"]({"p3": 4}, {"p3": 4}, alpha=2.0)
        losses = method({"p3": torch.ones(2, 4, 3, 5)}, {"p3": torch.zeros(2, 4, 3, 5)})
        assert losses["loss_means_square"] == 2.0
        student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, 4)) for _ in range(2))
        levels = {"c2": "0"}
        acam_kd.distill(student, teacher, method="Means", student_levels=levels, teacher_levels=levels)
        student(torch.rand(2, 3, 32, 32))
        assert list(student.distillation.losses) == ["loss_means_square"]
    finally:
        DISTILLER_REGISTRY._obj_map.pop("Means", None)
    code = blocks(ROOT / "README.md", "python")[1].text.splitlines()
    assert len([line for line in code if line.strip()]) <= 12


def test_a_plain_vit_teaches_an_fpn():
    scope = execute("docs/other_teachers.md", 0)
    assert 0 < scope["losses"]["loss_cosine_distance"].item() < 2
    assert scope["student"].distillation.teacher.pixels is not None


def test_a_student_in_plain_torchvision(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.chdir(tmp_path)
    (tmp_path / "output/run").mkdir(parents=True)
    model = torchvision.models.get_model("retinanet_resnet50_fpn", num_classes=4, weights_backbone=None)
    torch.save(model.state_dict(), "output/run/student.pth")
    execute("docs/torchvision.md", 0)


@needs_detectron2
def test_a_lazyconfig():
    assert execute("docs/lazyconfig.md", 0)["model"].method == "PKD"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory, which Detectron2 takes for that of its datasets."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return tmp_path


def my_config(folder):
    base = ROOT / "configs/quick_schedules/acam_instant.yaml"
    (folder / "my_acam.yaml").write_text(f"_BASE_: {base}\n")
    return folder / "my_acam.yaml"


def keep_a_student(config, output):
    """Write the two files of a student that a run leaves, without a run."""
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    from acam_kd.d2 import add_distillation_config
    from acam_kd.d2.config import exported_student_config, student_config

    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(config))
    cfg.MODEL.DEVICE = "cpu"
    output.mkdir(parents=True)
    (output / "student_config.yaml").write_text(exported_student_config(cfg).dump())
    torch.save({"model": build_model(student_config(cfg)).state_dict()}, output / "model_final.pth")


@pytest.mark.slow
@needs_detectron2
def test_a_trainer_of_ones_own(folder):
    from detectron2.engine import DefaultTrainer

    class MyTrainer(DefaultTrainer):
        def train(self):
            self.trained = True

    my_config(folder)
    trainer = execute("docs/detectron2.md", 1, MyTrainer=MyTrainer)["trainer"]
    assert trainer.trained and "distiller" in trainer.checkpointer.checkpointables


@needs_detectron2
def test_the_student_is_out_already(folder):
    keep_a_student(my_config(folder), folder / "output")
    predictor = execute("docs/detectron2.md", 0)["predictor"]
    assert type(predictor.model).__name__ == "RetinaNet"


@needs_detectron2
def test_a_segmentor_is_out_already(folder):
    keep_a_student(ROOT / "configs/camvid/acam.yaml", folder / "output/camvid/acam")
    labels = execute("docs/camvid.md", 0, image=np.zeros((60, 80, 3), np.uint8))["labels"]
    assert labels.shape == (60, 80)
