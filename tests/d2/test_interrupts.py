"""Detectron2's trainer ends at a signal after a whole step, and saves it."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from detectron2.engine import HookBase

import train_net
from acam_kd.core.errors import RunError
from acam_kd.core.interrupts import Interrupted, Signals
from acam_kd.d2.interrupts import _start_worker, saving_what_is_done

from .running import FixedOrder, run
from .running import train as whole_run


class At(HookBase):
    """A function that is called within a step of a run."""

    def __init__(self, iteration, function):
        self.iteration, self.function = iteration, function

    def after_backward(self):
        if self.trainer.iter == self.iteration:
            self.function()


def signalled(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def built(command):
    args = train_net.parser().parse_args(command)
    trainer = train_net.Trainer(train_net.setup(args))
    trainer._trainer.data_loader = FixedOrder(trainer)
    trainer.resume_or_load(resume=args.resume)
    return trainer


def stopped(command, prepare, evaluation=lambda: None):
    """Train until something ends the run; return the error."""
    trainer = built(command)
    for hook in trainer._hooks:
        if type(hook).__name__ == "EvalHook":
            hook._func = evaluation
    prepare(trainer)
    with pytest.raises((Interrupted, RunError)) as error, Signals() as signals, saving_what_is_done(trainer, signals):
        trainer.train()
    return error.value


def equal(out, whole):
    """Compare the students and the optimizers of two finished runs."""
    a, b = (torch.load(folder / "model_final.pth", weights_only=False) for folder in (out, whole))
    assert all(value.equal(b["model"][name]) for name, value in a["model"].items())
    states = [c["trainer"]["_trainer"]["optimizer"]["state"].values() for c in (a, b)]
    assert all(x["momentum_buffer"].equal(y["momentum_buffer"]) for x, y in zip(*states))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_within_a_step_saves_the_step(arguments, tmp_path, number):  # noqa: F811
    out = tmp_path / "parts"
    whole_run(arguments("OUTPUT_DIR", tmp_path / "whole"))
    error = stopped(
        arguments("OUTPUT_DIR", out), lambda t: t._trainer.register_hooks([At(2, lambda: signalled(number))])
    )
    assert str(error) == f"interrupted: {out}/model_0000002.pth holds step 3 of 4"
    assert (error.remedy, error.status) == ("resumes there", 128 + number)
    assert torch.load(out / "model_0000002.pth", weights_only=False)["iteration"] == 2
    resumed = whole_run(arguments("OUTPUT_DIR", out, flags=["--resume"]))
    assert resumed.start_iter == 3
    equal(out, tmp_path / "whole")


def test_a_second_ctrl_c_does_not_wait_and_saves_no_half_step(arguments, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    twice = At(3, lambda: (signalled(), signalled(), signalled(signal.SIGINT)))
    error = stopped(arguments("OUTPUT_DIR", out), lambda t: t._trainer.register_hooks([twice]))
    assert str(error) == f"interrupted: {out}/model_0000001.pth holds step 2 of 4"
    first = stopped(
        arguments("OUTPUT_DIR", tmp_path / "other"),
        lambda t: t._trainer.register_hooks([At(0, lambda: (signalled(), signalled(signal.SIGINT)))]),
    )
    assert (str(first), first.remedy) == ("interrupted: nothing was saved", "starts at step 0")


@pytest.mark.parametrize(("period", "kept"), [(3, ("model_0000002", 3)), (0, ("model_final", 4))])
def test_a_signal_ends_an_evaluation_at_once(arguments, tmp_path, period, kept):  # noqa: F811
    """That after the last step is done by the resumed run."""
    calls, out = [], tmp_path / "run"

    def evaluation():
        calls.append(1)
        signalled()
        raise AssertionError

    opts = ("OUTPUT_DIR", out, "TEST.EVAL_PERIOD", period, "DISTILL.BEST", "")
    error = stopped(arguments(*opts), lambda t: None, evaluation)
    assert str(error) == f"interrupted: {out}/{kept[0]}.pth holds step {kept[1]} of 4" and calls == [1]
    assert (out / "last_checkpoint").read_text() == f"{kept[0]}.pth"
    resumed = built(arguments(*opts, flags=["--resume"]))
    for hook in resumed._hooks:
        if type(hook).__name__ == "EvalHook":
            hook._func = lambda: calls.append(2)
    resumed.train()
    assert calls == [1, 2] and resumed.start_iter == kept[1]


def test_a_signal_in_the_last_step_leaves_out_the_evaluation(arguments, tmp_path):  # noqa: F811
    calls, out = [], tmp_path / "run"
    error = stopped(
        arguments("OUTPUT_DIR", out), lambda t: t._trainer.register_hooks([At(3, signalled)]), lambda: calls.append(1)
    )
    assert str(error) == f"interrupted: {out}/model_final.pth holds step 4 of 4" and not calls


def test_an_error_between_two_steps_saves_the_one_before(arguments, tmp_path):  # noqa: F811
    """The loader has read nothing of the next step; an error within a step saves nothing."""
    out = tmp_path / "run"

    class Broken(FixedOrder):
        def __iter__(self):
            for batch in super().__iter__():
                if self.trainer.iter == 3:
                    raise RunError("the disk is gone")
                yield batch

    error = stopped(arguments("OUTPUT_DIR", out), lambda t: setattr(t._trainer, "data_loader", Broken(t)))
    assert str(error) == "the disk is gone" and (out / "last_checkpoint").read_text() == "model_0000002.pth"
    saved = torch.load(out / "model_0000002.pth", weights_only=False)
    assert saved["iteration"] == saved["trainer"]["iteration"] == 2
    log = (out / "log.txt").read_text()
    assert "The training ends early: the disk is gone" in log and "Traceback" not in log
    assert f"{out}/model_0000002.pth holds step 3 of 4" in log

    def fail():
        raise RunError("a bad step")

    other = tmp_path / "other"
    stopped(arguments("OUTPUT_DIR", other), lambda t: t._trainer.register_hooks([At(3, fail)]))
    assert (other / "last_checkpoint").read_text() == "model_0000001.pth"


def test_a_step_that_cannot_be_saved_does_not_hide_the_signal(arguments, tmp_path):  # noqa: F811
    def prepare(trainer):
        def full(name, **_):
            raise RunError("no room", name)

        trainer._trainer.register_hooks([At(2, lambda: (signalled(), setattr(trainer.checkpointer, "save", full)))])

    out = tmp_path / "run"
    error = stopped(arguments("OUTPUT_DIR", out), prepare)
    assert str(error) == f"interrupted: {out}/model_0000001.pth holds step 2 of 4"
    assert "step 3 is not saved: model_0000002: no room" in (out / "log.txt").read_text()


def test_the_command_says_where_a_run_resumes(arguments, tmp_path, monkeypatch, capsys):  # noqa: F811
    step = train_net.Trainer.run_step
    monkeypatch.setattr(train_net.Trainer, "run_step", lambda self: (step(self), self.iter or signalled()))
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as error:
        run(arguments("OUTPUT_DIR", out))
    assert error.value.code == 143 and not (out / "run.lock").exists()
    line = f"interrupted: {out}/model_0000000.pth holds step 1 of 4; the same command with --resume resumes there"
    assert capsys.readouterr().err.splitlines()[-1] == f"train_net.py: {line}"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_workers_of_every_loader_leave_signals_to_their_parent(arguments, tmp_path):  # noqa: F811
    command = arguments("OUTPUT_DIR", tmp_path / "run")
    trainer = train_net.Trainer(train_net.setup(train_net.parser().parse_args(command)))
    for grouped in (True, False):
        cfg = trainer.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouped
        loader = trainer.build_train_loader(cfg)
        loader = loader.dataset if grouped else loader
        assert loader.worker_init_fn.func is _start_worker and loader.worker_init_fn.args[0] is not None
    test = trainer.build_test_loader(trainer.cfg, "own_val")
    assert test.worker_init_fn.func is _start_worker
