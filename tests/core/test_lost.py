"""A process that a run depends on ends: one line in place of torch's error."""

from __future__ import annotations

import multiprocessing

import pytest
import torch

from acam_kd.core import RunError
from acam_kd.core.lost import lost_processes


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("DataLoader worker (pid(s) 12, 13) exited unexpectedly", "a process that reads images has ended"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "a process that reads images has ended (Killed)"),
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", "another process of the run"),
    ],
)
def test_a_lost_process_is_one_line(text, what):
    with pytest.raises(RunError) as error, lost_processes():
        raise RuntimeError(text)
    assert str(error.value).startswith(what) and error.value.remedy.endswith("then {resume} resumes the run")
    with pytest.raises(RuntimeError, match="size of tensor") as other, lost_processes():
        raise RuntimeError("The size of tensor a (3) must match")
    assert not isinstance(other.value, RunError)


class Batches(torch.utils.data.Dataset):
    """A dataset whose one image is what a function returns."""

    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.read()


def from_the_dead():
    here, there = multiprocessing.Pipe()
    there.close()
    here.recv()


def to_the_dead():
    here, there = multiprocessing.Pipe()
    there.close()
    here.send(1)


def half_a_file():
    raise EOFError


@pytest.mark.parametrize("read", [from_the_dead, to_the_dead])
def test_a_worker_that_dies_while_it_hands_over_a_batch_is_one_line(read):
    with pytest.raises(RunError, match="^a process that reads images has ended;"), lost_processes():
        next(iter(torch.utils.data.DataLoader(Batches(read))))
    with pytest.raises((EOFError, BrokenPipeError)), lost_processes():
        read()  # the connection is that of something else, as of a logger
    with pytest.raises(EOFError), lost_processes():
        next(iter(torch.utils.data.DataLoader(Batches(half_a_file))))
