"""Signals between two steps, and in the processes that a run has started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from acam_kd.core.interrupts import Interrupted, PassedOn, Signals, leave_to_parent, one_line_interruption


def send(number, pid=None):
    os.kill(os.getpid() if pid is None else pid, number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_for_the_end_of_a_step(number):
    done = []
    with pytest.raises(Interrupted) as error, Signals() as signals, signals.step():
        send(number)
        done.append(1)
    assert done and (error.value.number, error.value.status) == (number, 128 + number)


def test_a_second_ctrl_c_does_not_wait_and_a_second_sigterm_does():
    with Signals() as signals, signals.together(True):
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
    assert signals.received == signal.SIGTERM


def test_sigterm_does_nothing_while_an_interrupted_run_is_put_in_order():
    with Signals():
        with pytest.raises(Interrupted):
            send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_of_another_process_stops_this_one():
    signals = Signals()
    with pytest.raises(Interrupted) as error:
        signals.stop(signal.SIGTERM)
    assert error.value.status == 143 and signals.received == signal.SIGTERM


def test_the_line_of_an_interrupted_program(capsys):
    def ended(error, **options):
        with pytest.raises(SystemExit) as end, one_line_interruption("acam-kd", **options):
            raise error
        return end.value.code, capsys.readouterr().err

    again = {"again": "the command"}
    assert ended(Interrupted("x holds step 2 of 4", signal.SIGTERM), **again) == (
        143, "acam-kd: interrupted: x holds step 2 of 4; the command resumes there\n",
    )  # fmt: skip
    assert ended(Interrupted(), **again) == (
        130, "acam-kd: interrupted: nothing was saved; the command starts at step 0\n",
    )  # fmt: skip
    assert ended(KeyboardInterrupt(), **again) == (130, "acam-kd: interrupted\n")
    assert ended(Interrupted(number=signal.SIGTERM), said=False) == (143, "")


def worker(ready):
    leave_to_parent()
    ready.set()
    while True:
        time.sleep(0.01)


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_a_worker_ends_with_its_parent_and_by_nobody_else(method):
    """The system's parent of a worker that a server started is the server."""
    context = multiprocessing.get_context(method)
    ready = context.Event()
    process = context.Process(target=worker, args=(ready,))
    process.start()
    assert ready.wait(60)
    for number in (signal.SIGTERM, signal.SIGINT):
        stranger = context.Process(target=send, args=(number, process.pid))
        stranger.start()
        stranger.join(60)
        assert stranger.exitcode == 0
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(60)
    assert process.exitcode == 0


def waiting(ready):
    with pytest.raises(Interrupted), Signals():
        ready.set()
        time.sleep(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_the_processes_of_a_run(number):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=waiting, args=(ready,))
    process.start()
    with PassedOn() as passed:
        assert ready.wait(60)
        send(number)
        process.join(60)
    assert passed.received == number and process.exitcode == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
