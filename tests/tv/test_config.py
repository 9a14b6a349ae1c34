"""``--config``, the settings.yaml of a run, and defaults that follow from the data."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml

from acam_kd import cli
from acam_kd.data.splits import LabelSplit
from acam_kd.tv import defaults
from acam_kd.tv.defaults import COCO_IMAGES
from acam_kd.tv.run import Settings
from acam_kd.tv.training import train
from acam_kd.tv.written import as_options

from .conftest import STUDENT
from .test_cli import quick, run
from .test_cli import refused as refused


def options(path, **content):
    path.write_text(yaml.safe_dump({name.replace("_", "-"): value for name, value in content.items()}))
    return path


def asked(*arguments):
    return cli.train_settings([str(argument) for argument in arguments])


@pytest.fixture
def common(data, tmp_path):
    return ["--data", data, "--student", STUDENT, "--output", tmp_path / "out"]


# The file.


def test_flags_win_and_lists_are_replaced(common, tmp_path):
    file = options(tmp_path / "c.yaml", lr=0.5, warmup=7, set=["alpha=2"], levels=[0, 1], channels_last=True)
    found = asked(*common, "--config", file, "--lr", 0.25, "--set", "a=1", "--set", "b=2")
    assert (found.learning_rate, found.warmup, found.channels_last) == (0.25, 7, True)
    assert found.options == ("a=1", "b=2") and found.levels == ("0", "1")
    assert asked(*common, "--config", file).options == ("alpha=2",)


def test_required_options_may_be_in_the_file(data, tmp_path):
    file = options(tmp_path / "c.yaml", data=str(data), student=STUDENT, output=str(tmp_path), crop=[64, 32])
    found = asked("--config", file)
    assert found.student == STUDENT and found.crop == (64, 32)
    file.write_text(file.read_text().replace("student", "student_weights"))  # underscores do, too
    with pytest.raises(SystemExit) as error:
        asked("--config", file)
    assert error.value.code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour: red", "--config: found colour in FILE, expected one of the options data, "),
        ("- lr", "--config: found FILE, which is no mapping, expected lines of OPTION: VALUE"),
        ("lr: [", "--config: found FILE, which cannot be read (while parsing"),
        ("resume: 3", "--config: found resume: 3, expected true or false"),
        ("set: {alpha: 2}", "--config: found a mapping under set, expected a value, or a list of values"),
        ("config: other.yaml", "--config: found config in FILE, expected one of the options"),
        (None, "--config: found FILE, which cannot be read ("),
    ],
)
def test_bad_files_are_one_line(common, tmp_path, refused, text, message):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    assert refused("train", *common, "--config", file).startswith(f"acam-kd: {message.replace('FILE', str(file))}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations: 0", "argument --iterations: must be at least 1, found 0"),
        ("lr: fast", "argument --lr: must be a number, found 'fast'"),
        ("lr: [1, 2]", "argument --lr: must be a number, found '1\\n2\\n'"),
        ("inherit: perhaps", "argument --inherit: invalid choice: 'perhaps'"),
        ("crop: [64]", "argument --crop: expected 2 arguments"),
        ("method: PDK", "argument --method: found PDK"),
    ],
)
def test_bad_values_name_the_file(common, tmp_path, capsys, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        asked(*common, "--config", file)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(f"acam-kd train: error: {file}: {message}")


def test_values_are_taken_as_they_are_written(common, tmp_path):
    """YAML would make numbers and truth values of them."""
    file = tmp_path / "c.yaml"
    file.write_text("teacher_class_names: [yes, N/A, 'a,b', 012]\nlr: 1e-3\nclass-map:\nteacher: null\n")
    found = asked(*common, "--config", file)
    assert found.teacher_class_names == ("yes", "N/A", "a,b", "012") and found.learning_rate == 0.001
    assert found.class_map == () and found.teacher == ""


# The file of a run.


def test_settings_yaml_repeats_the_run(data, finished, tmp_path):
    more = ("--teacher", finished, "--method", "Mimic", "--set", "alpha=0.5", "--no-teacher-check")
    run(*quick(data, tmp_path / "run", *more))
    file = tmp_path / "run/settings.yaml"
    run("train", "--config", file, "--output", tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "settings.json").read_text()) for name in ("run", "again"))
    assert first == again and first["method"] == "Mimic"
    assert file.read_text() == (tmp_path / "again/settings.yaml").read_text()
    run("train", "--config", file, "--output", tmp_path / "run", "--resume")


def test_every_setting_is_repeated(settings, tmp_path):
    other = {
        **{"student_weights": "a.pth", "student_backbone_weights": "DEFAULT", "teacher": "t", "teacher_weights": "N"},
        **{"teacher_classes": 3, "teacher_class_names": ("N/A", "a/b"), "class_map": ("a=b", "c=d"), "method": "PKD"},
        **{"options": ("alpha=2",), "inherit": "always", "taps": ("logits",), "levels": ("0", "1")},
        **{"distill_period": 2, "teacher_precision": "float16", "teacher_compile": True, "no_teacher_check": True},
        **{"channels_last": True, "size": 96, "iterations": 5, "batch_size": 3, "optimizer": "adamw", "seed": 4},
        **{"augment": "crop", "fraction": 0.5, "leave_out": ("a", "b"), "mixup": 0.2, "cutmix": 1.0},
        **{"augmentor": "hard", "augmentor_ratio": 3, "augmentor_thresholds": (0.5, 2.0)},
        **{
            "learning_rate": 0.1,
            "schedule": "poly",
            "warmup": 0,
            "crop": (32, 64),
            "eval_period": 6,
            "ema": 0.9,
            "logger": ("csv",),
            "devices": "auto",
        },
        **{"student_backbone_order": "BGR", "freeze_stages": 0, "freeze_norm": "trained"},
        **{"pixel_mean": (0.5, 0.25, 0.75), "pixel_std": (1.0, 0.5, 0.25)},
        **{"weight": "share", "share": 0.25, "warmup_iters": 8, "stop_at": 9},
        **{"unlabelled": ("a", "b c"), "unlabelled_batch": 3, "unlabelled_weight": 0.0, "unlabelled_start": 2},
        **{"unlabelled_keep_norms": True, "pseudo_labels": 0.3},
        **{"checkpoint_period": 7, "num_nodes": 2, "accelerator": "gpu", "precision": "16-mixed", "workers": 5},
    }
    fields = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {*other, "train_split", "val_split", "student", "epochs"} == {*fields}
    assert all(value != fields[name] for name, value in other.items())
    folders = [tmp_path / "images", tmp_path / "labels"]
    for folder in folders:
        folder.mkdir()
    split = LabelSplit(*map(str, folders), ("sky", "road/path", "a,b"), "16bit")
    for whole in (settings, dataclasses.replace(settings, train_split=split, val_split=split, **other)):
        file = tmp_path / "settings.yaml"
        file.write_text(yaml.safe_dump(as_options(whole)))
        assert asked("--config", file, "--output", tmp_path) == whole
    none = dataclasses.replace(settings, teacher="t")  # a teacher to inherit from, and no method
    file.write_text(yaml.safe_dump(as_options(none)))
    assert asked("--config", file, "--output", tmp_path).method == ""


# Defaults.


def test_the_rule(settings):
    free = dataclasses.replace(settings, iterations=0, learning_rate=0.0, batch_size=16)
    free = dataclasses.replace(free, eval_period=0, checkpoint_period=0)

    def scaled(images, **change):
        found = defaults.scaled(dataclasses.replace(free, **change), images)
        assert found.epochs == 0
        return found.iterations, found.learning_rate

    assert scaled(COCO_IMAGES) == (90000, 0.01)
    assert scaled(COCO_IMAGES, batch_size=64) == (22500, 0.04)
    assert scaled(300) == (3000, 0.01) and scaled(300, batch_size=2) == (24000, 0.00125)
    assert scaled(300, epochs=8) == (150, 0.01) and scaled(3, epochs=1) == (1, 0.01)  # no floor where it was asked for
    assert scaled(300, optimizer="adamw")[1] == 0.0002
    assert math.isclose(scaled(300, optimizer="adamw", batch_size=64)[1], 0.0004)
    assert scaled(300, iterations=7, learning_rate=0.5, optimizer="adamw") == (7, 0.5)
    assert scaled(300, iterations=7, epochs=3) == (7, 0.01)

    def periods(**change):
        found = defaults.scaled(dataclasses.replace(free, **change), 300)
        return found.eval_period, found.checkpoint_period

    assert periods() == (750, 300)  # of 3000
    assert periods(iterations=90000) == (5000, 1000) and periods(iterations=7) == (100, 100)
    assert periods(iterations=90000, eval_period=20000, checkpoint_period=3) == (20000, 3)


def test_epochs_are_counted_printed_and_resumed(data, tmp_path, refused, capsys):
    start = quick(data, tmp_path / "run")
    for name in ("--iterations", "--lr"):
        place = start.index(name)
        start = start[:place] + start[place + 2 :]
    run(*start, "--epochs", 1)
    assert (
        "3 iterations of 2 images: 1.0 epochs of 6; learning rate 0.00125; evaluated at the end"
        in capsys.readouterr().err
    )
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["iterations"], settings["learning_rate"]) == (3, 0.00125)
    file = tmp_path / "run/settings.yaml"
    assert yaml.safe_load(file.read_text())["iterations"] == 3
    assert asked("--config", file, "--output", tmp_path, "--epochs", 5).epochs == 5  # the file's iterations give way
    (tmp_path / "run/result.json").unlink()
    (tmp_path / "run/student.pth").unlink()
    line = refused(*start, "--output", tmp_path / "run", "--resume", "--epochs", 2)
    assert line.startswith("acam-kd: --iterations: found 6, expected 3, as in the run in ")
    for more in (("--epochs", 1), ()):
        run(*start, "--resume", *more)
    assert (tmp_path / "run/result.json").is_file()
    line = refused("train", *start[1:], "--output", tmp_path / "out", "--epochs", 1, "--iterations", 2)
    assert (
        line
        == "acam-kd: --epochs: found 1.0, expected none beside --iterations; choose one of --epochs and --iterations"
    )


def test_settings_of_python_are_filled_in_too(settings, tmp_path):
    train(dataclasses.replace(settings, iterations=0, learning_rate=0.0, epochs=0.3), tmp_path / "run")
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["iterations"], settings["learning_rate"]) == (1, 0.00125)


# The help.


@pytest.mark.parametrize("command", ["train", "eval", "check", "compare", "crops", "demo", "shapes", "masks"])
def test_the_help_begins_with_a_command_to_copy(command, capsys):
    with pytest.raises(SystemExit):
        run(command, "--help")
    text = capsys.readouterr().out
    assert text.splitlines()[1].strip().startswith(f"acam-kd {command}")
    assert "(default: )" not in text and "None" not in text and "==SUPPRESS==" not in text


def test_shapes_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("acam_kd.data.shapes.SPLITS", {"train": 2, "val": 1})
    run("shapes", "--output", tmp_path, "--size", 64, "--seed", 3)
    folder = tmp_path / "shapes_64_3"
    assert capsys.readouterr().out.strip() == str(folder) and (folder / "train.json").is_file()
    with pytest.raises(SystemExit) as error:
        run("shapes", "--size", 63)
    assert error.value.code == 2 and "argument --size: found 63, expected at least 64" in capsys.readouterr().err
