"""The command: what it does, and that bad input ends in one line and a status that is not zero."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from acam_kd import cli

from .conftest import STUDENT


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def quick(data, output, *more):
    return ["train", "--data", data, "--student", STUDENT, "--size", 64, "--iterations", 1, "--batch-size", 2] + [
        "--workers",
        0,
        "--accelerator",
        "cpu",
        "--output",
        output,
        *more,
    ]


def test_train_distil_and_evaluate(data, finished, tmp_path, capsys):
    run(*quick(data, tmp_path / "acam", "--teacher", finished, "--set", "alpha=0.5", "num_masks=3"))
    out = capsys.readouterr().out.strip().splitlines()
    assert out[-1] == f"the student: {tmp_path / 'acam/student.pth'}"
    settings = json.loads((tmp_path / "acam/settings.json").read_text())
    assert settings["method"] == "ACAMKD" and settings["options"] == ["alpha=0.5", "num_masks=3"]
    run("eval", "--data", data, "--student", tmp_path / "acam", "--workers", 0)
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1]) == json.loads(out[-2])
    run(*quick(data, tmp_path / "acam", "--teacher", finished, "--set", "alpha=0.5", "num_masks=3", "--resume"))


def test_the_files_of_each_split_may_be_named(data, tmp_path):
    arguments = quick(data, tmp_path / "run")
    place = arguments.index("--data")
    files = [x for s in ("train", "val") for x in (f"--{s}", data / f"{s}.json", data / s)]
    run(*arguments[:place], *files, *arguments[place + 2 :])
    assert (tmp_path / "run/student.pth").is_file()


def test_without_a_command_or_with_an_unknown_one_the_usage_is_shown(capsys):
    for arguments in ([], ["distil"]):
        with pytest.raises(SystemExit) as error:
            run(*arguments)
        assert error.value.code == 2
    assert "usage: acam-kd" in capsys.readouterr().err


@pytest.fixture
def refused(data, finished, tmp_path):
    """Run, and return the one line; nothing that looks complete may be left."""

    def check(*arguments):
        with pytest.raises(SystemExit) as error:
            run(*arguments)
        message = str(error.value.code)
        assert message.startswith("acam-kd: ") and "\n" not in message
        assert not (tmp_path / "out/student.pth").exists() and not (tmp_path / "out/result.json").exists()
        return message

    return check


def broken(data, tmp_path, change):
    """The dataset with another train.json."""
    (tmp_path / "data").mkdir()
    for name in ("train", "val", "val.json"):
        (tmp_path / "data" / name).symlink_to(data / name)
    content = json.loads((data / "train.json").read_text())
    change(content)
    (tmp_path / "data/train.json").write_text(json.dumps(content))
    return tmp_path / "data"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "training data: .*train.json is not in COCO format: it has no list 'images'"),
        (lambda c: c["categories"].clear(), "has no categories"),
        (lambda c: c["images"][0].update(file_name="gone.png"), "image .*gone.png of .*train.json does not exist"),
        (lambda c: c["annotations"][0].update(bbox=[500, 1, 5, 5]), "lies outside its image, which is 64 x 64"),
        (lambda c: c["categories"][0].update(name="other"), "training data has the categories .*'other'.* validation"),
    ],
)
def test_bad_data(data, tmp_path, refused, change, message):
    import re

    assert re.search(message, refused(*quick(broken(data, tmp_path, change), tmp_path / "out")))


def test_bad_options(data, finished, tmp_path, refused):
    out = tmp_path / "out"
    assert "no model is called 'fcos'; known: " in refused(*quick(data, out, "--student", "fcos"))
    assert "no dataset folder" in refused(*quick(tmp_path / "gone", out))
    assert "has no weights: give the folder" in refused(*quick(data, out, "--teacher", "fcos_resnet18_fpn"))
    assert "w.pth (option: --teacher-weights)" in refused(
        *quick(data, out, "--teacher", STUDENT, "--teacher-weights", tmp_path / "w.pth")
    )
    assert "--set beta=1: ACAMKD knows alpha=1.0" in refused(
        *quick(data, out, "--teacher", finished, "--set", "beta=1")
    )
    assert "give --resume" in refused(*quick(data, finished))
    assert "there is no finished run in" in refused(*quick(data, out, "--teacher", data))
    assert "there is no teacher" in refused(*quick(data, out, "--method", "Mimic"))
    assert "there is no val data: give --data FOLDER" in refused("eval", "--student", finished)
    assert "has no weights" in refused("eval", "--data", data, "--student", STUDENT)
    for option, value in (("--iterations", 0), ("--workers", -1), ("--lr", "nan"), ("--seed", -1), ("--warmup", -1)):
        with pytest.raises(SystemExit) as error:
            run(*quick(data, out, option, value))
        assert error.value.code == 2
    assert not out.exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_also_by_a_worker(data, tmp_path, refused, workers):
    folder = broken(data, tmp_path, lambda content: None)
    (folder / "train").unlink()
    (folder / "train").mkdir()
    for image in (data / "train").iterdir():
        (folder / "train" / image.name).write_text("no image")
    message = refused(*quick(folder, tmp_path / "out", "--workers", workers))
    assert "cannot be read as an image" in message


def test_a_checkpoint_of_another_model(data, finished, tmp_path, refused):
    message = refused(
        "eval", "--data", data, "--student", STUDENT.replace("64", "32"), "--student-weights", finished / "student.pth"
    )
    assert "are not this model's (option: --student-weights): " in message
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    message = refused(*quick(data, tmp_path / "out", "--teacher", STUDENT, "--teacher-weights", tmp_path / "w.pth"))
    assert "missing in the file" in message and "a unknown to the model" not in message.split(";")[0]


def test_pyramids_without_a_common_level(data, tmp_path, refused):
    out = tmp_path / "out"
    run(*quick(data, tmp_path / "teacher", "--student", "lraspp_mobilenet_v3_large"))
    message = refused(
        *quick(data, out, "--teacher", tmp_path / "teacher", "--student", "fcn_resnet50", "--levels", "in")
    )
    assert "unknown level 'in'; the student has: logits (option: --levels)" in message


def test_the_console_script_is_this(tmp_path):
    done = subprocess.run([sys.executable, "-m", "acam_kd.cli", "--help"], capture_output=True, text=True, check=True)
    assert "train | eval | tokens | demo" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "acam_kd.cli", "eval", "--data", "gone", "--student", STUDENT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith("acam-kd: no dataset folder")
