"""A finished Detectron2 run as it lies in its folder: config, weights and the names of the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from torch import nn

from ..core.errors import ConfigError
from ..files import to_json, write_atomically
from ..json_file import read_json
from .config_files import merge_safely
from .segmentation_config import add_segmentation_config
from .weights_file import read_safely

__all__ = ["CLASSES", "load_run", "read_classes", "write_classes"]

CLASSES = "classes.json"
CHECKPOINTS = {"last": ("model_average.pth", "model_final.pth"), "best": ("model_best.pth",)}
"""The choices of a run's weights -> the files in its folder, the first of which counts."""


def write_classes(cfg: CfgNode) -> None:
    """Write the names of the classes into the run's folder, as id of the dataset -> name, in the model's order."""
    names = [*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST]
    metadata = MetadataCatalog.get(names[0]) if names else {}
    things, stuff = metadata.get("thing_classes") or [], metadata.get("stuff_classes") or []
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {i + 1: i for i in range(len(things))}
    content = {"things": {number: things[i] for number, i in sorted(ids.items(), key=lambda pair: pair[1])}}
    write_atomically(Path(cfg.OUTPUT_DIR) / CLASSES, to_json({**content, "stuff": list(stuff)}))


def read_classes(run: str, *, semantic: bool) -> dict[int, str]:
    """Return the ids of the dataset's categories -> names, in the model's order; numbers where no file says them."""
    path = Path(run) / CLASSES
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    if semantic:
        return dict(enumerate(content.get("stuff", [])))
    return {int(number): name for number, name in content.get("things", {}).items()}


def load_run(run: str, *, checkpoint: str, size: int | None) -> tuple[nn.Module, CfgNode, str]:
    """Load the student of a run's folder, in evaluation mode.

    Args:
        run: the folder.
        checkpoint: ``"last"`` or ``"best"``.
        size: the shorter side of images; None for the config's.

    Returns:
        The student, its config and the name of the file of weights.

    Raises:
        ConfigError: there are no such weights in the folder.
    """
    found = [name for name in CHECKPOINTS[checkpoint] if (Path(run) / name).is_file()]
    if not found:
        value = f"no finished run in {Path(run).absolute()}"
        raise ConfigError("run", value, f"a folder with {' or '.join(CHECKPOINTS[checkpoint])}")
    cfg = get_cfg()
    add_segmentation_config(cfg)
    merge_safely(cfg, str(Path(run) / "student_config.yaml"), argument="run")
    cfg.MODEL.WEIGHTS = str(Path(run) / found[0])
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    if size:
        cfg.INPUT.MIN_SIZE_TEST = size
        cfg.INPUT.MAX_SIZE_TEST = max(size, size * 5 // 3)
    cfg.freeze()
    model = build_model(cfg)
    read_safely(DetectionCheckpointer(model), "run").load(cfg.MODEL.WEIGHTS)
    return model.eval(), cfg, found[0]
