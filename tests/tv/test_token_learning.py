"""The command that learns tokens, from a finished run to a distillation that uses them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from acam_kd.tv.build import build
from acam_kd.tv.labels import load_data
from acam_kd.tv.token_learning import TokenSettings, learn

from .conftest import tiny
from .test_cli import quick, run


def tokens(data, teacher, output, *more):
    options = ["--data", data, "--teacher", teacher, "--output", output, "--batch-size", 2, "--workers", 0]
    return ["tokens", *options, "--iterations", 3, *more]


@pytest.mark.parametrize("method", ["MasKD", "FreeKD"])
def test_tokens_are_learnt_and_used(method, data, finished, tmp_path, capsys):
    before = (finished / "student.pth").read_bytes()
    path = tmp_path / "new" / "tokens.pth"
    run(*tokens(data, finished, path, "--method", method, "--num-tokens", 2))
    assert capsys.readouterr().out.strip() == f"the tokens: {path}"
    assert (finished / "student.pth").read_bytes() == before
    learnt = torch.load(path, weights_only=True)["levels"]
    torch.manual_seed(0)
    settings = dataclasses.replace(
        tiny(data), teacher=str(finished), method=method, options=(f"tokens={path}", "num_tokens=2")
    )
    model = build(settings, load_data(settings.train_split, settings.student, name="training data"))
    attached = model.distillation
    assert attached.warnings() == {} and set(learnt) == set(attached.levels.values())
    for own, other in attached.levels.items():
        assert torch.equal(attached.method.tokens[own].tokens, learnt[other]["state"]["tokens"])
    run(*quick(data, tmp_path / "run", "--teacher", finished, "--method", method, "--set", *settings.options))


def test_they_move_and_a_seed_decides_everything(data, finished, tmp_path):
    settings = TokenSettings(tiny(data).train_split, str(finished), iterations=2, batch_size=2, workers=0)
    logged = learn(settings, tmp_path / "a.pth")
    assert logged == learn(settings, tmp_path / "b.pth") and len(logged) == 1
    assert {"classification", "bbox_regression", "bbox_ctrness", "loss_tokens_diversity"} == set(logged[0])
    learn(dataclasses.replace(settings, learning_rate=1e-9), tmp_path / "start.pth")
    first, second, start = (
        torch.load(tmp_path / f"{name}.pth", weights_only=True)["levels"] for name in ("a", "b", "start")
    )
    for level, entry in first.items():
        learnt = entry["state"]["tokens"]
        assert torch.equal(learnt, second[level]["state"]["tokens"])
        assert (learnt - start[level]["state"]["tokens"]).abs().mean() > 1e-3
    assert [entry["stride"] for entry in first.values()] == [8, 16, 32, 64, 128]


def test_a_segmentation_teacher_learns_on_its_logits(data, tmp_path):
    from acam_kd.tv.training import train

    folder = tmp_path / "teacher"
    train(dataclasses.replace(tiny(data), student="lraspp_mobilenet_v3_large", iterations=1, eval_period=1), folder)
    run(*tokens(data, folder, tmp_path / "tokens.pth"))
    content = torch.load(tmp_path / "tokens.pth", weights_only=True)["levels"]
    assert list(content) == ["logits"] and content["logits"]["state"]["tokens"].shape[0] == 8
    run(*tokens(data, folder, tmp_path / "freekd.pth", "--method", "FreeKD"))
    assert "logits" not in torch.load(tmp_path / "freekd.pth", weights_only=True)["levels"]
    with pytest.raises(
        SystemExit,
        match="^acam-kd: --method: found FreeKD, expected one for logits .*; FreeKD distils backbone; see --taps$",
    ):
        run(*tokens(data, folder, tmp_path / "x.pth", "--method", "FreeKD", "--taps", "logits"))


def test_bad_input_is_one_line(data, finished, tmp_path):
    with pytest.raises(
        SystemExit, match="^acam-kd: --teacher: found no finished run in .*nowhere, expected a folder with student.json"
    ):
        run(*tokens(data, tmp_path / "nowhere", tmp_path / "t.pth"))
    with pytest.raises(
        SystemExit, match="^acam-kd: --taps: found logits, expected backbone or classes of the teacher, a FCOS"
    ):
        run(*tokens(data, finished, tmp_path / "t.pth", "--taps", "logits"))
    with pytest.raises(SystemExit, match=r"^acam-kd: --set MasKD.tokens: found no file at .*t.pth, expected a file"):
        run(
            *quick(
                data, tmp_path / "r", "--teacher", finished, "--method", "MasKD", "--set", f"tokens={tmp_path}/t.pth"
            )
        )
    assert not (tmp_path / "t.pth").exists()
