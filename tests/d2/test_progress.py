"""The progress line of a Detectron2 run: on a terminal, and nowhere else."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from detectron2.engine import HookBase

import train_net
from acam_kd.d2.progress import _is_terminal

from .running import run as command


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def handler(monkeypatch):
    """The handler of a terminal, as Detectron2's setup_logger adds one, and no other: an earlier test's may be closed."""
    made = logging.StreamHandler(Terminal())
    monkeypatch.setattr(logging.getLogger("detectron2"), "handlers", [made])
    return made


def test_on_a_terminal_there_is_one_line(arguments, tmp_path, monkeypatch, handler):  # noqa: F811
    terminal = handler.stream
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("acam_kd.report.progress.REDRAW", 0)
    own = "MODEL.RETINANET.PRIOR_PROB", 0.3, "DISTILL.ACAMKD.FEATURES", "raw"
    command(arguments("OUTPUT_DIR", tmp_path / "run", "TEST.EVAL_PERIOD", 2, *own))
    drawn = [part for part in terminal.getvalue().split("\r\x1b[K") if part.startswith("step ")]
    assert [text.split("  ")[0] for text in drawn] == [f"step {n}/4" for n in (1, 2, 3, 4)]
    assert " left  " in drawn[0] and "images/s  lr " in drawn[0]
    assert "bbox/AP" not in drawn[0] and "bbox/AP 0.00 at 2  lr " in drawn[2]
    messages = [text for text in terminal.getvalue().splitlines() if "iter: 3" in text]
    assert not messages and handler.filters == []
    assert "iter: 3" in (tmp_path / "run" / "log.txt").read_text()


def test_a_handler_of_a_closed_stream_is_no_terminal(handler):
    assert _is_terminal(handler)
    handler.stream.close()
    assert not _is_terminal(handler)


def test_without_a_terminal_the_lines_are_detectron2s(arguments, tmp_path):  # noqa: F811
    args = train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / "run"))
    trainer = train_net.Trainer(train_net.setup(args))
    assert not [hook for hook in trainer._hooks if type(hook).__name__ == "ProgressLine"]


def test_an_error_gives_the_terminal_back(arguments, tmp_path, monkeypatch, handler):  # noqa: F811
    class Broken(HookBase):
        def after_step(self):
            raise OverflowError

    monkeypatch.setattr(sys, "stderr", handler.stream)
    args = train_net.parser().parse_args(arguments("OUTPUT_DIR", tmp_path / "run"))
    trainer = train_net.Trainer(train_net.setup(args))
    trainer.register_hooks([Broken()])
    with pytest.raises(OverflowError):
        trainer.train()
    assert handler.filters == [] and "\r\x1b[Kstep 1/4  " in handler.stream.getvalue()
