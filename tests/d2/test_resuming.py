"""Runs of train_net.py that stop, and go on where they were."""

from __future__ import annotations

import os

import pytest
import torch

import train_net
from acam_kd.d2.trunk import _torchvision
from acam_kd.lock import Lock

from .conftest import broken
from .running import CHEAPER, run, train


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
