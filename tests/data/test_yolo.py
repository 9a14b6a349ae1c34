"""YOLO's format as tools write it: layouts, data.yaml, label files, and each fault by file and line."""

from __future__ import annotations

import pytest
from PIL import Image

from acam_kd.core.errors import ConfigError, RunError
from acam_kd.data.check import check_coco
from acam_kd.data.splits import LabelSplit, find_any_split, find_whole, named_split

from .drawn import content, draw, objects, own_cache, refused, write  # noqa: F401

YAML = "path: .\ntrain: train/images\nval: valid/images\nnc: 2\nnames: [cat, dog]\n"
BOX = "1 0.5 0.5 0.25 0.5\n"
"""Of 10 x 10 pixels at 15, 5, in an image of 40 x 20."""
DOG = [("dog", 15, 5, 10, 10)]


@pytest.fixture
def folder(tmp_path):
    """Make Roboflow's layout: two images to train on, one to validate on."""
    folder = tmp_path / "set"
    for name in ("train/images/a.png", "train/images/b.png", "valid/images/c.png"):
        draw(folder / name)
        write(folder / name.replace("images", "labels").replace(".png", ".txt"), BOX)
    write(folder / "data.yaml", YAML)
    return folder


def label(folder, text):
    write(folder / "train/labels/a.txt", text)


def test_boxes(folder):
    train, val = (find_any_split(folder, split) for split in ("train", "val"))
    assert objects(train) == {"a.png": DOG, "b.png": DOG} and objects(val) == {"c.png": DOG}
    assert train.image_root == str(folder / "train/images")
    read = content(train)
    assert read["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    entry = {"category_id": 2, "bbox": [15, 5, 10, 10], "area": 100, "iscrowd": 0}
    assert read["annotations"] == [{"id": n, "image_id": n, **entry} for n in (1, 2)]


def test_polygons(folder):
    """A triangle: its box, and half of the box as its area; corners are moved into the image."""
    label(folder, "0 0.25 0.25 0.75 0.25 0.25 0.75\n" + BOX + "0 -0.005 0 0.5 0 0.5 1.004\n")
    first, box, third = content(find_any_split(folder, "train"))["annotations"][:3]
    assert first["segmentation"] == [[10, 5, 30, 5, 10, 15]]
    assert first["bbox"] == [10, 5, 20, 10] and first["area"] == 100
    assert "segmentation" not in box and third["segmentation"] == [[0, 0, 20, 0, 20, 20]]


@pytest.mark.parametrize(
    "names", ["{0: cat, 1: dog}", "\n  0: cat\n  1: dog", "['cat', 'dog']", '{"1": dog, "0": cat}', "\n- cat\n- dog"]
)
def test_names_as_list_or_dict(folder, names):
    write(folder / "data.yaml", f"train: train/images\nval: valid/images\nnames: {names}\n")
    assert objects(find_any_split(folder, "val")) == {"c.png": DOG}


def test_names_that_yaml_takes_for_something_else(folder):
    write(folder / "data.yaml", "train: train/images\nnames: [no, 1.50]\n")
    assert objects(find_any_split(folder, "train"))["a.png"] == [("1.50", 15, 5, 10, 10)]


@pytest.mark.parametrize(
    "text",
    [
        "train: ../train/images\nval: ../valid/images\n",  # Roboflow's, from one folder below
        "path: /content/set\ntrain: /content/set/train/images\nval: valid/images\n",  # of another machine
        "train: [train/images]\nval: [valid/images]\n",
        "train: train/images\nval:\ntest: valid/images\n",
        "",
    ],
)
def test_where_images_are(folder, text):
    write(folder / "data.yaml", f"{text}names: [cat, dog]\n")
    assert objects(find_any_split(folder, "train")) == {"a.png": DOG, "b.png": DOG}
    assert objects(find_any_split(folder, "val")) == {"c.png": DOG}


def test_a_yaml_file_elsewhere(folder, tmp_path):
    write(tmp_path / "configs/mine.yaml", YAML.replace("path: .", f"path: {folder}"))
    assert objects(find_any_split(tmp_path / "configs/mine.yaml", "val")) == {"c.png": DOG}
    write(tmp_path / "configs/mine.yaml", "names: [cat]\n")
    with refused(f"no val images in {tmp_path}/configs/mine.yaml", "a yaml file as YOLO's, with val", argument="data"):
        find_any_split(tmp_path / "configs/mine.yaml", "val")


def test_ultralytics_own_layout_and_lists(tmp_path):
    """Folders images/train and labels/train, deeper folders, and CVAT's lists of images."""
    for name in ("train/x/a.jpg", "train/b.jpg", "val/a.jpg"):
        draw(tmp_path / f"images/{name}")
        write(tmp_path / f"labels/{name.replace('.jpg', '.txt')}", BOX)
    write(tmp_path / "data.yaml", "names: [cat, dog]\ntrain: images/train\nval: images/val")
    assert objects(find_any_split(tmp_path, "train")) == {"b.jpg": DOG, "x/a.jpg": DOG}
    write(tmp_path / "train.txt", "data/images/train/b.jpg\n")
    write(tmp_path / "val.txt", "./images/val/a.jpg\n\n")
    write(tmp_path / "data.yaml", "names: [cat, dog]\ntrain: train.txt\nval: val.txt")
    assert objects(find_any_split(tmp_path, "train")) == {"b.jpg": DOG}
    assert objects(find_any_split(tmp_path, "val")) == {"a.jpg": DOG}
    write(tmp_path / "train.txt", "images/train/b.jpg\nimages/train/gone.jpg\n")
    with refused(f"{tmp_path}/train.txt:2: no image images/train/gone.jpg", "an existing image"):
        find_any_split(tmp_path, "train")


def test_label_files_beside_the_images(tmp_path):
    draw(tmp_path / "train/a.png")
    write(tmp_path / "train/a.txt", BOX)
    write(tmp_path / "data.yaml", "names: [cat, dog]\ntrain: train\n")
    assert objects(find_any_split(tmp_path, "train")) == {"a.png": DOG}


def test_without_a_yaml_file(folder, tmp_path):
    (folder / "data.yaml").unlink()
    found = "no names for the numbers in"
    with refused(found, "names with commas", f"or put data.yaml or classes.txt into {folder}", argument="classes"):
        find_any_split(folder, "train")
    assert objects(find_any_split(folder, "val", "cat,dog")) == {"c.png": DOG}
    write(folder / "classes.txt", "cat\ndog\n")
    assert objects(find_any_split(folder, "val")) == {"c.png": DOG}
    for split in (folder / "train", folder / "valid"):
        found = objects(named_split(str(split / "images"), str(split / "labels"), "cat,dog"))
        assert set(found) == {path.name for path in (split / "images").iterdir()}


def test_label_pngs_stay_label_pngs(folder):
    """The folders have the same names."""
    for path in folder.glob("train/labels/*.txt"):
        draw(path.with_suffix(".png"))
    assert isinstance(find_any_split(folder, "train", "a,b"), LabelSplit)
    assert isinstance(named_split(str(folder / "train/images"), str(folder / "train/labels"), "a,b"), LabelSplit)


def test_an_image_without_a_label_file_has_no_objects(folder, caplog):
    (folder / "train/labels/b.txt").unlink()
    write(folder / "train/labels/a.txt", "\n" + BOX + "\n")
    assert objects(find_any_split(folder, "train")) == {"a.png": DOG, "b.png": []}
    (message,) = [record.getMessage() for record in caplog.records if "no label file" in record.getMessage()]
    assert "1 of 2 images have no label file, so no objects; the first is" in message and "b.png" in message
    (folder / "train/labels/a.txt").unlink()
    with refused("2 images and no label file, the first is", f"its label file at {folder}/train/labels/a.txt"):
        find_any_split(folder, "train")


def test_the_size_is_that_of_the_turned_image(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "train/images/a.png").unlink()
    draw(folder / "train/images/a.jpg", exif=exif)
    image = content(find_any_split(folder, "train"))["images"][0]
    assert (image["width"], image["height"]) == (20, 40)


@pytest.mark.parametrize(
    ("text", "value", "allowed"),
    [
        ("2 0.5 0.5 0.1 0.1", ":1: class 2", "0 to 1, the numbers of the 2 class names"),
        ("-1 0.5 0.5 0.1 0.1", ":1: class -1", "0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", ":1: class 0.5", "0 to 1"),
        (BOX + "1 0.5 0.5 x 0.1", ":2: x, which is no finite number", "5 numbers (class, x, y, width, height), or 7"),
        (BOX + "\n1 0.5 nan 0.1 0.1", ":3: nan, which is no finite number", "5 numbers"),
        ("1 0.5 inf 0.1 0.1", ":1: inf, which is no finite number", "5 numbers"),
        ("cat 0.5 0.5 0.1 0.1", ":1: cat, which is no finite number", "5 numbers"),
        ("1 0.5 0.5 0.1", ":1: 4 numbers", "5 numbers"),
        ("1 0.5 0.5 0.1 0.1 0.9", ":1: 6 numbers", "5 numbers"),
        ("1 0.5 0.5 0.1 0.1 0.1 0.1 0.3", ":1: 8 numbers", "5 numbers"),
        ("1", ":1: 1 numbers", "5 numbers"),
        ("1 20 10 5 5", ":1: 20", "parts of the image's width and height, from 0 to 1"),
        ("1 0.5 0.5 0.1 1.2", ":1: 1.2", "parts of the image"),
        ("1 0.5 0.5 -0.005 0.1", ":1: a box of size -0.005 x 0.1", "a size of 0 to 1"),
        ("1,0.5,0.5,0.1,0.1", ":1: 1,0.5,0.5,0.1,0.1, which is no finite number", "5 numbers"),
    ],
)
def test_label_files_that_are_wrong(folder, cache, text, value, allowed):
    label(folder, text)
    with refused(f"{folder}/train/labels/a.txt{value}", allowed):
        find_any_split(folder, "train")
    assert not cache.exists() or not list(cache.rglob("*.json"))


def test_what_other_programs_read_is_read(folder):
    """Class numbers written as floats, a byte order mark, carriage returns, tabs."""
    (folder / "train/labels/a.txt").write_bytes(b"\xef\xbb\xbf1.0\t0.5 0.5 0.25 5e-1\r\n")
    assert objects(find_any_split(folder, "train"))["a.png"] == DOG


def test_keypoints_are_left_out_with_a_word(folder, caplog):
    write(folder / "data.yaml", f"{YAML}kpt_shape: [2, 3]\n")
    label(folder, "1 0.5 0.5 0.25 0.5 0.1 0.1 2 0.2 0.2 0")
    assert objects(find_any_split(folder, "train"))["a.png"] == DOG
    assert "keypoints are not read, the boxes of the objects are" in caplog.text
    write(folder / "data.yaml", f"{YAML}kpt_shape: many\n")
    with refused("data.yaml:6: kpt_shape many", "[number of keypoints, 2 or 3]"):
        find_any_split(folder, "train")


@pytest.mark.parametrize(
    ("text", "value", "allowed"),
    [
        ("train: train/images\nnames: [cat", "data.yaml:", "a yaml file as YOLO's"),
        ("- cat\n", "data.yaml without 'names'", "a yaml file with the names"),
        ("", "data.yaml without 'names'", "a yaml file with the names"),
        ("train: train/images\n", "data.yaml without 'names'", "a yaml file with the names"),
        ("nc: 3\nnames: [cat, dog]\n", "data.yaml:2: names: 2 of them beside nc: 3", "as many names as nc"),
        ("names: {0: cat, 2: dog}\n", "data.yaml:1: names: none for class 1", "a name for each number"),
        ("names: [cat, '']\n", "data.yaml:1: names: none for class 1", "a name for each number"),
        ("names: [cat, [dog]]\n", "data.yaml:1: names: none for class 1", "a name for each number"),
        ("names: [cat, cat]\n", "data.yaml:1: names: cat for 0 and 1", "different names"),
        ("names: {cat: 0}\n", "data.yaml:1: names: key cat", "class numbers from 0"),
        ("names: cat\n", "data.yaml:1: names: cat", "a list of names, or names by number"),
        ("names: {999999: cat}\n", "data.yaml:1: names: none for class 0", "a name for each number"),
        ("names: {0: cat, 99999999999999999999: dog}\n", "data.yaml:1: names: key 9999", "class numbers from 0"),
        ("names: " + "[" * 5000, "data.yaml: ", "a yaml file as YOLO's"),
        (f"names: [cat]\ntrain: {'x' * 5000}\n", "which does not exist", "a folder of images"),
        ("names: []\n", "data.yaml:1: names: []", "a list of names"),
        (
            "names: [cat, dog]\ntrain: gone/images\n",
            "data.yaml:2: train gone/images, which does not exist",
            "a folder of images",
        ),
    ],
)
def test_yaml_files_that_are_wrong(folder, text, value, allowed):
    write(folder / "data.yaml", text)
    with refused(value, allowed):
        find_any_split(folder, "train")


def test_classes_beside_a_yaml_file(folder):
    with refused("cat,dog beside ", "none, because that file names the classes", argument="classes"):
        find_any_split(folder, "train", "cat,dog")


def test_images_that_are_missing_or_broken(folder):
    (folder / "train/images/a.png").unlink()
    with refused(f"{folder}/train/labels/a.txt without its image", f"an image of that name in {folder}/train/images"):
        find_any_split(folder, "train")
    write(folder / "train/images/a.png", "no image")
    with refused(f"{folder}/train/images/a.png, which cannot be read", "a whole image file"):
        find_any_split(folder, "train")
    (folder / "train/images/b.png").unlink()
    (folder / "train/images/a.png").rename(folder / "train/images/other.png")
    with refused("train/labels/a.txt without its image, and 1 more"):
        find_any_split(folder, "train")
    (folder / "train/images/other.png").unlink()
    with refused(f"{folder}/data.yaml:2 with no images", "files named .jpg"):
        find_any_split(folder, "train")


def test_links_to_nothing_and_headers_of_too_many_pixels(folder, monkeypatch):
    (folder / "train/images/a.png").unlink()
    (folder / "train/images/a.png").symlink_to(folder / "gone.png")
    with refused(f"{folder}/data.yaml:2: no image {folder}/train/images/a.png", "an existing image"):
        find_any_split(folder, "train")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with refused(f"{folder}/valid/images/c.png, which cannot be read (Image size (800 pixels) exceeds limit"):
        find_any_split(folder, "val")


def test_paths_from_here_and_from_the_root(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write(folder / "data.yaml", f"names: [cat, dog]\ntrain: [{folder}/train/images, valid/images]\nval: valid/images\n")
    assert set(objects(find_any_split(".", "train"))) == {
        "train/images/a.png",
        "train/images/b.png",
        "valid/images/c.png",
    }
    assert objects(find_any_split("", "val")) == {"c.png": DOG}
    (folder / "train").rename(folder / "images")
    (folder / "images/images").rename(folder / "images/x")
    (folder / "images/labels").rename(folder / "labels")
    write(folder / "data.yaml", "names: [cat, dog]\ntrain: images\n")
    for path in sorted((folder / "images/x").iterdir()):
        path.rename(folder / "images" / path.name)
    assert objects(find_any_split(".", "train")) == {"a.png": DOG, "b.png": DOG}


def test_all_files_that_are_wrong_are_said_at_once(folder, caplog):
    for stem in "ab":
        write(folder / f"train/labels/{stem}.txt", "7 0.5 0.5 0.1 0.1")
    with refused("2 files that cannot be used, the first is ", "0 to 1"):
        find_any_split(folder, "train")
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [f"{stem}.txt:1: class 7, expected 0 to 1" in error for stem, error in zip("ab", errors)] == [True, True]


def test_a_trouble_that_the_check_finds_names_the_users_file(folder):
    """The json in the cache is nothing that a user knows, or could mend."""
    (folder / "data.yaml").write_text(YAML)
    found = find_any_split(folder, "train")
    Image.new("F", (40, 20)).save(folder / "train/images/c.tif")
    write(folder / "train/labels/c.txt", BOX)
    found = find_any_split(folder, "train")
    with pytest.raises(ConfigError) as error:
        check_coco(found.json_file, found.image_root, name="train")
    assert str(folder) in str(error.value) and found.json_file not in str(error.value)
    assert "c.tif" in str(error.value)


def test_converted_once_and_again_when_something_changes(folder, cache, monkeypatch):
    first = find_any_split(folder, "train")
    assert first.json_file.startswith(str(cache))
    monkeypatch.setattr("acam_kd.data.convert.image_size", None)  # would be called by a second conversion
    assert find_any_split(folder, "train") == first
    (folder / "train/images/a.png").touch()
    assert find_any_split(folder, "train") == first, "a copy of the data is the same data"
    monkeypatch.undo()
    monkeypatch.setenv("ACAM_KD_CACHE", str(cache))
    label(folder, BOX + BOX)
    second = find_any_split(folder, "train")
    assert second != first and len(objects(second)["a.png"]) == 2
    write(folder / "data.yaml", YAML.replace("cat", "cow"))
    assert find_any_split(folder, "train") != second


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    write(tmp_path / "file", "")
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "file"))
    with pytest.raises(RunError, match="writing failed .*; set ACAM_KD_CACHE to a folder that can be written"):
        find_any_split(folder, "train")


def test_train_and_val_of_the_same_images(folder, caplog):
    write(folder / "data.yaml", YAML.replace("valid", "train"))
    find_any_split(folder, "val")
    assert "train and val are the same images, so the results say nothing of new ones" in caplog.text
    assert set(objects(find_whole(folder))) == {"a.png", "b.png"}


def test_a_dataset_without_a_split(tmp_path):
    """Label Studio's layout."""
    draw(tmp_path / "images/a.png")
    write(tmp_path / "labels/a.txt", BOX)
    write(tmp_path / "classes.txt", "cat\ndog\n")
    assert objects(find_whole(tmp_path)) == {"a.png": DOG}
    with pytest.raises(ConfigError, match="no train split .* for a dataset without a split"):
        find_any_split(tmp_path, "train")
