"""Runs that are ended by signals, by kill -9, by full disks and by each other; each is a process of its own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from acam_kd.core.errors import ConfigError, RunError
from acam_kd.tv.build import evaluate
from acam_kd.tv.card import read_card
from acam_kd.tv.names import option
from acam_kd.tv.training import train

from .conftest import STUDENT
from .test_training import lines, not_a_number, same, student_of

SERVER = multiprocessing.get_context("forkserver")  # its processes start with everything imported
SERVER.set_forkserver_preload(["acam_kd.cli", "acam_kd.tv.training"])


def command(data, output, *more):
    common = ["train", "--data", data, "--student", STUDENT, "--size", 64, "--batch-size", 2, "--workers", 0]
    return [str(x) for x in (*common, "--accelerator", "cpu", "--output", output, *more)]


def run(log, arguments, prepare=None, *more):
    """The command, as a process runs it, with its words in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so would this
    from acam_kd import cli

    torch.set_num_threads(1)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if prepare is not None:
        prepare(*more)
    cli.main(arguments)


@pytest.fixture
def start(tmp_path):
    """Start a command; it is killed at the end of the test if it still runs."""
    with killed_at_the_end() as processes:

        def started(arguments, prepare=None, *more):
            log = tmp_path / f"log{len(processes)}"
            return begun(processes, log, run, arguments, prepare, *more)

        yield started


@contextlib.contextmanager
def killed_at_the_end():
    """A list of processes, which are killed if they still run."""
    processes = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def begun(processes, log, target, *arguments):
    """Start a process that writes a log, the target's first argument, and add it to those that are killed."""
    process = SERVER.Process(target=target, args=(log, *arguments))
    process.start()
    process.log = log
    processes.append(process)
    return process


def ended(process, timeout=240):
    """Wait for its end; return exit status and last line."""
    process.join(timeout)
    assert process.exitcode is not None, "it has not ended"
    return process.exitcode, [*process.log.read_text().splitlines(), ""][-2 if process.log.read_text() else 0]


def wait_for(process, there, timeout=240):
    until = time.monotonic() + timeout
    while not there():
        assert process.is_alive(), process.log.read_text()
        assert time.monotonic() < until
        time.sleep(0.02)


def undoubled(folder):
    """The lines of metrics.jsonl are JSON, ascend, and none is there twice."""
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line, parse_constant=not_a_number) for line in text.splitlines()]
    kinds = [(line["step"], "loss" in line, any(name.startswith("distill/") for name in line)) for line in found]
    assert len({*kinds}) == len(kinds) and [k[0] for k in kinds] == sorted(k[0] for k in kinds), kinds
    return found


# Two at once.


def together(barrier):
    barrier.wait(240)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_of_two_runs_in_one_folder_exactly_one_runs(data, tmp_path, start, resume):
    out, barrier = tmp_path / "run", SERVER.Barrier(2)
    more = ["--iterations", 3, *(["--resume"] if resume else [])]
    both = [start(command(data, out, "--seed", 0, *more), together, barrier) for _ in range(2)]
    found = sorted(ended(process) for process in both)
    assert [status for status, _ in found] == [0, 1], found
    message = found[1][1]
    assert message.startswith(f"acam-kd: --output: found {out}, in which another run is at work (")
    assert any(f"process {process.pid}" in message for process in both)
    assert len([line for line in undoubled(out) if "AP" in line]) == 1
    assert not (out / "run.lock").exists()


@pytest.mark.slow
def test_of_two_demos_in_one_folder_exactly_one_runs(tmp_path, start):
    demos = [start(["demo", "--output", str(tmp_path / "demo")], slow_demo) for _ in range(2)]
    wait_for(demos[0], lambda: not all(process.is_alive() for process in demos))
    status, message = ended(next(process for process in demos if not process.is_alive()))
    assert status == 1
    assert message.startswith(f"acam-kd: --output: found {tmp_path}/demo, in which another run is at work (")
    (other,) = [process for process in demos if process.is_alive()]
    os.kill(other.pid, signal.SIGINT)
    assert ended(other) == (130, "acam-kd: interrupted")


def slow_demo():
    from acam_kd import demo

    demo.make_shapes = lambda _: time.sleep(600)


# Signals.


def log_every_step():
    from acam_kd.tv import reports

    reports.LOG_PERIOD = 1


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_saves_the_step_and_says_which(data, tmp_path, start, number, status, workers):
    out = tmp_path / "run"
    arguments = command(data, out, "--iterations", 400, "--workers", workers)
    process = start(arguments, log_every_step)
    wait_for(process, lambda: (out / "metrics.jsonl").is_file() and len(lines(out)) >= 2)
    os.kill(process.pid, number)
    found, message = ended(process)
    checkpoint = torch.load(out / "last.ckpt", weights_only=True)
    step = checkpoint["global_step"]
    assert 2 <= step < 400 and step == lines(out)[-1]["step"]
    assert (found, message) == (
        status,
        f"acam-kd: interrupted: {out}/last.ckpt holds step {step} of 400; the same command with --resume resumes there",
    )
    assert sorted(os.listdir(out)) == [
        "README.txt",
        "data.json",
        "last.ckpt",
        "metrics.jsonl",
        "settings.json",
        "settings.yaml",
        "tensorboard",
    ]


@pytest.mark.slow
def test_a_signal_before_the_first_step_says_that_nothing_was_saved(data, tmp_path, start):
    out = tmp_path / "run"
    process = start(command(data, out), stop_in_build)
    assert ended(process) == (
        130,
        "acam-kd: interrupted: nothing was saved; the same command with --resume starts at step 0",
    )
    assert not out.exists()


def stop_in_build():
    from acam_kd.tv import training

    training.build_models = lambda *_, **__: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60))


@pytest.mark.slow
def test_what_an_interrupted_run_says_in_python(settings, tmp_path):
    """Between two checkpoints, too; and a run that is resumed and stopped at once keeps what it had."""
    settings = replace(settings, iterations=8, eval_period=3, checkpoint_period=100)

    def stop(_, step):
        if step == 3:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as error:
            train(settings, tmp_path / "run", observers=[stop], resume=True)
        assert str(error.value) == f"interrupted: {tmp_path}/run/last.ckpt holds step 3 of 8"
        assert (error.value.status, error.value.remedy) == (130, "resumes there")
    train(settings, tmp_path / "run", resume=True)
    assert [line["step"] for line in undoubled(tmp_path / "run") if "AP" in line] == [3, 6, 8]


# kill -9.


def kill_at(moment):
    """Let the process kill itself at a moment."""
    from acam_kd import files
    from acam_kd.tv import folder, loop, training

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    log_every_step()
    if moment == "while the models are built":
        training.build_models = kill
    elif moment == "within a step":
        step = loop.Training._train
        loop.Training._train = lambda self, *args: kill() if self.step == 3 else step(self, *args)
    elif moment == "while a checkpoint is written":
        sync, written = os.fsync, []

        def fsync(handle):
            size = os.fstat(handle).st_size
            written.append(size > 1 << 20)
            kill() if sum(written) == 2 else sync(handle)  # the second checkpoint

        files.os.fsync = fsync
    elif moment == "in an evaluation":
        loop.build_evaluator = kill
    else:
        folder.RunFolder.finish = kill


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The student of a run that nobody killed."""
    from acam_kd import cli

    out = tmp_path_factory.mktemp("whole") / "run"
    cli.main(command(data, out, "--iterations", 5, "--checkpoint-period", 2, "--eval-period", 4))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        ("while the models are built", None),
        ("within a step", 2),
        ("while a checkpoint is written", 2),
        ("in an evaluation", 4),
        ("before the result is written", 5),
    ],
)
def test_after_kill_9_a_run_resumes_bit_for_bit(data, tmp_path, start, whole, moment, kept):
    from acam_kd import cli

    out = tmp_path / "run"
    arguments = command(data, out, "--iterations", 5, "--checkpoint-period", 2, "--eval-period", 4)
    process = start(arguments, kill_at, moment)
    assert ended(process)[0] == -signal.SIGKILL
    assert (out / "run.lock").is_file() and not (out / "result.json").exists()
    assert (out / "student.pth").exists() == (kept == 5)
    if kept:
        assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == kept
    cli.main([*arguments, "--resume"])
    assert same(student_of(out), student_of(whole))
    assert [line["step"] for line in undoubled(out) if "AP" in line] == [4, 5]
    assert (
        json.loads((out / "result.json").read_text())["metrics"]
        == json.loads((whole / "result.json").read_text())["metrics"]
    )
    assert not [name for name in os.listdir(out) if name.startswith(".")] or moment == "while a checkpoint is written"


# Full disks, folders that cannot be written, foreign checkpoints.


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(data, tmp_path, start):
    """Checkpoints of AdamW have twice as many numbers as those of SGD: the first one is saved, the second is not."""
    from acam_kd import cli

    out = tmp_path / "run"
    common = ["--iterations", 4, "--checkpoint-period", 2]
    process = start(command(data, out, *common), limit_after_checkpoint)
    status, message = ended(process)
    assert (status, message) == (
        1,
        f"acam-kd: {out}/last.ckpt: writing failed (File too large); make room on the disk, or make the folder "
        "writable; then --resume resumes the run",
    )
    assert "last.ckpt holds step 2 of 4" in process.log.read_text() and "Traceback" not in process.log.read_text()
    assert torch.load(out / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not [name for name in os.listdir(out) if name.startswith(".last")]
    cli.main([*command(data, out, *common), "--resume"])
    assert read_card(out)[1].is_file()


def limit_after_checkpoint():
    from acam_kd.tv import folder

    write = folder.RunFolder.write_checkpoint

    def write_checkpoint(self, state):
        write(self, state)
        limit_files(1 << 20)

    folder.RunFolder.write_checkpoint = write_checkpoint


def test_a_folder_that_cannot_be_written_is_one_line(settings, tmp_path, monkeypatch):
    """Root writes wherever modes forbid it, so files stand where folders should be."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/pictures").write_text("a file")
    with pytest.raises(RunError) as error:
        train(settings, tmp_path / "run")
    line = error.value.render(option)
    assert line.startswith(f"{tmp_path}/run/pictures/step_2.jpg: writing failed (") and "--resume" in line
    assert torch.load(tmp_path / "run/last.ckpt", weights_only=True)["global_step"] == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").mkdir()
    with pytest.raises(RunError) as error:
        train(replace(settings, iterations=1), tmp_path / "other")
    assert str(error.value).startswith(f"{tmp_path}/other/metrics.jsonl: writing failed (Is a directory)")


def test_a_read_only_mount_is_one_line(settings, tmp_path):
    place = tmp_path / "mount"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=8m", "none", str(place)], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        with pytest.raises(ConfigError) as error:
            train(settings, place / "run")
        assert error.value.value == f"{place}/run, which cannot be written (Read-only file system)"
    finally:
        subprocess.run(["umount", str(place)], check=True)


class Foreign:
    """Something that only an unsafe load would take."""


def test_foreign_checkpoints_are_one_line(settings, finished, tmp_path):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/last.ckpt"
    good = torch.load(finished / "last.ckpt", weights_only=True)
    model = {name: value for name, value in good["state_dict"].items() if "head" not in name}

    def cut():
        torch.save(good, path)
        os.truncate(path, path.stat().st_size // 2)

    import zipfile

    def a_zip():
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "a zip")

    cases = {
        "it is no checkpoint": cut,
        "it cannot be read as a checkpoint (": a_zip,
        "it is no checkpoint of acam-kd (it lacks global_step": lambda: torch.save({"model": {}}, path),
        "it is no checkpoint of acam-kd": lambda: torch.save([1, 2], path),
        "it cannot be read as a checkpoint (Weights only": lambda: torch.save({"x": Foreign()}, path),
        "it is the checkpoint of another student (": lambda: torch.save({**good, "state_dict": model}, path),
        "it is the checkpoint of another student (see optimizer_states": lambda: torch.save(
            {**good, "optimizer_states": []}, path
        ),
    }
    for what, write in cases.items():
        write()
        with pytest.raises(RunError) as error:
            train(settings, tmp_path / "run", resume=True)
        line = error.value.render(option)
        assert line.startswith(f"{path}: {what}") and line.endswith("; delete it, and --resume starts anew"), line
        assert "\n" not in line and not (tmp_path / "run/student.pth").exists()


# Other data.


def test_other_data_is_named_when_a_run_is_resumed(settings, data, tmp_path):
    import shutil

    from acam_kd.data.coco import find_split

    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    own = replace(settings, train_split=find_split(copy, "train"), val_split=find_split(copy, "val"), eval_period=4)

    def stop(_, step):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "run", observers=[stop])

    def refused(argument, *parts):
        with pytest.raises(ConfigError) as error:
            train(own, tmp_path / "run", resume=True)
        assert error.value.argument == argument and all(part in error.value.value for part in parts), error.value
        assert error.value.allowed == f"the data that the run in {tmp_path}/run started with"
        assert "\n" not in error.value.render(option)

    def changed(change, split):
        path = copy / f"{split}.json"
        before = path.read_text()
        content = json.loads(before)
        change(content)
        path.write_text(json.dumps(content))
        return lambda: path.write_text(before)

    restore = changed(lambda c: c["annotations"].pop(), "train")
    refused("train_split", "another content of the json")
    restore()
    restore = changed(
        lambda c: c["images"].pop() and [c["annotations"].remove(a) for a in [*c["annotations"]] if a["image_id"] == 3],
        "val",
    )
    refused("val_split", "another content of the json", "2 image files (they were 3)")
    restore()
    both = [changed(lambda c: c["categories"][0].update(name="other"), split) for split in ("train", "val")]
    refused("train_split", "another content", "the classes", "'other'", "(they were {'1': 'plain disc'")
    [restore() for restore in both]
    image = sorted((copy / "train").iterdir())[0]
    content = image.read_bytes()
    image.write_bytes(content + b" ")
    refused(
        "train_split", f"other sizes of image files, {sum(p.stat().st_size for p in (copy / 'train').iterdir())} bytes"
    )
    image.write_bytes(content)
    train(own, tmp_path / "run", resume=True)


# Several processes.


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["auto", "2"])
def test_torchrun_starts_the_processes(data, tmp_path, devices):
    out = tmp_path / "run"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = command(data, out, "--iterations", 2, "--devices", devices)
    done = subprocess.run(
        [*torchrun, "acam_kd.cli", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line["step"] for line in undoubled(out) if "AP" in line] == [2]
    assert done.stdout.count("the student: ") == 1
    alone = evaluate(str(out), "", replace_split(data), workers=0)
    assert alone["AP"] == pytest.approx(json.loads((out / "result.json").read_text())["metrics"]["AP"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_slurm_starts_the_processes(data, tmp_path, nodes):
    """The variables of srun for two tasks on one machine, and for two machines, whose part this one plays twice."""
    out, number = tmp_path / "run", 2 // nodes
    arguments = command(data, out, "--iterations", 2, "--devices", number, "--num-nodes", nodes)
    variables = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": number, "SLURM_NNODES": nodes, "SLURM_JOB_ID": os.getpid()}
    processes = []
    for rank in range(2):
        own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank % number, "SLURM_NODEID": rank // number}
        slurm = {name: str(value) for name, value in {**variables, **own}.items()}
        environment = {**os.environ, **slurm, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
        environment |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "run"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "acam_kd.cli", *arguments],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [text[-2000:] for _, text in said]
    assert [line["step"] for line in undoubled(out) if "AP" in line] == [2]
    assert ["the student: " in text for text, _ in said] == [True, False]


def replace_split(data):
    from acam_kd.data.coco import find_split

    return find_split(data, "val")


@pytest.mark.slow
def test_sigterm_stops_all_processes_after_the_same_step(data, tmp_path, start):
    out = tmp_path / "run"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    arguments = command(data, out, "--iterations", 2000, "--devices", 2)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "acam_kd.cli", *arguments],
            env=environment,
            stderr=log,
            stdout=log,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 240
            while not (out / "metrics.jsonl").is_file():
                assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()
                time.sleep(0.05)
            os.kill(process.pid, signal.SIGTERM)
            status = process.wait(120)
        finally:
            process.kill()
    text = (tmp_path / "log").read_text()
    step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
    assert status == 143, text
    assert f"last.ckpt holds step {step} of 2000; the same command with --resume resumes there" in text and step >= 20
