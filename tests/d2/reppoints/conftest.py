"""The settings for which the published code printed the figures that these tests hold ours to."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.structures import Boxes, Instances
from torch import nn

from acam_kd.d2 import add_segmentation_config
from acam_kd.d2.reppoints import RepPointsHead

from ...fixtures import Official
from ..conftest import ROOT, TINY

wave = Official.wave
K = 4
OBJECTS = (
    ([[3.0, 2, 41, 30], [50, 10, 79, 47]], [1, 3]),
    ([[10.0, 5, 30, 25]], [0]),
)
"""Boxes and classes of the two images of 48 x 80."""


def instances(boxes, classes, size=(48, 80)) -> Instances:
    found = Instances(size)
    found.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    found.gt_classes = torch.tensor(classes, dtype=torch.int64)
    return found


def build_head(**arguments) -> RepPointsHead:
    settings = {"in_channels": 8, "channels": 8, "num_classes": K, "norm": lambda channels: nn.GroupNorm(4, channels)}
    return RepPointsHead(**{**settings, **arguments})


@pytest.fixture
def objects():
    return [instances(*each) for each in OBJECTS]


@pytest.fixture
def head():
    return build_head()


def tiny(*opts: object) -> CfgNode:
    """A tiny RepPoints, as ``detector_config`` makes tiny detectors."""
    cfg = get_cfg()
    add_segmentation_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "Base-RepPoints.yaml"))
    own = [
        "MODEL.FPN.OUT_CHANNELS", "64", "MODEL.REPPOINTS.CONVS_DIM", "64", "MODEL.REPPOINTS.NUM_CONVS", "1",
        "MODEL.REPPOINTS.NUM_CLASSES", "3",
    ]  # fmt: skip
    cfg.merge_from_list([*TINY, *own, *opts])
    return cfg
