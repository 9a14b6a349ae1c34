"""The measurements of benchmarks/step.py: the parts of each variant's step add up, and misfits are left out."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch.nn import functional as F

from acam_kd.core import Distiller, FeatureSpec, RunError, Targets
from acam_kd.methods.acam.attention import summarized_attention
from benchmarks import step as tool
from benchmarks import variants as benchmark
from benchmarks.flops import count, distiller_flops
from benchmarks.memory import naive_gib
from benchmarks.timing import PARTS
from benchmarks.variants import FLOOR, METHODS, NAIVE, PLAIN, Setting, Step, Variant, examine, times, variants

from .conftest import ROOT, distillation_config, refused, save_config

QUICK = str(ROOT / "configs/quick_schedules/acam_instant.yaml")
ONE_CLASS = ("MODEL.RETINANET.NUM_CLASSES", "1", "DISTILL.TEACHER.OPTS", '["MODEL.RETINANET.NUM_CLASSES", 1]')
OWN = [PLAIN, "student + teacher forward", FLOOR, "uniform masks", "ACAM-KD", "ACAM-KD, fused map", f"ACAM-KD, {NAIVE}"]
OTHERS = [name for name in METHODS if name != "ACAMKD"]
SIZE = (96, 96)


def setting(*opts, file=QUICK, **others):
    return Setting(file, ("MODEL.DEVICE", "cpu", *opts), batch=2, **others)


def named(name, *opts, methods=()):
    return next(v for v in variants(setting(*opts), methods) if v.name == name)


def names(*opts, methods=()):
    return [variant.name for variant in variants(setting(*opts), methods)]


@pytest.mark.parametrize("name", [*OWN, *OTHERS, "PKD+KD"])
def test_a_variant_makes_a_step(name, storage):
    step = Step(named(name, methods=[] if name in OWN else [name]), setting(), SIZE)
    ticks = iter(range(100))
    step.timer.clock.now = lambda: next(ticks)  # each look at the clock is a second later
    alone = name == PLAIN
    expected = dict.fromkeys(PARTS, 0) | {"student forward": 1, "backward": 1}
    if not alone:
        expected = dict.fromkeys(PARTS, 1) | {"student forward": 3}
    assert step(seed=1) == expected
    assert sum(expected.values()) == next(ticks) - 1  # from the first look to the last
    assert all(p.grad is not None for p in step.model.parameters() if p.requires_grad)


def test_real_parts_are_not_negative(storage):
    parts = Step(named("ACAM-KD"), setting(), SIZE)()
    assert list(parts) == list(PARTS) and all(value > 0 for value in parts.values())


@pytest.mark.slow
def test_mixed_precision_is_that_of_the_forward(storage):
    step, seen = Step(named(FLOOR), setting(amp=True), SIZE), []
    step.model.backbone.bottom_up.register_forward_hook(lambda *args: seen.extend(args[2].values()))
    step()
    assert {x.dtype for x in seen} == {torch.float16}


@pytest.mark.slow
def test_deep_random_networks_stay_within_half_precision(monkeypatch, storage):
    """Else a step under autocast ends with a loss that is not finite."""
    deep = ["MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.NORM", "FrozenBN"]
    opts = [*deep, "DISTILL.TEACHER.OPTS", str(deep)]
    Step(named("ACAM-KD"), setting(*opts, amp=True), SIZE)()
    monkeypatch.setattr(benchmark, "_calm", lambda network: None)
    with pytest.raises(RunError, match="not finite"):
        Step(named("ACAM-KD"), setting(*opts, amp=True), SIZE)()


def test_students_do_the_same_work(rcnn, rcnn_teacher, tmp_path, storage):
    """Also the two-stage one, which samples proposals and would otherwise inherit."""
    config = distillation_config(rcnn, rcnn_teacher, "DISTILL.INHERIT", "always")
    same = setting(file=save_config(config, tmp_path / "config.yaml"))
    losses = []
    for variant in variants(same, [])[:2]:
        step = Step(variant, same, (64, 96))
        torch.manual_seed(3)
        losses.append(step.timer.forward(step.batch))
    torch.testing.assert_close(*losses, rtol=0, atol=0)


@pytest.mark.slow
def test_all_are_those_that_fit(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger("detectron2"), "handlers", [])  # another test's run may have left some
    assert names(methods=["all"]) == [*OWN, *OTHERS]
    assert capsys.readouterr().err == ""
    assert {*OTHERS} - {*names(*ONE_CLASS, methods=["all"])} == {"DKD", "NKD"}
    assert "DKD is left out: " in capsys.readouterr().err


def test_half_precision_has_one_more():
    assert [v.path for v in variants(setting(amp=True), [])][4:] == ["", "map", "summary", "materialized"]


def test_those_asked_for():
    assert names(methods=["FGD", "PKD+KD"]) == [*OWN, "FGD", "PKD+KD"]
    with refused("DKD.levels", "classes with 1 class", "2 classes or more", "DKD"):
        names(*ONE_CLASS, methods=["DKD"])


def test_the_method_with_other_options(capsys):
    also = [["DISTILL.TEACHER.PRECISION", "bfloat16"], ["DISTILL.ACAMKD.POOLING", "all", "DISTILL.LEVELS", ["p3"]]]
    *rest, precise, pooled = variants(setting(), [], also)
    assert [v.name for v in rest] == OWN
    assert precise.name == "ACAM-KD, TEACHER.PRECISION bfloat16" and pooled.name.startswith("ACAM-KD, POOLING all, LEV")
    assert precise.build(setting()).distillation.teacher.precision == "bfloat16"
    model = pooled.build(setting())
    assert model.distillation.method.pooling == "all" and list(model.distillation.levels) == ["p3"]
    with refused("also", "DISTILL.PERIOD", "", "every step here is distilled"):
        variants(setting(), [], [["DISTILL.PERIOD", "2"]])
    with refused("--config-file, or KEY VALUE pairs", "Non-existent key: DISTILL.NONE"):
        variants(setting(), [], [["DISTILL.NONE", "1"]])
    with pytest.raises(SystemExit):
        tool.main(["--config-file", QUICK, "--also", "DISTILL.CHANNELS_LAST"])
    assert "must be KEY VALUE pairs in quotes, found 'DISTILL.CHANNELS_LAST'" in capsys.readouterr().err


def test_what_is_the_same_as_another_is_left_out():
    masks = ["DISTILL.ACAMKD.SPATIAL_MASKING", "UniformMasking", "DISTILL.ACAMKD.CHANNEL_MASKING", ""]
    assert names(*masks) == OWN[:4]
    assert names("DISTILL.ACAMKD.FUSION", "TeacherFusion") == OWN[:5]
    assert names("DISTILL.METHOD", "Mimic") == names("DISTILL.METHOD", "") == OWN[:3]
    assert names("DISTILL.METHOD", "PKD") == [*OWN[:3], "PKD"]
    assert names("DISTILL.METHOD", "ACAMKD+PKD")[4:] == [name.replace("KD", "KD+PKD", 1) for name in OWN[4:]]
    assert names("DISTILL.METHOD", "KD", "DISTILL.TAPS", '["classes"]') == [*OWN[:3], "KD"]


@pytest.mark.parametrize(("name", "path"), [("ACAM-KD, fused map", "map"), (f"ACAM-KD, {NAIVE}", "materialized")])
def test_the_path_of_the_attention_is_chosen(name, path):
    fusions = named(name).build(setting()).distillation.method.fusion
    assert {fusion.path for fusion in fusions.values()} == {path}
    assert {fusion.path for fusion in named("ACAM-KD").build(setting()).distillation.method.fusion.values()} == {"auto"}


class Attends(Distiller):
    """Attention between (N, C, 1, L) maps, and a sum, which nobody counts."""

    def forward(self, student, teacher, targets=None):
        query, key = (x["p"].permute(0, 2, 3, 1).contiguous() for x in (student, teacher))  # (N, 1, L, C)
        return {"loss": F.scaled_dot_product_attention(query, key, key).sum()}


def test_flops_of_attention_by_hand():
    n, width, positions = 2, 16, 24
    level = {"p": FeatureSpec(width, 8)}
    maps = [{"p": torch.randn(n, width, 1, positions)} for _ in range(2)]
    found = distiller_flops(Attends(level, level), *maps, Targets())
    product = n * positions**2 * width
    assert found["fvcore_forward"] == 2 * product
    assert found["forward"] == 2 * 2 * product
    assert found["backward"] == 2 * 5 * product  # the weights again, then the gradients of all four factors
    assert "aten::sum" in found["fvcore_uncounted"]


def test_flops_of_the_summary_by_hand():
    """Per pair of positions: 4 E + 3 M + 3 multiply-adds, forward and backward, as docs/performance.md says."""
    (n, e, m), size = (2, 16, 3), (5, 6)
    inputs = [torch.randn(n, width, *size, requires_grad=True) for width in (e, e, m)]
    flops, _ = count(lambda: sum(x.sum() for x in summarized_attention(*inputs)).backward())
    assert flops == 2 * n * (5 * 6) ** 2 * (4 * e + 3 * m + 3)


def test_flops_of_mimicking_by_hand(storage):
    found = examine(named(FLOOR), setting(), (128, 96))
    assert found["levels"]["p3"] == [16, 12] and found["peak_memory"] > 2**20
    positions = sum(math.prod(size) for size in found["levels"].values())
    align = 2 * positions * 64 * 64  # batch 2; a 1x1 convolution from 64 to 64 channels
    own = found["flops"]["distiller"]
    assert (own["fvcore_forward"], own["forward"]) == (align, 2 * align)
    assert own["backward"] == 2 * own["forward"]  # of its input and of its weight
    assert found["flops"]["step"] > own["forward"] + own["backward"]


def test_a_trace_that_fails_is_said(monkeypatch):
    level = {"p": FeatureSpec(4, 8)}

    def fails(self):
        raise RuntimeError("no trace\nat all")

    monkeypatch.setattr("benchmarks.flops.FlopCountAnalysis.total", fails)
    maps = [{"p": torch.randn(1, 4, 1, 3)} for _ in range(2)]
    found = distiller_flops(Attends(level, level), *maps, Targets())
    assert found["fvcore_forward"] is None and found["fvcore_uncounted"] == {"no trace": 1}


def test_out_of_memory_leaves_the_others(monkeypatch):
    class Small(Step):
        def __call__(self, seed=0):
            if hasattr(self.model, "distillation") and seed == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().__call__(seed)

    monkeypatch.setattr(benchmark, "Step", Small)
    found = times([named(PLAIN), named(FLOOR)], setting(), SIZE, repeats=2)
    assert found[FLOOR] == {"failed": "out of memory"}
    assert len(found[PLAIN]["parts"]) == 2

    def broken(*_):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(benchmark, "Step", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        times([named(PLAIN)], setting(), SIZE, repeats=1)


@pytest.mark.slow
def test_the_record_and_its_tables(monkeypatch, tmp_path, capsys):
    def here(function, variant, *args):  # not in a process of its own: that takes seconds
        return {"failed": "out of memory"} if variant.name == "PKD" else function(variant, *args)

    few = [PLAIN, FLOOR, OWN[-1], "PKD"]
    monkeypatch.setattr(tool, "in_own_process", here)
    monkeypatch.setattr(tool, "variants", lambda *args: [v for v in variants(*args) if v.name in few])
    arguments = ["--config-file", QUICK, "--batch", "2", "--size", "64", "96", "--size", "96", "96", "--repeats", "2"]
    arguments += ["--json", str(tmp_path / "raw.json"), "--markdown", str(tmp_path / "table.md"), "--methods", "PKD"]
    tool.main([*arguments, "--naive-limit-gib", "0.000001", "--", "MODEL.DEVICE", "cpu"])
    record = json.loads((tmp_path / "raw.json").read_text())
    assert (
        record["opts"] == ["MODEL.DEVICE", "cpu"]
        and record["config_file"] == QUICK
        and "--repeats 2" in record["command"]
    )
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0] and record["versions"]["detectron2"]
    assert record["threads"] == torch.get_num_threads() and record["cpu"] and record["device"] == "CPU"
    assert [at["size"] for at in record["sizes"]] == [[64, 96], [96, 96]]
    for at in record["sizes"]:
        assert [row["variant"] for row in at["rows"]] == [PLAIN, FLOOR, "PKD"]
        assert list(at["left_out"]) == [OWN[-1]] and "--naive-limit-gib" in at["left_out"][OWN[-1]]
        for row in at["rows"][:-1]:
            assert len(row["seconds"]) == len(row["parts"]) == 2
            assert row["seconds"] == [pytest.approx(sum(parts.values())) for parts in row["parts"]]
            assert row["peak_memory"] > 0 and row["flops"]["step"] > 0
    text = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == "" and f"{OWN[-1]} is left out: " in text
    assert "| PKD | out of memory |  |  | out of memory |  |  |" in text
    for block in text.split("\n\n"):
        widths = {line.count("|") for line in block.strip().splitlines() if line.startswith("|")}
        assert len(widths) <= 1, block
    assert text.count("| floor (mimicking) |") == 6


def test_ratios_are_those_within_a_turn():
    row = {"parts": [], "peak_memory": 2**30, "flops": {}}
    slow = [
        {**row, "variant": PLAIN, "seconds": [1.0, 9.0, 2.0]},
        {**row, "variant": FLOOR, "seconds": [2.0, 9.0, 4.0], "peak_memory": 3 * 2**29},
    ]
    record = {"sizes": [{"size": [1, 1], "rows": slow, "left_out": {}}], "plain": PLAIN, "floor": FLOOR}
    record |= {"command": "", "batch": 1, "amp": False, "repeats": 3, "cpu": "", "threads": 1, "device": "CPU"}
    text = tool.markdown({**record, "versions": {}, "date": "2026-11-21"})
    assert "| floor (mimicking) | 4000.0 (2000.0-9000.0) | 2.00 | 1.00 | 1.50 | 0.50 | 1.00 |" in text


def test_the_guard_by_hand():
    assert naive_gib(2, 2**14) == 2 * 2**28 * 4 * 4 / 2**30 == 8


def test_bad_input_is_one_line():
    with pytest.raises(SystemExit, match=r"^benchmarks.step: DISTILL.DKD.LEVELS: found classes with 1 class.*DKD"):
        tool.main(["--config-file", QUICK, "--methods", "DKD", "--", "MODEL.DEVICE", "cpu", *ONE_CLASS])
    with pytest.raises(SystemExit):
        tool.main(["--config-file", QUICK, "--repeats", "0"])


def test_variants_are_what_their_options_say():
    assert not hasattr(Variant("x", ("DISTILL.METHOD", "")).build(setting()), "distillation")
    assert named("uniform masks").build(setting()).distillation.method.masks() == {}
