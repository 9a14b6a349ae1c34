"""Samples of semantic segmentation: image and label have to move together."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetMapper
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.d2 import build_sem_seg_mapper, sem_seg_augmentations

MEAN = [103.53, 116.28, 123.675]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (0,), "none"
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute", [16, 24]
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.PIXEL_MEAN = 200, MEAN
    return cfg


@pytest.fixture
def sample(tmp_path):
    """A pair whose image says in its first channel (blue) what the label is, by default a ramp of 20 x 30."""

    def make(label=None, mode=None):
        label = (np.arange(600).reshape(20, 30) % 200 if label is None else np.asarray(label)).astype(np.uint8)
        red = np.full_like(label, 7)
        Image.fromarray(np.stack([red, red, label], 2)).save(tmp_path / "image.png")
        stored = Image.fromarray(label)
        if mode == "P":
            stored.putpalette([value * step % 256 for value in range(256) for step in (5, 7, 11)])
        stored.save(tmp_path / "label.png")
        return {
            "file_name": str(tmp_path / "image.png"),
            "sem_seg_file_name": str(tmp_path / "label.png"),
            "height": label.shape[0],
            "width": label.shape[1],
        }

    return make


def together(sample):
    """Where the label counts, the image's blue says the same."""
    image, label = sample["image"], sample["sem_seg"]
    return torch.equal(image[0].long()[label != 255], label[label != 255]) and image.shape[1:] == label.shape


@pytest.mark.parametrize("mode", ["L", "P"])
def test_labels_are_class_numbers(cfg, sample, mode):
    """Also those with a palette, of which Detectron2's own mapper makes greys."""
    entry = sample(mode=mode)
    made = build_sem_seg_mapper(cfg)(entry)
    assert made["image"].dtype == torch.uint8 and made["sem_seg"].dtype == torch.int64
    assert made["sem_seg"].shape == (20, 30) and together(made) and "sem_seg_file_name" not in made
    assert "sem_seg_file_name" in entry  # the catalog's own is left as it was
    stock = DatasetMapper(cfg, is_train=True)(entry)["sem_seg"]
    assert torch.equal(stock, made["sem_seg"]) == (mode == "L")


def test_crops_and_flips_move_image_and_label_together(cfg, sample):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.RANDOM_FLIP = True, "horizontal"
    np.random.seed(0)
    mapper, entry, starts, flipped = build_sem_seg_mapper(cfg), sample(), set(), set()
    for _ in range(30):
        made = mapper(entry)
        assert made["sem_seg"].shape == (16, 24) and together(made)
        row = made["sem_seg"][0]
        starts.add(row.min().item())
        flipped.add(bool(row[1] < row[0]))
    assert len(starts) > 5 and flipped == {True, False}
    cfg.INPUT.RANDOM_FLIP = "none"
    mapper = build_sem_seg_mapper(cfg)
    assert all(made["sem_seg"][0, 1] > made["sem_seg"][0, 0] for made in (mapper(sample()) for _ in range(12)))


def test_the_pad_is_zero_after_normalisation_and_ignored(cfg, sample):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [26, 24]
    made = build_sem_seg_mapper(cfg)(sample())
    assert made["sem_seg"].shape == (26, 24) and together(made)
    assert (made["sem_seg"][20:] == 255).all() and (made["sem_seg"][:20] != 255).all()
    normalised = made["image"] - torch.tensor(MEAN).view(3, 1, 1)
    assert normalised[:, 20:].abs().max() <= 0.5 and normalised[1:, :20].abs().min() > 90
    cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN = "RGB", MEAN[::-1]
    assert torch.equal(build_sem_seg_mapper(cfg)(sample())["image"].flip(0)[:, 20:], made["image"][:, 20:])


def test_the_scale_is_from_half_to_double(cfg, sample):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (10, 40), "range"
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [16, 24]
    np.random.seed(0)
    scale = sem_seg_augmentations(cfg)[0]
    factors = []
    for _ in range(200):
        transform = scale.get_transform(np.zeros((20, 30, 3), np.uint8))
        factors.append(transform.new_h / 20)
        assert transform.new_w == pytest.approx(1.5 * transform.new_h, abs=1)
    assert min(factors) == 0.5 and max(factors) == 2.0 and 1.1 < np.mean(factors) < 1.4
    mapper, entry = build_sem_seg_mapper(cfg), sample(np.tile(np.repeat([3, 9], 15), (20, 1)))
    padded = 0
    for _ in range(30):
        made = mapper(entry)
        assert made["sem_seg"].shape == (16, 24)
        assert set(made["sem_seg"].unique().tolist()) <= {3, 9, 255}  # no mixtures of classes at their borders
        padded += bool((made["sem_seg"] == 255).any())
    assert 0 < padded < 30


def test_crops_of_one_class_are_avoided_on_demand(cfg, sample):
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.SIZE = True, [20, 4]
    entry = sample(np.tile(np.repeat([3, 9], 15), (20, 1)))

    def mixed(cfg):
        np.random.seed(0)
        mapper = build_sem_seg_mapper(cfg)
        return sum(len(mapper(entry)["sem_seg"].unique()) == 2 for _ in range(20))

    assert mixed(cfg) < 8
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.8
    assert mixed(cfg) > 10


def test_a_test_size_of_zero_is_the_whole_image(cfg, sample):
    cfg.INPUT.MIN_SIZE_TEST = 0
    assert DatasetMapper(cfg, is_train=False)(sample())["image"].shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("opts", "argument", "value", "allowed"),
    [
        (["INPUT.CROP.TYPE", "relative"], "INPUT.CROP.TYPE", "relative", "absolute"),
        (["INPUT.CROP.SIZE", [0.9, 0.9]], "INPUT.CROP.SIZE", [0.9, 0.9], "height and width in pixels"),
        (["INPUT.CROP.SIZE", [512]], "INPUT.CROP.SIZE", [512], "height and width in pixels"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"], "INPUT.MIN_SIZE_TRAIN", (0,), "two sizes"),
    ],
)
def test_augmentations_that_cannot_be(cfg, opts, argument, value, allowed):
    cfg.merge_from_list(["INPUT.CROP.ENABLED", True, *opts])
    with pytest.raises(ConfigError) as error:
        build_sem_seg_mapper(cfg)
    assert (error.value.argument, error.value.value) == (argument, value) and allowed in error.value.allowed


def test_labels_that_nobody_has_looked_at(cfg, sample, tmp_path):
    """The datasets are registered in Python."""
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 19, 250
    mapper = build_sem_seg_mapper(cfg)
    mapper(sample([[0, 18], [250, 3]]))
    with pytest.raises(ValueError) as e:  # (check_values: a label with other values)
        mapper(sample([[19, 255], [250, 3]]))
    assert all(part in str(e.value) for part in ("label.png", "19, 255", "0 to 18", "250"))
    assert "\n" not in str(e.value)
    entry = sample([[0, 1], [2, 3]])
    Image.fromarray(np.zeros((2, 3), np.uint8)).save(entry["sem_seg_file_name"])
    with pytest.raises(ConfigError) as error:
        mapper(entry)
    assert error.value.argument == "DATASETS.TRAIN" and error.value.allowed == "the size of its image, 2 x 2"
    assert error.value.value == f"label {entry.pop('sem_seg_file_name')} of 3 x 2"
    with pytest.raises(ConfigError) as error:
        mapper(entry)
    assert error.value.argument == "DATASETS.TRAIN" and error.value.allowed == "labels of semantic segmentation"
    assert error.value.value == f"image {entry['file_name']} without a label"
