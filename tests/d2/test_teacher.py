"""Was my teacher loaded? Its config is found, its weights are complete, or there is an error."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from detectron2.config import CfgNode, get_cfg

from acam_kd.core import ConfigError
from acam_kd.d2 import add_distillation_config
from acam_kd.d2.names import key
from acam_kd.d2.teacher import build_teacher, teacher_config

from .conftest import distillation_config, refused, save_config, save_weights

ZOO = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"


def test_weights_are_loaded_and_their_hash_is_logged(retinanet, retinanet_teacher, tmp_path, caplog):
    weights = save_weights(retinanet, tmp_path / "t.pth")
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd.teacher"):
        detector, _ = build_teacher(distillation_config(retinanet, retinanet_teacher, weights=weights))
    source = torch.load(weights)["model"]
    assert all(torch.equal(v, source[k]) for k, v in detector.state_dict().items())
    assert f"all {len(source)} tensors" in caplog.text and "sha256 " in caplog.text and not detector.training


def test_missing_and_mismatched_tensors_are_an_error_that_lists_them(retinanet, retinanet_teacher, tmp_path):
    weights = save_weights(retinanet, tmp_path / "t.pth")
    content = torch.load(weights)
    del content["model"]["backbone.fpn_output4.weight"]
    content["model"]["head.cls_score.bias"] = torch.zeros(5)
    torch.save(content, weights)
    with pytest.raises(ConfigError) as error:
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=weights))
    found = error.value.value
    assert found.startswith(f"{weights}, with which 2 tensors would stay random")
    assert "backbone.fpn_output4.weight: missing in the file" in found
    assert "head.cls_score.bias: (5,) in the file, (27,) in the teacher" in found
    text = error.value.render(key)
    assert text.startswith("DISTILL.TEACHER.WEIGHTS: ") and "do they belong to DISTILL.TEACHER.CONFIG_FILE?" in text
    (tmp_path / "student_config.yaml").touch()  # the file lies in the folder of a run
    with refused("teacher_weights", hint=f"set {{teacher}} to {tmp_path}/student_config.yaml, the config of that run"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=weights))


def test_backbone_weights_alone_are_not_a_teacher(retinanet, retinanet_teacher, tmp_path):
    """MODEL.WEIGHTS of the teacher's config file, an ImageNet backbone, is not a trained teacher."""
    weights = save_weights(retinanet, tmp_path / "t.pth")
    content = torch.load(weights)["model"]
    torch.save({"model": {k: v for k, v in content.items() if k.startswith("backbone.bottom_up")}}, weights)
    with refused("teacher_weights", "would stay random"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=weights))


def test_no_weights_is_an_error_unless_random_is_asked_for(retinanet, retinanet_teacher, caplog):
    with refused("teacher_weights", "nothing", f"a file for {retinanet_teacher}", "'random'"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=""))
    with caplog.at_level(logging.WARNING, logger="detectron2.acam_kd.teacher"):
        first, _ = build_teacher(distillation_config(retinanet, retinanet_teacher))
        second, _ = build_teacher(distillation_config(retinanet, retinanet_teacher))
    assert "RANDOM" in caplog.text
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    assert all(torch.equal(a, b) for a, b in pairs)  # every process builds the same


def test_files_that_do_not_exist_name_the_path_tried(retinanet, retinanet_teacher, tmp_path):
    with refused("teacher_weights", f"no file {tmp_path}/gone.pth"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / "gone.pth")))
    with refused("teacher", f"no file {tmp_path}/gone.yaml, and no such name in the model zoo"):
        build_teacher(distillation_config(retinanet, str(tmp_path / "gone.yaml")))
    with refused("teacher", "nothing", "a path or a name in the model zoo"):
        build_teacher(distillation_config(retinanet, ""))
    with refused("teacher", "teacher.py, a LazyConfig", "a .yaml"):
        build_teacher(distillation_config(retinanet, "teacher.py"))


def test_zoo_names_bring_their_weights(retinanet):
    teacher = teacher_config(distillation_config(retinanet, ZOO, weights=""))
    assert teacher.MODEL.WEIGHTS.endswith("137851257/model_final_f6e8b1.pkl") and teacher.MODEL.RESNETS.DEPTH == 101
    mine = teacher_config(distillation_config(retinanet, ZOO, weights="mine.pth"))
    assert mine.MODEL.WEIGHTS == "mine.pth"


def test_overrides_reach_the_teacher_alone(retinanet, retinanet_teacher):
    cfg = distillation_config(
        retinanet,
        retinanet_teacher,
        "DISTILL.TEACHER.OPTS",
        "['MODEL.RETINANET.NUM_CLASSES', 7, 'INPUT.FORMAT', 'RGB']",
    )
    teacher = teacher_config(cfg)
    assert teacher.MODEL.RETINANET.NUM_CLASSES == 7 and teacher.INPUT.FORMAT == "RGB"
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 3 and cfg.INPUT.FORMAT == "BGR"


def test_the_teachers_config_starts_from_todays_defaults(retinanet, retinanet_teacher, monkeypatch):
    """A key that Detectron2 adds tomorrow must not break it, as it broke the peers that copied the tree."""
    from detectron2.config import defaults

    cfg = distillation_config(retinanet, retinanet_teacher)
    fresh = defaults._C.clone()
    fresh.MODEL.NEW_IN_DETECTRON2 = 5
    monkeypatch.setattr(defaults, "_C", fresh)
    assert teacher_config(cfg).MODEL.NEW_IN_DETECTRON2 == 5


def test_keys_of_other_projects_are_known_to_the_teacher(retinanet, tmp_path):
    with_key = retinanet.clone()
    with_key.MY_PROJECT = CfgNode({"WIDTH": 3})
    path = save_config(with_key, tmp_path / "t.yaml")
    cfg = distillation_config(retinanet, path)
    cfg.MY_PROJECT = CfgNode({"WIDTH": 1})
    assert teacher_config(cfg).MY_PROJECT.WIDTH == 3


def test_the_teachers_file_is_relative_to_the_file_that_names_it(retinanet, tmp_path, monkeypatch):
    (tmp_path / "bases").mkdir()
    (tmp_path / "leaves").mkdir()
    teacher = save_config(retinanet, tmp_path / "bases" / "t.yaml")
    (tmp_path / "bases" / "b.yaml").write_text("DISTILL: {TEACHER: {CONFIG_FILE: t.yaml}}\nVERSION: 2\n")
    (tmp_path / "leaves" / "l.yaml").write_text("_BASE_: [../bases/b.yaml]\nDISTILL: {METHOD: Mimic}\n")
    (tmp_path / "leaves" / "zoo.yaml").write_text(
        f"_BASE_: ../bases/b.yaml\nDISTILL: {{TEACHER: {{CONFIG_FILE: {ZOO}}}}}\n"
    )
    (tmp_path / "leaves" / "none.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\nVERSION: 2\n")
    monkeypatch.chdir(tmp_path)
    found = {}
    for name in ("l", "zoo", "none"):
        cfg = get_cfg()
        add_distillation_config(cfg)
        cfg.clone().merge_from_file("leaves/zoo.yaml")  # a clone's is its own
        cfg.merge_from_file(f"leaves/{name}.yaml")
        found[name] = cfg.DISTILL.TEACHER.CONFIG_FILE
    assert found == {"l": teacher, "zoo": ZOO, "none": ""}
    with refused("--config-file", f"no file {tmp_path}/gone.yaml"):
        cfg.merge_from_file("gone.yaml")


def test_importing_does_not_open_the_zoo():
    """detectron2.model_zoo needs pkg_resources, which new setuptools no longer ship."""
    code = "import sys; sys.modules['pkg_resources'] = None; import acam_kd.d2; print('detectron2.model_zoo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_zoo_that_cannot_be_opened_is_named(retinanet, monkeypatch):
    monkeypatch.delitem(sys.modules, "detectron2.model_zoo", raising=False)
    monkeypatch.delitem(sys.modules, "detectron2.model_zoo.model_zoo", raising=False)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    import detectron2

    monkeypatch.delattr(detectron2, "model_zoo", raising=False)
    with refused("teacher", "", "", "zoo cannot be opened.*setuptools < 81"):
        teacher_config(distillation_config(retinanet, ZOO))


def test_a_distilled_student_can_teach(retinanet, retinanet_teacher, tmp_path):
    """Its run's config.yaml, with our keys in it, is a teacher's config."""
    first = distillation_config(retinanet, retinanet_teacher)
    path = save_config(first, tmp_path / "config.yaml")
    detector, cfg = build_teacher(distillation_config(retinanet, path))
    assert type(detector).__name__ == cfg.MODEL.META_ARCHITECTURE == "RetinaNet"


def test_unusable_files_are_named(retinanet, retinanet_teacher, tmp_path):
    (tmp_path / "odd.yaml").write_text("MODEL: {FOO: 1}\nVERSION: 2\n")
    with refused("teacher", "odd.yaml: .*MODEL.FOO", "a config of Detectron2"):
        build_teacher(distillation_config(retinanet, str(tmp_path / "odd.yaml")))
    with refused("teacher", "NOPE", "", "DISTILL.TEACHER.OPTS"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, "DISTILL.TEACHER.OPTS", "['NOPE', 1]"))
    with refused("DISTILL.TEACHER.OPTS", "MODEL.WEIGHTS", "other keys", "set DISTILL.TEACHER.WEIGHTS"):
        build_teacher(
            distillation_config(retinanet, retinanet_teacher, "DISTILL.TEACHER.OPTS", "['MODEL.WEIGHTS', 'x']")
        )
    (tmp_path / "odd.pth").write_bytes(b"not a checkpoint")
    with refused("teacher_weights", "odd.pth, which is a file of another kind", "a file of tensors by name"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / "odd.pth")))
    (tmp_path / "empty.pth").touch()
    torch.save([1, 2], tmp_path / "list.pth")
    for name, value in (("empty.pth", "which is empty"), ("list.pth", "which is no dict of tensors but a list")):
        with refused("teacher_weights", f"{name}, {value}", "a file of tensors by name"):
            build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / name)))
    (tmp_path / "broken.pkl").write_bytes(b"\x80\x04K")
    with refused(
        "teacher_weights", "broken.pkl, a pickle that torch has not written, or a damaged one", "a checkpoint"
    ):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / "broken.pkl")))


def test_weights_of_other_programs_are_understood(retinanet, retinanet_teacher, tmp_path):
    """Under a prefix, in Lightning's wrapper, in safetensors; by the same functions as in the other engine."""
    state = torch.load(save_weights(retinanet, tmp_path / "t.pth"))["model"]
    torch.save({"state_dict": {f"net.{name}": value for name, value in state.items()}}, tmp_path / "l.ckpt")
    safetensors.torch.save_file(state, tmp_path / "s.safetensors")
    for name in ("l.ckpt", "s.safetensors"):
        detector, _ = build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / name)))
        assert all(torch.equal(value, state[key]) for key, value in detector.state_dict().items())
    both = {f"{prefix}.{name}": value for name, value in state.items() for prefix in ("net", "ema")}
    torch.save(both, tmp_path / "both.pth")
    with refused("teacher_weights", "under each of the prefixes 'ema.', 'net.'", "one model"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / "both.pth")))
    state["head.cls_score.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    with refused("teacher_weights", "NaN or infinity in 1 tensors, the first is head.cls_score.bias", "finite weights"):
        build_teacher(distillation_config(retinanet, retinanet_teacher, weights=str(tmp_path / "nan.pth")))


def test_the_config_stays_a_config(retinanet, tmp_path):
    cfg = pickle.loads(pickle.dumps(distillation_config(retinanet, "t.yaml")))
    assert cfg.DISTILL.TEACHER.CONFIG_FILE == "t.yaml"
    (tmp_path / "base.yaml").write_text("_BASE_: gone.yaml\n")
    with refused("--config-file", "base.yaml, based on ", "existing files"):
        distillation_config(retinanet, "t.yaml").merge_from_file(str(tmp_path / "base.yaml"))
    for name, text in (("broken", "MODEL: {\n"), ("empty", "")):
        (tmp_path / f"{name}.yaml").write_text(text)
        cfg = distillation_config(retinanet, "t.yaml")
        with refused("--config-file", rf"{name}.yaml(:2: | with other)", "YAML|a config"):
            cfg.merge_from_file(str(tmp_path / f"{name}.yaml"))
