"""Tokens that a run of the command learns: once, for itself or for several runs, without a trace in the training."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from acam_kd.methods.parts.token_runs import TokenFile
from acam_kd.tv import token_learning
from acam_kd.tv.models import build_model
from acam_kd.tv.training import train

from .conftest import STUDENT, refuses, tiny
from .test_cli import quick, run
from .test_training import interrupted, same, student_of


@pytest.fixture
def learning(data, finished):
    """The settings of a run that needs tokens."""

    def make(method="MasKD", *options, **more):
        options = ("token_iterations=2", "num_tokens=2", *options)
        settings = dataclasses.replace(tiny(data), teacher=str(finished), method=method, options=options, iterations=2)
        return dataclasses.replace(settings, **more)

    return make


@pytest.fixture
def calls(monkeypatch):
    """The files that were learnt."""
    seen = []

    def learn(settings, wanted):
        seen.append(wanted)
        return original(settings, wanted)

    original = token_learning.learn
    monkeypatch.setattr(token_learning, "learn", learn)
    return seen


def levels_of(path):
    return torch.load(path, weights_only=True)["levels"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["MasKD", "FreeKD"])
def test_a_run_learns_its_tokens_and_leaves_everything_else_as_it_is(method, learning, calls, finished, tmp_path):
    before = (finished / "student.pth").read_bytes()
    train(learning(method), tmp_path / "run")
    path = tmp_path / "run" / f"tokens_{method.lower()}.pth"
    assert [wanted.path for wanted in calls] == [str(path)] and calls[0].iterations == 2
    assert (finished / "student.pth").read_bytes() == before
    learnt = torch.load(tmp_path / "run/last.ckpt", weights_only=False)["distiller"]
    for level, entry in levels_of(path).items():
        tokens = entry["state"]["tokens"]
        assert [name for name in learnt if name.endswith("tokens") and torch.equal(learnt[name], tokens)], level
    given = learning(method, f"tokens={path}")
    train(given, tmp_path / "given")
    assert len(calls) == 1 and same(student_of(tmp_path / "run"), student_of(tmp_path / "given"))
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.slow
def test_a_resumed_run_reads_them_again(learning, calls, tmp_path):
    settings = learning(iterations=4)
    interrupted(settings, tmp_path / "cut")
    train(settings, tmp_path / "cut", resume=True)
    train(settings, tmp_path / "whole")
    assert len(calls) == 2 and same(student_of(tmp_path / "cut"), student_of(tmp_path / "whole"))


@pytest.mark.slow
def test_runs_of_several_seeds_share_a_file(learning, calls, tmp_path):
    shared = tmp_path / "new" / "tokens.pth"
    for seed in (3, 4):
        train(learning("MasKD", f"tokens={shared}", seed=seed), tmp_path / str(seed))
    assert len(calls) == 1 and not (tmp_path / "3/tokens_maskd.pth").exists()
    train(learning(seed=5), tmp_path / "5")  # neither does the seed change what is learnt
    own = levels_of(tmp_path / "5/tokens_maskd.pth")
    assert all(same(entry["state"], own[level]["state"]) for level, entry in levels_of(shared).items())


def test_several_methods_have_a_file_each(learning, calls, data, finished, tmp_path, capsys):
    options = [f"{m}.{o}" for m in ("MasKD", "FreeKD") for o in ("token_iterations=2", "num_tokens=1")]
    out = tmp_path / "run"
    run(*quick(data, out, "--teacher", finished, "--method", "MasKD+FreeKD+PKD", "--set", *options))
    assert [wanted.method for wanted in calls] == ["MasKD", "FreeKD"]
    assert (out / "tokens_maskd.pth").is_file() and (out / "tokens_freekd.pth").is_file()
    log = capsys.readouterr().err
    for name in ("maskd", "freekd"):
        assert f"tokens='{out / f'tokens_{name}.pth'}' (the run's own)" in log
    assert "num_tokens=1 (given)" in log


def test_tokens_move_and_their_losses_are_the_teachers(learning, finished, tmp_path):
    settings = learning()
    (logged,) = token_learning.learn(settings, TokenFile(str(tmp_path / "a.pth"), "MasKD", iterations=2))
    assert set(logged) == {"classification", "bbox_regression", "bbox_ctrness", "loss_tokens_diversity"}
    token_learning.learn(settings, TokenFile(str(tmp_path / "b.pth"), "MasKD", iterations=2, learning_rate=1e-9))
    start = levels_of(tmp_path / "b.pth")
    for level, entry in levels_of(tmp_path / "a.pth").items():
        assert (entry["state"]["tokens"] - start[level]["state"]["tokens"]).abs().mean() > 1e-3
    assert [entry["stride"] for entry in start.values()] == [8, 16, 32, 64, 128]


@pytest.mark.slow
def test_a_segmentation_teacher_learns_on_its_logits(learning, data, tmp_path):
    folder = tmp_path / "teacher"
    student = {"student": "lraspp_mobilenet_v3_large", "eval_period": 1}
    train(dataclasses.replace(tiny(data), iterations=1, **student), folder)
    settings = learning(teacher=str(folder), options=("token_iterations=1",), crop=(64, 48), size=None, **student)
    train(settings, tmp_path / "run")
    levels = levels_of(tmp_path / "run/tokens_maskd.pth")
    assert list(levels) == ["logits"] and levels["logits"]["state"]["tokens"].shape[0] == 8
    free = dataclasses.replace(settings, method="FreeKD")
    token_learning.learn(free, TokenFile(str(tmp_path / "freekd.pth"), "FreeKD", iterations=1))
    assert "logits" not in levels_of(tmp_path / "freekd.pth")
    with refuses("method", "FreeKD", "one for logits", "FreeKD distils backbone; see {taps}"):
        train(dataclasses.replace(free, taps=("logits",)), tmp_path / "x")


def test_bad_input_is_named(learning, data, finished, tmp_path):
    out = tmp_path / "run"
    with refuses("MasKD.token_iterations", "0", ">= 1"):
        train(learning("MasKD", "token_iterations=0"), out)
    with refuses("teacher", "no finished run in"):
        train(learning(teacher=str(tmp_path)), out)
    with refuses("taps", "logits", "backbone or classes of the teacher, a FCOS"):
        train(learning(taps=("logits",)), out)
    other = {"teacher": STUDENT, "teacher_weights": str(tmp_path / "nine"), "teacher_classes": 9}
    torch.save(build_model(STUDENT, num_classes=9).state_dict(), other["teacher_weights"])
    with refuses("teacher_classes", "9", "the data's 7", "set {tokens} to a file learnt on its data"):
        train(learning(**other), out)
    assert not list(tmp_path.rglob("*.pth"))


def test_tokens_of_another_teacher_are_refused(learning, data, finished, tmp_path):
    path = tmp_path / "tokens.pth"
    train(learning("MasKD", f"tokens={path}"), tmp_path / "first")
    other = tmp_path / "other"
    train(dataclasses.replace(tiny(data), seed=9, iterations=1), other)
    with refuses(
        "MasKD.tokens", f"{path}, learnt on a teacher with other weights", "tokens of this", "delete the file"
    ):
        train(learning("MasKD", f"tokens={path}", teacher=str(other)), tmp_path / "second")


@pytest.mark.slow
def test_two_devices_share_what_the_first_process_learnt(learning, data, finished, tmp_path):
    out = tmp_path / "run"
    more = ["--devices", 2, "--teacher", finished, "--method", "MasKD", "--set", "token_iterations=2", "num_tokens=2"]
    command = [sys.executable, "-m", "acam_kd.cli", *map(str, quick(data, out, *more))]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("learning the tokens of MasKD in 2 steps") == 1 and (out / "student.pth").is_file()
    alone = TokenFile(str(tmp_path / "alone.pth"), "MasKD", num_tokens=2, iterations=2)
    token_learning.learn(learning(), alone)
    here, there = levels_of(alone.path), levels_of(out / "tokens_maskd.pth")
    assert all(same(entry["state"], there[level]["state"]) for level, entry in here.items())


def test_the_command_that_is_gone_says_what_to_write():
    with pytest.raises(SystemExit, match="^acam-kd: command: found tokens, expected train --method MasKD or FreeKD, "):
        run("tokens", "--data", "shapes", "--teacher", "output/teacher")
