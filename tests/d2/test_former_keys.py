"""Former keys and values of methods in YAML files and KEY VALUE pairs, and the lines about them in the log."""

from __future__ import annotations

import logging
import pickle

import pytest
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from acam_kd.core import ConfigError
from acam_kd.d2 import add_distillation_config
from acam_kd.d2.config import merge, student_config
from acam_kd.d2.former_keys import former_keys
from acam_kd.d2.names import key

from .conftest import distillation_config

OLD = "DISTILL:\n  ACAMKD:\n    STANDARDIZE: True\n    MASK_GRADIENT: paper\n"
LINES = [
    "DISTILL.ACAMKD.STANDARDIZE is called DISTILL.ACAMKD.STANDARDIZE_FUSED now; the former name is still read",
    "DISTILL.ACAMKD.MASK_GRADIENT: paper is called full now; the former value is still read",
]


def merged(*opts, path=None, other=None):
    cfg = get_cfg()
    add_distillation_config(cfg)
    if other is not None:
        cfg.merge_from_other_cfg(other)
    if path is not None:
        merge(cfg, str(path))
    cfg.merge_from_list(list(opts))
    return cfg


def test_a_file_with_former_keys_is_read(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "leaf.yaml").write_text("_BASE_: old.yaml\nDISTILL:\n  ACAMKD:\n    ALPHA: 2.0\n")
    for name in ("old", "leaf"):
        cfg = merged(path=tmp_path / f"{name}.yaml")
        node = cfg.DISTILL.ACAMKD
        assert (node.STANDARDIZE_FUSED, node.MASK_GRADIENT) == (True, "full")
        assert "STANDARDIZE" not in node and former_keys(cfg, ["ACAMKD"]) == LINES


def test_a_file_overrides_the_files_that_it_is_based_on_under_either_name(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    (tmp_path / "new.yaml").write_text("DISTILL:\n  ACAMKD:\n    STANDARDIZE_FUSED: True\n    MASK_GRADIENT: full\n")
    for base in ("old", "new"):
        for name, gradient in (("STANDARDIZE", "paper"), ("STANDARDIZE_FUSED", "frozen")):
            leaf = f"_BASE_: {base}.yaml\nDISTILL:\n  ACAMKD:\n    {name}: False\n    MASK_GRADIENT: {gradient}\n"
            (tmp_path / "leaf.yaml").write_text(leaf)
            node = merged(path=tmp_path / "leaf.yaml").DISTILL.ACAMKD
            assert (False, gradient.replace("paper", "full")) == (node.STANDARDIZE_FUSED, node.MASK_GRADIENT)


def test_a_config_that_was_written_out_is_read(tmp_path):
    """It has the keys that were left open, too; they need no line."""
    whole = merged("DISTILL.ACAMKD.MASK_GRADIENT", "full")
    old = whole.dump().replace("STANDARDIZE_FUSED: null", "STANDARDIZE: null")
    assert "STANDARDIZE: null" in old
    (tmp_path / "config.yaml").write_text(old)
    cfg = merged(path=tmp_path / "config.yaml")
    assert cfg.DISTILL.ACAMKD.STANDARDIZE_FUSED is None and former_keys(cfg, ["ACAMKD"]) == []
    (tmp_path / "config.yaml").write_text(old.replace("STANDARDIZE: null", "STANDARDIZE: true"))
    cfg = merged(path=tmp_path / "config.yaml")
    assert cfg.DISTILL.ACAMKD.STANDARDIZE_FUSED is True and former_keys(cfg, ["ACAMKD"]) == LINES[:1]


@pytest.mark.parametrize("duplicate", [CfgNode.clone, lambda cfg: pickle.loads(pickle.dumps(cfg))])
def test_copies_and_pickles_read_former_keys_too(tmp_path, duplicate):
    (tmp_path / "old.yaml").write_text(OLD)
    cfg = duplicate(merged("DISTILL.ACAMKD.MASK_GRADIENT", "paper"))
    assert former_keys(cfg, ["ACAMKD"]) == LINES[1:]
    cfg.merge_from_list(["DISTILL.ACAMKD.STANDARDIZE", "True"])
    assert cfg.DISTILL.ACAMKD.STANDARDIZE_FUSED is True and former_keys(cfg, ["ACAMKD"]) == LINES[::-1]
    cfg = duplicate(merged())
    cfg.merge_from_file(str(tmp_path / "old.yaml"))
    assert cfg.DISTILL.ACAMKD.STANDARDIZE_FUSED is True


def test_a_method_that_does_not_run_needs_no_line(retinanet, retinanet_teacher, caplog):
    opts = ["DISTILL.ACAMKD.STANDARDIZE", "True", "DISTILL.METHOD", "Mimic"]
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        build_model(distillation_config(retinanet, retinanet_teacher, *opts))
    assert caplog.messages and not [line for line in caplog.messages if "former" in line]


def test_the_config_that_was_merged_is_left_as_it_is():
    old = CfgNode({"DISTILL": {"ACAMKD": {"STANDARDIZE": True}}})
    assert merged(other=old).DISTILL.ACAMKD.STANDARDIZE_FUSED and "STANDARDIZE" in old.DISTILL.ACAMKD


def test_pairs_with_former_keys_are_read_and_the_last_merge_counts(tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    assert merged("DISTILL.ACAMKD.STANDARDIZE", "True").DISTILL.ACAMKD.STANDARDIZE_FUSED is True
    for name in ("STANDARDIZE", "STANDARDIZE_FUSED"):
        opts = ["DISTILL.ACAMKD.ALPHA", 2.0, f"DISTILL.ACAMKD.{name}", "False", "SOLVER.MAX_ITER", 7]
        cfg = merged(*opts, path=tmp_path / "old.yaml")
        assert cfg.DISTILL.ACAMKD.STANDARDIZE_FUSED is False
        assert (cfg.DISTILL.ACAMKD.ALPHA, cfg.SOLVER.MAX_ITER) == (2.0, 7)
    assert former_keys(merged("DISTILL.ACAMKD.ALPHA", 2.0, "DISTILL.METHOD", "PKD"), ["ACAMKD", "PKD"]) == []


def test_both_names_with_different_values_are_refused(tmp_path):
    (tmp_path / "both.yaml").write_text(OLD + "    STANDARDIZE_FUSED: False\n")
    for both in (
        lambda: merged(path=tmp_path / "both.yaml"),
        lambda: merged("DISTILL.ACAMKD.STANDARDIZE", "True", "DISTILL.ACAMKD.STANDARDIZE_FUSED", "False"),
    ):
        with pytest.raises(ConfigError) as error:
            both()
        assert error.value.render(key).startswith("DISTILL.ACAMKD.STANDARDIZE_FUSED: found ")
        assert error.value.render(key).endswith("leave DISTILL.ACAMKD.STANDARDIZE out, its former name")
    (tmp_path / "both.yaml").write_text(OLD + "    STANDARDIZE_FUSED: True\n")
    assert merged(path=tmp_path / "both.yaml").DISTILL.ACAMKD.STANDARDIZE_FUSED is True


@pytest.mark.parametrize(
    ("opts", "found"),
    [
        (["DISTILL.ACAMKD.STANDARDISE", "True"], "Non-existent key: DISTILL.ACAMKD.STANDARDISE"),
        (["DISTILL.ACAMKD.STANDARDIZE", "3"], "config key: DISTILL.ACAMKD.STANDARDIZE_FUSED"),
        (["DISTILL.ACAMKD.STANDARDIZE"], "odd length"),
        (["DISTILL.PKD.STANDARDIZE", "True"], "Non-existent key: DISTILL.PKD.STANDARDIZE"),  # another method's
    ],
)
def test_wrong_keys_are_refused_as_before(opts, found, tmp_path):
    (tmp_path / "old.yaml").write_text(OLD)
    cfg = get_cfg()
    add_distillation_config(cfg)
    with pytest.raises(ConfigError) as error:
        merge(cfg, str(tmp_path / "old.yaml"), opts)
    assert found in str(error.value)


def test_a_students_config_knows_nothing_of_it():
    student = student_config(merged("DISTILL.ACAMKD.STANDARDIZE", "True"))
    assert former_keys(student, ["ACAMKD"]) == [] and not [
        name for name in student.__dict__ if "merge" in name or "former" in name
    ]


def test_the_log_says_it_when_the_model_is_built_and_which_form_runs(retinanet, retinanet_teacher, caplog):
    opts = ["DISTILL.ACAMKD.STANDARDIZE", "True", "DISTILL.ACAMKD.MASK_GRADIENT", "paper"]
    cfg = distillation_config(retinanet, retinanet_teacher, *opts)
    copy = cfg.clone()
    copy.freeze()
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        method = build_model(copy).distillation.method
    assert method.standardize_fused is True and method.mask_gradient == "full"
    assert [line for line in caplog.messages if "former" in line] == LINES
    assert (
        "ACAM-KD, mask_gradient=full, diversity=pairwise, standardize_fused=True, features=standardized"
        in caplog.messages
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="detectron2.acam_kd"):
        build_model(distillation_config(retinanet, retinanet_teacher))
    assert "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise, features=standardized)" in caplog.messages
