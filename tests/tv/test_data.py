"""The images and targets of a COCO json, and their order."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.data.coco import CocoSplit, find_split
from acam_kd.tv.data import CocoImages, Stream, evaluation_loader, label_of, training_loader


def test_coco_ids_keep_their_numbers_and_others_are_counted():
    coco = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
    assert label_of(coco) == {i: i for i in coco}
    assert label_of([0, 1, 2]) == {0: 1, 1: 2, 2: 3}  # 0 is the background
    assert label_of([900, 7]) == {7: 1, 900: 2}


@pytest.fixture
def one(tmp_path):
    """Return a function that writes one image, 8 x 6, with a box inside, a box beyond its edge, an empty box and a crowd."""

    def make(**changes):
        (tmp_path / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "images/a.png"), np.full((6, 8, 3), (0, 51, 255), np.uint8))
        boxes = [[1, 1, 4, 3], [6, 2, 10, 10], [2, 2, 0, 3], [0, 0, 8, 6]]
        content = {
            "images": [{"id": 5, "file_name": "a.png", "width": 8, "height": 6}],
            "categories": [{"id": 0, "name": "x"}, {"id": 4, "name": "y"}],
            "annotations": [
                {
                    "id": i + 1,
                    "image_id": 5,
                    "category_id": 4 * (i == 0),
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": int(i == 3),
                    "segmentation": [[box[0], box[1], box[0] + 4, box[1], box[0] + 4, box[1] + 3, box[0], box[1] + 3]],
                }
                for i, box in enumerate(boxes)
            ],
            **changes,
        }
        (tmp_path / "a.json").write_text(json.dumps(content))
        return CocoSplit(str(tmp_path / "a.json"), str(tmp_path / "images"))

    return make


def test_targets_are_torchvisions(one):
    image, target = CocoImages(one())[0]
    assert image.dtype == torch.float32 and type(image) is torch.Tensor
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([1.0, 0.2, 0.0]))  # RGB
    assert target["boxes"].tolist() == [[1, 1, 5, 4], [6, 2, 8, 6]]  # clipped; no crowd, nothing empty
    assert target["labels"].tolist() == [2, 1] and target["image_id"] == 5
    masks = CocoImages(one(), masks=True)[0][1]["masks"]
    assert masks.shape == (2, 6, 8) and masks[0].sum() == 12 and masks[0, 1:4, 1:5].all()


def test_an_image_without_objects_has_empty_targets(one):
    split = one()
    file = Path(split.json_file)
    content = json.loads(file.read_text())
    content["images"].append({**content["images"][0], "id": 6})
    file.write_text(json.dumps(content))
    target = CocoImages(split, masks=True)[1][1]
    assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["masks"].shape == (0, 6, 8)


def test_semantic_labels_are_those_that_the_dataset_has_drawn(data):
    dataset = CocoImages(find_split(data, "train"), semantic=True)
    for index, number in enumerate(range(6)):
        drawn = torch.from_numpy(cv2.imread(str(data / f"train_labels/{number:05d}.png"), cv2.IMREAD_GRAYSCALE)).long()
        semantic = dataset[index][1]["semantic"]
        differs = (semantic != drawn).numpy().astype(np.uint8)
        assert semantic.dtype == torch.int64 and differs.mean() < 0.06
        assert not cv2.erode(differs, np.ones((3, 3))).any()  # only lines: borders are rounded in two ways


def test_the_seed_of_an_item_decides_its_augmentation(data):
    dataset = CocoImages(find_split(data, "train"))
    plain, target = dataset[0]
    flips = 0
    for seed in range(10):
        torch.rand(seed)  # whatever else draws random numbers
        state = torch.get_rng_state()
        image, flipped = dataset[0, seed]
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(image, dataset[0, seed][0])
        if not torch.equal(image, plain):
            flips += 1
            assert torch.equal(image, plain.flip(2))
            assert torch.equal(flipped["boxes"][:, [2, 0]], 64 - target["boxes"][:, [0, 2]])
    assert 0 < flips < 10


def test_a_stream_is_every_image_once_an_epoch_and_the_same_from_any_start():
    stream = Stream(7, batch_size=4, batches=14, seed=3)
    batches = list(stream)
    order = [index for batch in batches for index, _ in batch]
    epochs = [order[i : i + 7] for i in range(0, 56, 7)]
    assert len(stream) == 14 and all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]
    assert len({seed for batch in batches for _, seed in batch}) == 56
    stream.start = 5
    assert list(stream) == batches[5:] and len(stream) == 14
    assert list(Stream(7, batch_size=4, batches=14, seed=4)) != batches


def test_two_processes_share_each_batch():
    whole = list(Stream(7, batch_size=4, batches=5, seed=3))
    shares = [list(Stream(7, batch_size=4, batches=5, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    for batch, a, b in zip(whole, *shares):
        assert sorted(batch) == sorted(a + b) and len(a) == len(b) == 2
    with pytest.raises(ConfigError) as error:
        Stream(7, batch_size=5, batches=1, seed=0, world=2)
    assert (error.value.argument, error.value.value) == ("batch_size", 5)
    assert error.value.allowed == "a multiple of the 2 processes" and "{devices}" in error.value.hint


def test_loaders_draw_nothing_from_the_global_generator(data):
    dataset = CocoImages(find_split(data, "val"))
    state = torch.get_rng_state()
    seen = [
        t["image_id"]
        for r in (0, 1)
        for _, ts in evaluation_loader(dataset, batch_size=2, workers=0, rank=r, world=2)
        for t in ts
    ]
    assert sorted(seen) == sorted(dataset.ids)  # each image once
    assert len(list(training_loader(dataset, Stream(3, batch_size=2, batches=2, seed=0), workers=0))) == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_known_layouts_are_found(tmp_path, data):
    assert find_split(data, "val") == CocoSplit(str(data / "val.json"), str(data / "val"))
    (tmp_path / "annotations").mkdir()
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    assert find_split(tmp_path, "val").image_root == str(tmp_path / "val2017")
    with pytest.raises(ConfigError) as error:
        find_split(tmp_path, "train")
    assert (error.value.argument, error.value.value) == ("data", f"no train split in {tmp_path}")
    assert error.value.allowed.startswith("one of train.json + train/, ")
    with pytest.raises(ConfigError) as error:
        find_split(tmp_path / "gone", "train")
    assert (error.value.argument, error.value.value) == ("data", f"no dataset folder {tmp_path}/gone")


BOX = {"id": 1, "image_id": 5, "category_id": 4, "area": 1, "iscrowd": 0, "bbox": [1, 1, 2, 2]}


@pytest.mark.parametrize(
    ("changes", "value", "allowed"),
    [
        ({"categories": []}, " with no categories", "at least one"),
        ({"images": "many"}, " without a list 'images'", "as in COCO format"),
        (
            {"annotations": [{**BOX, "bbox": [9, 1, 2, 2]}]},
            ": annotations[0] (id 1) with bbox [9, 1, 2, 2], which lies outside its image",
            "a box in 8 x 6 pixels",
        ),
        (
            {"annotations": [{**BOX, "bbox": [1, 1, -2, 2]}]},
            ": annotations[0] (id 1) with bbox [1, 1, -2, 2], which has a negative size",
            "[x, y, width, height]",
        ),
        ({"annotations": [{**BOX, "bbox": [1, None, 2, 2]}]}, " with bbox [1, None, 2, 2]", "four finite numbers"),
        ({"annotations": [{**BOX, "bbox": [1, 2, 2]}]}, " with a bbox of 3 numbers", "[x, y, width, height]"),
        ({"annotations": [{**BOX, "image_id": 6}]}, ": annotations[0] (id 1) with image_id 6", "the id of an image"),
        (
            {"annotations": [{**BOX, "category_id": 5}]},
            ": annotations[0] (id 1) with category_id 5",
            "the id of a category",
        ),
        ({"annotations": [{**BOX, "iscrowd": 1}]}, " with crowds only", "at least one box that is not a crowd"),
    ],
)
def test_what_is_not_coco_is_said_in_one_line(one, changes, value, allowed):
    with pytest.raises(ConfigError) as error:
        CocoImages(one(**changes), name="my data")
    assert error.value.argument == "dataset" and error.value.value.startswith("my data: ")
    assert error.value.value.endswith(value) and allowed in error.value.allowed
    assert "\n" not in str(error.value)


def test_files_that_do_not_exist_are_named(one, tmp_path):
    split = one(images=[{"id": 5, "file_name": "gone.png", "width": 8, "height": 6}])
    with pytest.raises(ConfigError) as error:
        CocoImages(split, name="my data")
    found = f"images[0] (id 5) without its file {tmp_path}/images/gone.png"
    assert error.value.value.startswith(f"my data: {split.json_file}: ") and found in str(error.value)
    for place, what in ((CocoSplit("gone", split.image_root), "file"), (CocoSplit(split.json_file, "gone"), "folder")):
        with pytest.raises(ConfigError) as error:
            CocoImages(place, name="my data")
        assert error.value.value == f"my data: no {what} {Path('gone').absolute()}"
    Path(split.json_file).write_text("{")
    with pytest.raises(ConfigError) as error:
        CocoImages(split, name="my data")
    assert error.value.value.startswith(f"my data: {split.json_file}, which is not json (")


def test_ids_that_start_from_0_are_counted_anew(one):
    dataset = CocoImages(one(annotations=[{**BOX, "id": 0}]))
    assert [a["id"] for a in dataset.coco.dataset["annotations"]] == [1]


@pytest.mark.parametrize(
    ("wrong", "value", "allowed"),
    [
        (7, "that is 7", "an object of json"),
        ({**BOX, "bbox": None}, "(id 1) with bbox None", "a list"),
        ({**BOX, "area": "much"}, "(id 1) with area 'much'", "a number, not negative"),
        ({**BOX, "image_id": [5]}, "(id 1) with image_id [5]", "the id of an image"),
    ],
)
def test_entries_of_a_wrong_type_are_said(one, wrong, value, allowed):
    with pytest.raises(ConfigError) as error:
        CocoImages(one(annotations=[wrong]))
    assert error.value.value.endswith(f": annotations[0] {value}") and error.value.allowed == allowed
    with pytest.raises(ConfigError) as error:
        CocoImages(one(images=[{"id": 5, "file_name": "a.png", "width": "wide", "height": 6}]))
    assert "images[0] (id 5) with width 'wide'" in str(error.value)


def test_an_image_is_turned_as_it_says_and_has_the_size_of_the_json(one):
    split = one()
    path = Path(split.image_root) / "a.png"
    turned = Image.new("RGB", (6, 8), (255, 0, 0))  # as the sensor saw it; entry 6 turns it
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(path, exif=exif)
    dataset = CocoImages(split)
    assert dataset[0][0].shape == (3, 6, 8)
    turned.save(path)
    with pytest.raises(ConfigError) as error:
        CocoImages(split)
    assert error.value.value.endswith(f"images[0] (id 5): {path} with 6 x 8 pixels")
    with pytest.raises(ConfigError) as error:
        dataset[0]  # changed while a run reads it
    assert (error.value.argument, error.value.value) == ("dataset", f"dataset: {path} with 6 x 8 pixels")
    assert error.value.allowed == f"8 x 6, as {split.json_file} says"
    path.write_text("no image")
    with pytest.raises(ConfigError) as error:
        dataset[0]
    assert error.value.value.startswith(f"dataset: {path}, which cannot be read (")


def test_masks_are_asked_for_where_they_are_needed(one):
    with pytest.raises(ConfigError) as error:
        CocoImages(one(annotations=[BOX]), masks=True)
    assert error.value.value.endswith(": annotations[0] (id 1) without 'segmentation'")
