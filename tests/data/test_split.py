"""A dataset without a split: found, divided by groups, written once, used again."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from acam_kd import cli
from acam_kd.data.coco import CocoSplit
from acam_kd.data.division import Division, choose, divide
from acam_kd.data.splits import find_whole

from .drawn import draw, objects, own_cache, refused, write  # noqa: F401

STUDENT = "fcos_mobilenet_v3_small_fpn64"


def coco(names, classes=("cat", "dog"), of=lambda number: (number % 2,)):
    """A json of images with these names; ``of`` says which classes image ``number`` has."""
    images = [{"id": n, "file_name": name, "width": 40, "height": 20} for n, name in enumerate(names, 1)]
    entry = {"bbox": [15, 5, 10, 10], "area": 100, "iscrowd": 0}
    pairs = [(n, c) for n in range(len(names)) for c in of(n)]
    annotations = [{"id": i, "image_id": n + 1, "category_id": c + 1, **entry} for i, (n, c) in enumerate(pairs, 1)]
    return {
        "info": {"year": 2020},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": c, "name": name} for c, name in enumerate(classes, 1)],
    }


@pytest.fixture
def whole(tmp_path):
    """Make 20 images of 5 scenes."""
    names = [f"scene{n // 4}_{n:03}.png" for n in range(20)]
    for name in names:
        draw(tmp_path / "set/images" / name)
    write(tmp_path / "set/annotations.json", json.dumps(coco(names)))
    return CocoSplit(str(tmp_path / "set/annotations.json"), str(tmp_path / "set/images"))


def names_of(parts):
    return [set(objects(parts[part])) for part in ("train", "val")]


def test_parts_are_disjoint_whole_and_the_same_each_time(whole, tmp_path, caplog):
    first = divide(whole, Division(0.2), tmp_path / "run")
    train, val = names_of(first)
    assert len(train) == 16 and len(val) == 4 and not train & val
    assert train | val == set(objects(whole))
    assert names_of(divide(whole, Division(0.2), tmp_path / "other")) == [train, val]
    assert first["val"] == CocoSplit(str(tmp_path / "run/split_val.json"), whole.image_root)
    seeds = {frozenset(names_of(divide(whole, Division(0.2, seed)))[1]) for seed in range(5)}
    assert len(seeds) == 5
    content = json.loads(Path(first["val"].json_file).read_text())
    assert content["info"] == {"year": 2020} and len(content["categories"]) == 2
    assert re.search(
        r"16 images \(16 groups\) to train on, 4 \(4 groups\) to validate on; objects: cat \d \+ ", caplog.text
    )


def test_an_image_does_not_change_sides_when_others_come(whole, tmp_path):
    """The order of the groups depends on their names alone."""
    before = names_of(divide(whole, Division(0.5)))[1]
    content = json.loads(Path(whole.json_file).read_text())
    content["images"].reverse()
    write(tmp_path / "other.json", json.dumps(content))
    assert names_of(divide(CocoSplit(str(tmp_path / "other.json"), whole.image_root), Division(0.5)))[1] == before


def test_groups_stay_together(whole):
    for seed in range(5):
        train, val = names_of(divide(whole, Division(0.2, seed, r"^([^_]+)_")))
        assert {name[:6] for name in train}.isdisjoint(name[:6] for name in val) and len(val) == 4
    assert Division(0.2, group_by=r"scene\d").group("a/scene3_7.jpg") == "scene3"
    assert Division(0.2, group_by=r"(x)?_").group("a_b") == ""


def test_every_class_of_two_groups_is_on_both_sides():
    """Rare classes come first; one of a single group stays where it is trained on."""
    sizes = dict.fromkeys((str(n) for n in range(100)), 1)
    for seed in range(20):
        classes = {group: {"common"} for group in sizes}
        for group in ("3", "50"):
            classes[group] = {"common", "rare"}
        for group in ("7", "8", "9"):
            classes[group] = {"few"}
        classes["11"] = {"single", "common"}
        val = choose(sizes, classes, Division(0.1, seed))
        sides = [Counter(c for g in sizes if (g in val) == side for c in classes[g]) for side in (False, True)]
        assert len(val) == 10 and sides[1]["rare"] == 1 and 1 <= sides[1]["few"] <= 2 and sides[0]["single"] == 1


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_very_unequal_sizes(seed):
    none = {"a": set(), "b": set(), "c": set()}
    assert choose({"a": 90, "b": 10}, none, Division(0.2, seed)) == {"b"}
    assert choose({"a": 50, "b": 60}, none, Division(0.2, seed)) == {"a"}
    assert choose({"a": 1, "b": 1}, none, Division(0.99, seed)) in ({"a"}, {"b"})
    assert choose({"a": 80, "b": 10, "c": 10}, {"a": {"x"}, "b": {"x"}, "c": {"x"}}, Division(0.1, seed)) < {"b", "c"}
    assert choose({"a": 2, "b": 1}, {"a": {"x"}, "b": {"y"}}, Division(0.3, seed)) == {"b"}


def test_classes_on_one_side_are_said(tmp_path, caplog):
    write(tmp_path / "a.json", json.dumps(coco(["a", "b", "c", "d"], of=lambda n: (0, 1) if n == 2 else (0,))))
    divide(CocoSplit(str(tmp_path / "a.json"), str(tmp_path)), Division(0.25))
    assert "no object to validate on of dog, which too few groups of images have" in caplog.text


def test_ids_of_several_types_and_annotations_of_no_image(tmp_path):
    """Each annotation stays with its image; one without goes to the part to train on, whose checks name it."""
    content = coco(["a", "b", "c", "d"], of=lambda n: (0,))
    content["annotations"][1]["image_id"] = "2"
    content["annotations"][2]["image_id"] = 3.0
    content["annotations"].append({**content["annotations"][0], "id": 9, "image_id": 77})
    write(tmp_path / "a.json", json.dumps(content))
    parts = divide(CocoSplit(str(tmp_path / "a.json"), str(tmp_path)), Division(0.25))
    read = {part: json.loads(Path(split.json_file).read_text()) for part, split in parts.items()}
    assert [len(read[part]["annotations"]) for part in ("train", "val")] == [4, 1]
    assert str(read["val"]["annotations"][0]["image_id"]).strip(".0") == str(read["val"]["images"][0]["id"])
    assert 77 in [entry["image_id"] for entry in read["train"]["annotations"]]


def test_the_parts_in_a_folder_are_used_again(whole, tmp_path, caplog):
    run = tmp_path / "run"
    parts = divide(whole, Division(0.2, 1, r"^([^_]+)_"), run)
    before = [Path(split.json_file).read_bytes() for split in parts.values()]
    assert divide(whole, Division(0.2, 1, r"^([^_]+)_"), run) == parts
    assert before == [Path(split.json_file).read_bytes() for split in parts.values()]
    assert f"the split in {run} is used" in caplog.text
    with refused(0.3, f"0.2, as in {run}/split_train.json", "choose another {output}", argument="val_fraction"):
        divide(whole, Division(0.3, 1, r"^([^_]+)_"), run)
    with refused(2, "1, as in ", argument="split_seed"):
        divide(whole, Division(0.2, 2, r"^([^_]+)_"), run)
    with refused("", "'^([^_]+)_', as in", argument="group_by"):
        divide(whole, Division(0.2, 1), run)
    Path(whole.json_file).write_text(Path(whole.json_file).read_text() + " ")
    with refused("data that changed since its split was made", "the same data, as in", argument="data"):
        divide(whole, Division(0.2, 1, r"^([^_]+)_"), run)
    write(run / "split_val.json", "{")
    write(run / "split_train.json", "{}")
    with refused("split_train.json, which is no part of a split", argument="output"):
        divide(whole, Division(0.2, 1), run)
    write(tmp_path / "file", "")
    with refused("file/run, which cannot be written (", "a folder to write into", argument="output"):
        divide(whole, Division(0.2, 1), tmp_path / "file/run")


def test_what_cannot_be_divided(whole, tmp_path):
    for value in (0, 1, -0.2, float("nan"), 20):
        with refused(value, "between 0 and 1", argument="val_fraction"):
            divide(whole, Division(value))
    with refused("( (missing ), unterminated", "a regular expression with one group", argument="group_by"):
        divide(whole, Division(0.2, group_by="("))
    with refused("take(.)_, which is not in scene0_000.png", "a part of each file name", argument="group_by"):
        divide(whole, Division(0.2, group_by="take(.)_"))
    with refused("1 group of images in ", "at least 2", argument="group_by"):
        divide(whole, Division(0.2, group_by="scene"))
    for text, value in (
        ("{", "which cannot be read as json"),
        ("[]", "without a list 'images' of entries"),
        ('{"images": [1], "annotations": [], "categories": []}', "without a list 'images' of entries"),
        ('{"images": [], "annotations": {}, "categories": []}', "without a list 'annotations' of entries"),
        (json.dumps(coco(["a"])), "1 group of images"),
        (json.dumps(coco([])), "0 group of images"),
    ):
        write(tmp_path / "bad.json", text)
        with refused(value):
            divide(CocoSplit(str(tmp_path / "bad.json"), "x"), Division(0.2))


def test_a_byte_order_mark(whole):
    path = Path(whole.json_file)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert find_whole(path.parent) == whole
    assert len(names_of(divide(whole, Division(0.2)))[1]) == 4


@pytest.mark.parametrize(
    ("json_file", "images", "prefix"),
    [
        ("annotations.json", "images", ""),
        ("annotations/instances_default.json", "images", ""),  # CVAT
        ("result.json", ".", "images/"),  # Label Studio
        ("_annotations.coco.json", ".", ""),
        ("annotations/all.json", "annotations", ""),
        ("train.json", "train", ""),  # one of the known layouts, without its other half
    ],
)
def test_one_json(tmp_path, json_file, images, prefix):
    draw(tmp_path / images / f"{prefix}a.png")
    write(tmp_path / json_file, json.dumps(coco([f"{prefix}a.png"])))
    found = find_whole(tmp_path)
    assert found.json_file == str(tmp_path / json_file)
    assert Path(found.image_root, f"{prefix}a.png").samefile(tmp_path / images / f"{prefix}a.png")


def test_datasets_that_have_a_split_or_nothing(whole, tmp_path):
    folder = Path(whole.json_file).parent
    write(folder / "other.json", "{}")
    with refused(f"no dataset without a split in {folder}", "one json", "{train_split}", argument="data"):
        find_whole(folder)
    with refused(f"no dataset folder {tmp_path}/gone", argument="data"):
        find_whole(tmp_path / "gone")
    for split in ("train", "val"):
        write(tmp_path / f"both/{split}.json", "{}")
        draw(tmp_path / f"both/{split}/a.png")
    with refused(f"a fraction beside {tmp_path}/both, which has a split", argument="val_fraction"):
        find_whole(tmp_path / "both")
    with refused("a,b beside", "none, because a json names", argument="classes"):
        (folder / "other.json").unlink()
        find_whole(folder, "a,b")


# The command.


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def train(data, output, *more):
    options = ("--student", STUDENT, "--size", 64, "--iterations", 1, "--batch-size", 2, "--workers", 0)
    run("train", *data, *options, "--accelerator", "cpu", "--output", output, *more)


def test_train_resume_and_evaluate(whole, tmp_path, capsys):
    data = ("--data", Path(whole.json_file).parent, "--val-fraction", 0.2, "--group-by", "^([^_]+)_")
    train(data, tmp_path / "run")
    printed = capsys.readouterr().out.splitlines()[-2]
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert settings["val_split"]["json_file"] == str(tmp_path / "run/split_val.json")
    train(data, tmp_path / "run", "--resume")
    run("eval", *data, "--student", tmp_path / "run", "--workers", 0)
    assert capsys.readouterr().out.splitlines()[-1] == printed, "the same part"
    named = ("--train", whole.json_file, whole.image_root, *data[2:])
    train(named, tmp_path / "named")
    assert all(
        len(json.loads((tmp_path / f"{run}/split_val.json").read_text())["images"]) == 4 for run in ("run", "named")
    )


@pytest.mark.parametrize("kind", ["yolo", "voc"])
def test_other_formats_are_trained_on(tmp_path, kind):
    """With a split and without one."""
    for name in ("a1", "a2", "b1", "b2"):
        if kind == "yolo":
            draw(tmp_path / f"set/images/{name}.png")
            write(tmp_path / f"set/labels/{name}.txt", "0 0.5 0.5 0.25 0.5\n")
        else:
            draw(tmp_path / f"set/JPEGImages/{name}.png")
            box = "<bndbox><xmin>16</xmin><ymin>6</ymin><xmax>25</xmax><ymax>15</ymax></bndbox>"
            write(tmp_path / f"set/Annotations/{name}.xml", f"<a><object><name>cat</name>{box}</object></a>")
    if kind == "yolo":
        write(tmp_path / "set/data.yaml", "names: [cat]\n")
    data = ("--data", tmp_path / "set")
    train((*data, "--val-fraction", 0.5, "--group-by", "^(.)"), tmp_path / "run")
    assert json.loads((tmp_path / "run/student.json").read_text())["categories"] == {"1": "cat"}
    if kind == "yolo":
        for split in ("train", "val"):
            write(tmp_path / f"set/{split}.txt", f"images/{split[0].replace('t', 'a').replace('v', 'b')}1.png\n")
        write(tmp_path / "set/data.yaml", "names: [cat]\ntrain: train.txt\nval: val.txt\n")
    else:
        write(tmp_path / "set/ImageSets/Main/train.txt", "a1\n")
        write(tmp_path / "set/ImageSets/Main/val.txt", "b1\n")
    train(data, tmp_path / "split")
    settings = json.loads((tmp_path / "split/settings.json").read_text())
    assert settings["val_split"]["json_file"].startswith(str(tmp_path / "cache/converted"))


def test_what_the_command_refuses(whole, tmp_path):
    folder = Path(whole.json_file).parent

    def check(message, *data):
        with pytest.raises(SystemExit) as error:
            train(data, tmp_path / "out")
        assert str(error.value.code).startswith(f"acam-kd: {message}"), error.value.code
        assert not (tmp_path / "out").exists()

    check(
        "--group-by: found x, expected none without a fraction; give --val-fraction",
        "--data",
        folder,
        "--group-by",
        "x",
    )
    check("--split-seed: found 2, expected none without a fraction", "--data", folder, "--split-seed", 2)
    check("--val-fraction: found a fraction without data, expected one dataset; give one of", "--val-fraction", 0.2)
    one = ("--train", whole.json_file, whole.image_root, "--val-fraction", 0.2)
    check("--val-fraction: found a fraction of two datasets", *one, "--data", folder)
    check("--val-fraction: found a fraction of two datasets", *one, "--val", whole.json_file, whole.image_root)
    check("--val-fraction: found 2.0, expected between 0 and 1", "--data", folder, "--val-fraction", 2)
    check("--data: found no train split in ", "--data", folder)
