"""Config files are read as Detectron2 reads them, and no code in them is run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import detectron2
import numpy as np
import pytest
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from torch import nn

from acam_kd.core import ConfigError, RunError
from acam_kd.d2 import add_distillation_config
from acam_kd.d2.arithmetic import evaluated
from acam_kd.d2.config_files import merge_safely, read_config
from acam_kd.d2.runs import load_run
from acam_kd.d2.teacher import build_teacher
from acam_kd.d2.weights_file import check_pickle, read_safely

from .conftest import ROOT, distillation_config, refused

ZOO = Path(detectron2.__file__).parent.parent / "configs"
"""Detectron2's own configs, where it is installed from its source."""


@pytest.mark.parametrize("folder", [ZOO, ROOT / "configs"], ids=["the zoo", "ours"])
def test_all_configs_are_read_as_detectron2_reads_them(folder):
    files = [path for path in sorted(folder.rglob("*.yaml")) if "compare" not in path.parts]
    if folder is ZOO and not files:
        pytest.skip("Detectron2 is installed without its configs")
    for path in files:
        expected = CfgNode(CfgNode.load_yaml_with_base(str(path), allow_unsafe=True))
        read = CfgNode(read_config(str(path)))
        assert read == expected and read.dump() == expected.dump(), path
        if folder is ZOO:
            whole, safe = get_cfg(), get_cfg()
            try:
                whole.merge_from_file(str(path))
            except KeyError:  # of a project whose keys are not here
                continue
            merge_safely(safe, str(path))
            assert safe == whole, path
    assert len(files) > (90 if folder is ZOO else 20)


def test_a_dumped_node_and_tuples(tmp_path):
    content = {"MODEL": {"ANCHORS": (32, (64.0, "x")), "NAME": "a"}, "LIST": [1, None, True]}
    path = tmp_path / "dumped.yaml"
    path.write_text(yaml.dump(CfgNode(content)))
    assert "python/object/new:detectron2.config.config.CfgNode" in path.read_text()
    assert read_config(str(path)) == content
    path.write_text("!!python/object:yacs.config.CfgNode\nMODEL: !!python/object:fvcore.common.config.CfgNode {A: 1}\n")
    assert read_config(str(path)) == {"MODEL": {"A": 1}}


def test_a_base_is_overridden_key_by_key(tmp_path):
    (tmp_path / "one.yaml").write_text("A: {B: 1, C: 2}\nD: 3\n")
    (tmp_path / "two.yaml").write_text("A: {C: 4}\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: [one.yaml, two.yaml]\nA: {B: 5}\n")
    assert read_config(str(tmp_path / "leaf.yaml")) == {"A": {"B": 5, "C": 4}, "D": 3}
    (tmp_path / "leaf.yaml").write_text("_BASE_: one.yaml\nD: {E: 1}\n")
    with refused("--config-file", "leaf.yaml with keys below D", "a value, as D has in its _BASE_"):
        read_config(str(tmp_path / "leaf.yaml"))
    (tmp_path / "leaf.yaml").write_text("_BASE_: leaf.yaml\n")
    with refused("--config-file", "leaf.yaml, based on more than 20 files, or on itself"):
        read_config(str(tmp_path / "leaf.yaml"))
    (tmp_path / "leaf.yaml").write_text("_BASE_: gone.yaml\n")
    with refused("--config-file", "leaf.yaml, based on .*gone.yaml, which does not exist"):
        read_config(str(tmp_path / "leaf.yaml"))


CODE = {
    "!!python/object/apply:os.mkdir": "A: !!python/object/apply:os.mkdir [{mark}]",
    "!!python/object/new:os.mkdir": "A: !!python/object/new:os.mkdir [{mark}]",
    "!!python/name:os.mkdir": "A: !!python/name:os.mkdir",
    "!!python/module:os": "A: !!python/module:os",
    "!!python/object:acam_kd.lock.Lock": "A: !!python/object:acam_kd.lock.Lock {{folder: {mark}}}",
    "!!python/object/apply:eval with anything else than arithmetic": (
        "A: !!python/object/apply:eval [\"__import__('os').mkdir('{mark}')\"]"
    ),
    "!!python/object/apply:exec": "A: !!python/object/apply:exec [\"open('{mark}', 'w')\"]",
}


@pytest.mark.parametrize("tag", [*CODE])
def test_code_in_a_config_is_refused_and_not_run(tag, tmp_path, retinanet):
    """As the config, as its base, as the teacher's and as that of a finished run."""
    mark, path = tmp_path / "mark", tmp_path / "student_config.yaml"
    path.write_text("\n\n" + CODE[tag].format(mark=mark))
    (tmp_path / "leaf.yaml").write_text("_BASE_: student_config.yaml\n")
    (tmp_path / "model_final.pth").touch()
    cfg = get_cfg()
    add_distillation_config(cfg)
    line = f"student_config.yaml:3: .*{tag}"
    for read in (cfg.merge_from_file, cfg.clone().merge_from_file):
        with refused("--config-file", line, "plain YAML, tuples"):
            read(str(path))
    with refused("--config-file", line):
        cfg.merge_from_file(str(tmp_path / "leaf.yaml"))
    with refused("teacher", line):
        build_teacher(distillation_config(retinanet, str(path)))
    with refused("run", line):
        load_run(str(tmp_path), checkpoint="last", size=None)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[[x, x * 2**(1.0/3)] for x in [32, 64]]", [[32, 32 * 2 ** (1 / 3)], [64, 64 * 2 ** (1 / 3)]]),
        ("[int(x * 0.1 * 640) for x in range(5, 16)]", [int(x * 0.1 * 640) for x in range(5, 16)]),
        ("(1, -2 % 3, 7 // 2, round(2.5))", (1, 1, 3, 2)),
        ("[x * y for x in (1, 2) for y in [3, 4]]", [3, 4, 6, 8]),
    ],
)
def test_arithmetic(text, value):
    assert evaluated(text) == value == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "open('x')", "().__class__", "x", "[y for y in x]", "'a' * 9", "[0] * 10**9", "9**9**9", "range(10**9)[0]",
        "[x for x in range(10**9)]", "2.0**64**2", "(-8)**0.5", "1/0", "lambda: 0", "int('9')", "max(range(10**18))", "round(1, -10**9)", "True",
        "(" * 999, "-" * 999 + "1", "1" * 1001, "f'{1}'", "[x for x in range(9) if x]", "x := 1", "1e400",
        "range(1, 2, 3, 4)", "", "\0", "min()", "[a.b for a in [1]]", "[i for i in range(200) for j in range(200)]",
    ],
)  # fmt: skip
def test_other_texts_are_no_arithmetic(text):
    with pytest.raises(ValueError):
        evaluated(text)


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]", "a", "", "1: 2", "MODEL: {1: 2}", "A: [", "A: !!int x", "A: !!timestamp 2020-99-99", "A: &a [*a]",
        "{" * 5000, "A: " + "[" * 5000, "? [a]\n: 1", "A: \x00", "_BASE_: [[1]]", "MODEL: 1", "VERSION: x",
        "MODEL: {WEIGHTS: [1]}", "MODEL: {WEIGHTS: " + "-" * 20000 + "1}", "DISTILL: 1", "DISTILL: {TEACHER: [1]}",
        "DISTILL: {TEACHER: {CONFIG_FILE: [1]}}", "DISTILL: {PKD: 1}", "DATASETS: null", "VERSION: 9", "VERSION: -1",
        "A0: &a0 [x]\n" + "".join(f"A{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9)),
        "A0: &a0 {k0: 1}\n" + "".join(f"A{i + 1}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)),
    ],
)  # fmt: skip
def test_broken_configs_are_one_line(text, tmp_path):
    from acam_kd.d2.config import merge

    (tmp_path / "broken.yaml").write_text(text)
    cfg = get_cfg()
    add_distillation_config(cfg)
    with pytest.raises(ConfigError) as error:
        merge(cfg, str(tmp_path / "broken.yaml"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    with pytest.raises(ConfigError):
        merge_safely(get_cfg(), str(tmp_path / "broken.yaml"))


class Opens:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_a_pickle_of_the_zoo_is_read_and_one_with_code_is_refused(tmp_path):
    model, path, mark = nn.Linear(2, 2), tmp_path / "w.pkl", tmp_path / "mark"

    def load():
        read_safely(DetectionCheckpointer(model)).load(str(path))

    arrays = {"weight": np.full((2, 2), 3.0, np.float32), "bias": np.zeros(2, np.float32)}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo", "x": np.float64(1)}, protocol))
        load()
        assert model.weight.eq(3).all()
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": Opens(mark)}))
    with refused("MODEL.WEIGHTS", r"w.pkl, which holds Python objects \(posix.mkdir\)", "a pickle of arrays"):
        load()
    with refused("teacher_weights", "posix.mkdir"):
        check_pickle(str(path), "teacher_weights")
    for content in (b"", b"\x80", pickle.dumps([1]), pickle.dumps({"model": 1, "__author__": "x"})):
        path.write_bytes(content)
        with refused("MODEL.WEIGHTS", "w.pkl"):
            load()
    assert not mark.exists()


def test_a_last_checkpoint_with_code_is_refused(tmp_path):
    import torch

    for name in ("model_1.pth", "model_1.pkl", "model_1.pyth"):
        path, mark = tmp_path / name, tmp_path / "mark"
        content = {"model": {"weight": torch.zeros(2, 2)}, "iteration": Opens(mark)}
        torch.save(content, path) if name != "model_1.pkl" else path.write_bytes(pickle.dumps(content))
        (tmp_path / "last_checkpoint").write_text(name)
        with pytest.raises(RunError) as error:
            read_safely(DetectionCheckpointer(nn.Linear(2, 2), str(tmp_path))).resume_or_load("", resume=True)
        assert str(error.value).startswith(
            f"{path}: it cannot be resumed from: found {path}, which holds Python objects"
        )
        assert not mark.exists()
