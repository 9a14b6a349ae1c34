"""Classification datasets: folders, tables, their division, and what is wrong with them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.data.division import Division
from acam_kd.data.folders import ClassSplit, divide_classes, find_classes, list_images
from acam_kd.data.splits import find_any_split, find_whole


def fill(root, counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def whole(tmp_path):
    return fill(tmp_path / "all", {"bee": 10, "ant": 5})


def test_folders_are_classes_in_the_order_of_their_names(tmp_path):
    fill(tmp_path / "train", {"bee": 2, "ant": 1})
    fill(tmp_path / "val", {"bee": 1, "ant": 1})
    found = list_images(find_any_split(tmp_path, "train"))
    assert found.classes == ("ant", "bee") and found.labels == (0, 1, 1)
    assert len(list_images(find_any_split(tmp_path, "val")).files) == 2


def test_a_division_takes_its_fraction_of_every_class(whole):
    split = find_whole(whole)
    assert isinstance(split, ClassSplit)
    parts = {name: list_images(part) for name, part in divide_classes(split, Division(0.2)).items()}
    assert sorted(parts["val"].labels) == [0, 1, 1] and len(parts["train"].files) == 12
    assert not {*parts["val"].files} & {*parts["train"].files}
    other = list_images(divide_classes(split, Division(0.2, split_seed=1))["val"])
    assert other.files != parts["val"].files


def test_groups_stay_together(whole):
    parts = divide_classes(find_whole(whole), Division(0.5, group_by=r"(\d)\.png$"))
    numbers = {name: {path[-5] for path in list_images(part).files} for name, part in parts.items()}
    assert not numbers["train"] & numbers["val"]


def test_a_table_names_paths_and_classes(whole):
    table = whole / "train.csv"
    table.write_text("path,class\nbee/0.png,x\nant/0.png,y\n")
    found = list_images(find_classes(whole, "train"))
    assert found.classes == ("x", "y") and [path[-9:] for path in found.files] == ["bee/0.png", "ant/0.png"]
    assert isinstance(find_whole(table), ClassSplit)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("path,class\nbee/0.png,\n", "line 2 of"),
        ("path,class\nbee/none.png,x\n", "none.png"),
        ("file,label\nbee/0.png,x\n", "without path or class"),
        ("path,class\n", "no line in"),
        ("path,class\nbee/0.png,x\n", "1 classes"),
    ],
)
def test_a_broken_table_is_one_line(whole, text, value):
    (whole / "train.csv").write_text(text)
    with pytest.raises(ConfigError) as error:
        list_images(find_classes(whole, "train"))
    assert error.value.argument == "dataset" and value in str(error.value.value) and "\n" not in str(error.value)


def test_a_class_without_images_is_named(whole):
    (whole / "cat").mkdir()
    with pytest.raises(ConfigError, match="cat without images"):
        list_images(find_whole(whole))


def test_the_options_of_a_split_give_it_again(whole):
    part = divide_classes(find_whole(whole), Division(0.2, 3))["val"]
    expected = {"data": str(whole), "image-range": "auto", "val-fraction": 0.2, "split-seed": 3}
    assert part.as_options() == expected


def test_one_folder_of_images_is_no_classification(tmp_path):
    fill(tmp_path, {"images": 3})
    assert find_classes(tmp_path, "all") is None
