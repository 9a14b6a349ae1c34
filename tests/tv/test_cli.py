"""The command: what it does, and that bad input ends in one line and a status that is not zero."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import acam_kd
from acam_kd import cli
from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.core.distiller import method_arguments
from acam_kd.tv.names import OPTIONS, SAME, option
from acam_kd.tv.run import Settings

from .conftest import STUDENT


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def quick(data, output, *more):
    return ["train", "--data", data, "--student", STUDENT, "--size", 64, "--iterations", 1, "--batch-size", 2] + [
        "--lr",
        0.01,
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


@pytest.mark.parametrize("left", ["output/run", "--method-of-mine 3"])
def test_an_unknown_argument_is_refused_with_the_usage_of_its_command(left, capsys):
    with pytest.raises(SystemExit) as error:
        run("eval", *left.split())
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "usage: acam-kd eval [options]; for example:" and "--student output/run" in lines[1]
    assert lines[-1] == f"acam-kd eval: error: unrecognized arguments: {left}"


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
        (
            lambda c: c.pop("images"),
            "found training data: .*train.json without a list 'images', expected lists of images, .* as in COCO format",
        ),
        (lambda c: c["categories"].clear(), "train.json with no categories, expected at least one"),
        (
            lambda c: c["images"][0].update(file_name="gone.png"),
            r"train.json: images\[0\] \(id 1\) without its file .*gone.png, expected every image in its place",
        ),
        (
            lambda c: c["annotations"][0].update(bbox=[500, 1, 5, 5]),
            "train.json: annotations.0. .id 1. with bbox .*, which lies outside its image, expected a box in 64 x 64 pixels",
        ),
        (
            lambda c: c["categories"][0].update(name="other"),
            "--val: found the categories .*, expected those of the training data, .*'other'",
        ),
    ],
)
def test_bad_data(data, tmp_path, refused, change, message):
    assert re.search(message, refused(*quick(broken(data, tmp_path, change), tmp_path / "out")))


def test_bad_options(data, finished, tmp_path, refused):
    out = tmp_path / "out"

    def check(arguments, start, *parts):
        message = refused(*arguments)
        assert message.startswith(f"acam-kd: {start}") and all(part in message for part in parts), message

    check(quick(data, out, "--student", "fcos"), "--student: found fcos, expected one of deeplabv3_")
    check(quick(tmp_path / "gone", out), "--data: found no dataset folder")
    check(
        quick(data, out, "--teacher", "fcos_resnet18_fpn"),
        "--teacher: found fcos_resnet18_fpn without weights, expected the folder of a finished run, or a name; ",
        "with a name give --teacher-weights",
    )
    check(
        quick(data, out, "--teacher", STUDENT, "--teacher-weights", tmp_path / "w.pth"),
        "--teacher-weights: found no file ",
        "w.pth",
    )
    # each argument of build_model is an option of the one that was asked for
    teacher = ("--teacher-weights", "DEFAULT", "--teacher")
    check(quick(data, out, *teacher, "fcos"), "--teacher: found fcos, expected one of deeplabv3_")
    check(quick(data, out, *teacher, STUDENT), f"--teacher-weights: found DEFAULT for {STUDENT}, expected a file")
    assert "backbone" not in refused(*quick(data, out, *teacher, STUDENT)).partition("expected")[2]
    check(
        quick(data, out, "--student-weights", "DEFAULT"),
        f"--student-weights: found DEFAULT for {STUDENT}, expected a file",
        "; or give weights of its backbone, --student-backbone-weights",
    )
    check(
        quick(data, out, "--student-backbone-weights", "X"),
        "--student-backbone-weights: found X for mobilenet_v3_small, expected one of DEFAULT, IMAGENET1K_V1",
    )
    check(
        quick(data, out, "--student", finished, "--student-backbone-weights", "DEFAULT"),
        "--student-backbone-weights: found DEFAULT, expected none: the folder ",
    )
    check(
        quick(data, out, "--teacher", finished, "--set", "beta=1"),
        "--set: found beta=1, expected NAME=VALUE with alpha=1.0",
    )
    check(quick(data, finished), "--output: found ", "give --resume to resume that run, or choose another --output")
    check(
        quick(data, finished, "--resume", "--inherit", "never", "--checkpoint-period", 7),
        "--iterations: found 1, expected 4, as in the run in ",
        "choose another --output",
    )
    check(quick(data, out, "--teacher", data), "--teacher: found no finished run in")
    check(quick(data, out, "--student", data), "--student: found no finished run in")
    check(("eval", "--data", data, "--student", data), "--student: found no finished run in")
    check(quick(data, out, "--method", "Mimic"), "--teacher: found none, expected a model to learn from")
    check(("eval", "--student", finished), "--val: found nothing, expected JSON IMAGES", "or --data FOLDER")
    check(("eval", "--data", data, "--student", STUDENT), f"--student: found {STUDENT} without weights")
    gone = tmp_path / "teachr"
    check(quick(data, out, "--teacher", gone), f"--teacher: found {gone}, which is neither a folder nor the name of")
    check(
        quick(data, out, "--teacher", gone, "--teacher-weights", gone), f"--teacher: found {gone}, where no folder is"
    )
    check(
        quick(data, out, "--teacher", "teachr"),
        "--teacher: found teachr, which is neither a folder nor the name of a model, expected the folder of a finished",
    )
    check(quick(data, out, "--student", "output/studnt"), "--student: found output/studnt, where no folder is")
    for name, value in (("--iterations", 0), ("--workers", -1), ("--lr", "nan"), ("--seed", -1), ("--warmup", -1)):
        with pytest.raises(SystemExit) as error:
            run(*quick(data, out, name, value))
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
    assert "which cannot be read" in message and "a whole image file" in message


def test_a_checkpoint_of_another_model(data, finished, tmp_path, refused):
    message = refused(
        "eval", "--data", data, "--student", STUDENT.replace("64", "32"), "--student-weights", finished / "student.pth"
    )
    assert message.startswith("acam-kd: --student-weights: found ") and message.endswith(
        "expected this model's weights"
    )
    torch.save({"a": torch.ones(1)}, tmp_path / "w.pth")
    message = refused(*quick(data, tmp_path / "out", "--teacher", STUDENT, "--teacher-weights", tmp_path / "w.pth"))
    assert re.search(
        r"with 0 of the model's \d+ tensors \(missing in the file: .* more; unknown to the model: a\)", message
    )


def test_pyramids_without_a_common_level(data, tmp_path, refused):
    out = tmp_path / "out"
    run(*quick(data, tmp_path / "teacher", "--student", "lraspp_mobilenet_v3_large"))
    message = refused(
        *quick(data, out, "--teacher", tmp_path / "teacher", "--student", "fcn_resnet50", "--levels", "in")
    )
    assert message == "acam-kd: --levels: found in, expected levels of the student: logits"


def test_the_console_script_is_this(tmp_path):
    done = subprocess.run([sys.executable, "-m", "acam_kd.cli", "--help"], capture_output=True, text=True, check=True)
    names = "train | doctor | eval | predict | export | check | compare | demo | shapes | crops | masks"
    assert names in " ".join(done.stdout.split())
    done = subprocess.run(
        [sys.executable, "-m", "acam_kd.cli", "eval", "--data", "gone", "--student", STUDENT],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1].startswith(
        "acam-kd: --data: found no dataset folder"
    )


def test_an_option_given_twice_keeps_both(data, finished, tmp_path):
    common = ["--data", str(data), "--student", STUDENT, "--teacher", str(finished), "--output", str(tmp_path)]
    twice = ["--set", "alpha=2", "--set", "lambda_div=3", "--levels", "0", "--levels", "1", "2"]
    asked = cli.train_settings([*common, *twice, "--taps", "backbone", "--taps", "classes"])
    assert asked.options == ("alpha=2", "lambda_div=3") and asked.levels == ("0", "1", "2")
    assert asked.taps == ("backbone", "classes")


def test_no_option_of_any_command_drops_what_was_asked_for():
    (commands,) = cli._parser()._subparsers._group_actions
    for name, parser in commands.choices.items():
        for action in parser._actions:
            if action.nargs in ("+", "*") and (name, action.dest) != ("predict", "images"):  # no flag to repeat
                assert isinstance(action, argparse._ExtendAction) and action.default == argparse.SUPPRESS, (
                    name,
                    action.dest,
                )


def test_hyper_parameters_without_a_method_are_refused(data, tmp_path, refused):
    message = "acam-kd: --set: found alpha=2, expected nothing without a method; choose a --method"
    assert refused(*quick(data, tmp_path / "out", "--set", "alpha=2")) == message


# Names in messages.

CODE = Path(acam_kd.__file__).parent
WORDS = {
    "--data, or the files of each split",
    "the data",
    "the folder of the run",
    "the run",
    "an image",
    "a label image",
}
"""The words for an argument that has no single option."""
NOT_OURS = {
    "teacher_channels",
    *("example_inputs", "path", "batch"),  # of calls in Python only
    *(
        "plan",
        "settings",
        "rows",
        "metrics",
        "key",
        "records",
        "seeds",
        "control",
        "threshold",
        "tuning",
        "mimicking",
    ),  # keys of a plan: acam-kd compare names them
    "teacher_backbone_weights",  # of the function that loads both models; a teacher is given none
}
ROLES = {"role": ("student", "teacher"), "split": ("train", "val"), "kind": ("spatial", "channel")}


def names_in(node):
    """List the names that the first argument of an error may have; none if it is a variable."""
    if isinstance(node, ast.Constant):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        parts = [
            [part.value]
            if isinstance(part, ast.Constant)
            else ROLES.get(ast.unparse(part.value).rpartition(".")[2], ["PKD"])
            for part in node.values
        ]
        return ["".join(choice) for choice in itertools.product(*parts)]
    if isinstance(node, ast.IfExp):
        return [*names_in(node.body), *names_in(node.orelse)]
    return []


def arguments_used():
    """All arguments in errors of the folders that the command runs: file -> names, and those in hints."""
    for folder in ("core", "data", "compare", "methods", "tv"):
        for path in sorted((CODE / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("ConfigError", "RunError"):
                    continue
                if node.func.id == "ConfigError":
                    given = node.args or [keyword.value for keyword in node.keywords if keyword.arg == "argument"]
                    yield from ((path, name) for name in names_in(given[0]))
                for part in (*node.args[1:], *(keyword.value for keyword in node.keywords)):
                    for text in ast.walk(part):
                        if isinstance(text, ast.Constant) and isinstance(text.value, str):
                            yield from ((path, name) for name in re.findall(r"{([a-z_]+)}", text.value))


def test_every_argument_has_a_name_in_the_command():
    (commands,) = cli._parser()._subparsers._group_actions
    options = {text for parser in commands.choices.values() for a in parser._actions for text in a.option_strings}
    of_methods = {name for method in dict(DISTILLER_REGISTRY).values() for name in method_arguments(method)}
    used = list(arguments_used())
    assert len(used) > 150 and {"teacher_levels", "spatial_masking", "val_split", "taps"} <= {name for _, name in used}
    for path, name in used:
        if name in NOT_OURS or (name in of_methods and path.relative_to(CODE).parts[0] in ("core", "methods")):
            continue
        assert option(name) in ({f"--set {name}"} if "." in name else options | WORDS), (path.name, name)
    for field in dataclasses.fields(Settings):
        assert option(field.name) in options, field.name
    assert {f"--{name.replace('_', '-')}" for name in SAME} <= options and not {*SAME} & {*OPTIONS}
    assert {value for value in OPTIONS.values() if value not in WORDS} <= options
    for name in of_methods:
        assert option(f"PKD.{name}") == f"--set PKD.{name}"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--iterations", "many", "must be a whole number, found 'many'"),
        ("--devices", "all", "must be a whole number, found 'all'"),
        ("--devices", "0", "must be at least 1, found 0"),
        ("--num-nodes", "1.5", "must be a whole number, found '1.5'"),
        ("--lr", "fast", "must be a number, found 'fast'"),
        ("--warmup", "", "must be a whole number, found ''"),
    ],
)
def test_a_value_of_another_kind_is_said_in_words(data, tmp_path, capsys, option, value, message):
    with pytest.raises(SystemExit):
        run(*quick(data, tmp_path / "out", option, value))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == f"acam-kd train: error: argument {option}: {message}"


def test_devices_may_be_chosen_by_lightning(data, tmp_path, capsys):
    run(*quick(data, tmp_path / "run", "--devices", "auto"))
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[-1].startswith("the student: ")
    assert "NaN" not in printed[-2] and json.loads(printed[-2])["APl"] is None  # no object is large
    run("eval", "--data", data, "--student", tmp_path / "run", "--workers", 0)
    assert capsys.readouterr().out.strip().splitlines()[-1] == printed[-2]


def test_training_without_lightning_is_one_line(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "acam_kd.tv.training", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(SystemExit, match=r"Lightning to be installed; pip install 'acam-kd\[lightning\]'"):
        cli.main(
            ["train", "--data", str(tmp_path), "--student", "fcos_resnet18_fpn", "--output", str(tmp_path / "run")]
        )
