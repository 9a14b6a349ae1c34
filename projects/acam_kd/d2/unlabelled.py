"""Images without labels in Detectron2: their loader, and the hook that adds the method's losses on them to a step."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T  # noqa: N812
from detectron2.modeling import SemanticSegmentor
from detectron2.structures import ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from ..core import ConfigError, Distillation
from ..core.outputs import losses_of, with_losses
from ..data.unlabelled import check_images, find_images, refuse_shared
from .config import student_config
from .distillation import D2Distillation
from .sem_seg_data import sem_seg_augmentations

__all__ = ["UnlabelledFeed", "build_unlabelled_loader", "check_unlabelled", "feed_unlabelled"]

KEPT = ("file_name", "image_id", "height", "width")
"""The parts of a dataset's entries that are not annotations."""


def unlabelled_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return Detectron2's entries for DATASETS.UNLABELLED, without any annotation.

    Raises:
        ConfigError: an item is neither a folder of images nor a registered dataset.
    """
    entries: list[dict[str, Any]] = []
    folders: list[str] = []
    for name in cfg.DATASETS.UNLABELLED:
        if name in DatasetCatalog.list():
            entries += [{key: x[key] for key in KEPT if key in x} for x in DatasetCatalog.get(name)]
        elif os.path.isdir(os.path.expanduser(name)):
            folders.append(name)
        else:
            raise ConfigError("unlabelled", name, "folders of images, or registered datasets")
    paths = [path for images in find_images(folders).values() for path in images]
    return entries + [{"file_name": path, "image_id": path} for path in paths]


def check_unlabelled(cfg: CfgNode) -> None:
    """Check the settings of images without labels, and in the first process every image.

    Raises:
        ConfigError: a setting or an image cannot be used, or is one of DATASETS.TEST.
    """
    node = cfg.DISTILL.UNLABELLED
    if not cfg.DATASETS.UNLABELLED:
        return
    if not 0 <= node.WEIGHT < math.inf:
        raise ConfigError("unlabelled_weight", node.WEIGHT, ">= 0 and finite")
    if node.BATCH < 1 or node.BATCH % comm.get_world_size():
        raise ConfigError("unlabelled_batch", node.BATCH, f"a multiple of the {comm.get_world_size()} processes")
    if not 0 <= node.START < cfg.SOLVER.MAX_ITER:
        raise ConfigError("unlabelled_start", node.START, f"0 to below the {cfg.SOLVER.MAX_ITER} of SOLVER.MAX_ITER")
    if not cfg.DISTILL.METHOD:
        raise ConfigError("unlabelled", "images without labels and without a method", "none", "set {method}")
    paths = [entry["file_name"] for entry in unlabelled_dicts(cfg)]
    if comm.is_main_process():
        check_images(paths, reader="detectron2")
        tested = [entry["file_name"] for name in cfg.DATASETS.TEST for entry in DatasetCatalog.get(name)]
        refuse_shared(paths, tested)


class _Mapper:
    """The mapper of images for a SemanticSegmentor, augmented as those with labels.

    Args:
        cfg: the run's.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.augmentations = T.AugmentationList(sem_seg_augmentations(cfg))
        self.format, self.ignored = cfg.INPUT.FORMAT, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE

    def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Read and augment one image; the crop wants a label map, which is ignored as a whole."""
        image = utils.read_image(entry["file_name"], format=self.format)
        sample = dict(entry)
        utils.check_image_size(sample, image)
        augmented = T.AugInput(image, sem_seg=np.full(image.shape[:2], self.ignored, dtype=np.uint8))
        self.augmentations(augmented)
        return {**sample, "image": torch.from_numpy(np.ascontiguousarray(augmented.image.transpose(2, 0, 1)))}


def build_unlabelled_loader(cfg: CfgNode) -> Iterable[list[dict[str, Any]]]:
    """Build the loader of DATASETS.UNLABELLED: DISTILL.UNLABELLED.BATCH images a step, of all processes together."""
    dense = student_config(cfg).MODEL.META_ARCHITECTURE == "SemanticSegmentor"
    return build_detection_train_loader(  # type: ignore[no-any-return]
        unlabelled_dicts(cfg),
        mapper=_Mapper(cfg) if dense else DatasetMapper(cfg, is_train=True),
        total_batch_size=cfg.DISTILL.UNLABELLED.BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )


def batch_of(student: nn.Module, inputs: list[dict[str, Any]]) -> Tensor:
    """Return the normalised, padded batch that a student's backbone gets for inputs.

    Raises:
        ConfigError: the student does not say how it prepares images.
    """
    model: Any = student
    if hasattr(model, "preprocess_image"):
        batch: Tensor = model.preprocess_image(inputs).tensor
        return batch
    if not isinstance(model, SemanticSegmentor):
        raise ConfigError("student", type(model).__name__, "a model with preprocess_image, or a SemanticSegmentor")
    images = [(x["image"].to(model.device) - model.pixel_mean) / model.pixel_std for x in inputs]
    backbone = model.backbone
    constraints = backbone.padding_constraints
    return ImageList.from_tensors(images, backbone.size_divisibility, padding_constraints=constraints).tensor


class UnlabelledFeed:
    """A hook of a student that takes a batch from a loader in every training step and adds the method's losses on it.

    It runs inside the student's forward, so that DistributedDataParallel and mixed precision see one step.

    Args:
        student: has a distillation.
        loader: gives lists of Detectron2's inputs, without end.
        weight: of these losses.
        start: the first iteration with such a batch.
        keep_norms: see ``Distillation.unlabelled``, whose ``update_statistics`` is the opposite.
    """

    def __init__(
        self, student: nn.Module, loader: Iterable[list[dict[str, Any]]], *, weight: float, start: int, keep_norms: bool
    ) -> None:
        self.loader, self.weight, self.start, self.keep_norms = loader, weight, start, keep_norms
        self._iterator: Iterator[list[dict[str, Any]]] | None = None
        self._busy = False
        self._handle = student.register_forward_hook(self)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def __call__(self, student: nn.Module, args: Any, output: Any) -> Any:
        """Return the student's output with the losses; None to leave it as it is."""
        attached = getattr(student, "distillation", None)
        if self._busy or not (isinstance(attached, Distillation) and student.training and torch.is_grad_enabled()):
            return None
        if attached.iteration < self.start or not attached.distils:
            return None
        if self._iterator is None:
            self._iterator = iter(self.loader)
        self._busy = True
        try:
            batch = batch_of(student, next(self._iterator))
            found = attached.unlabelled(batch, update_statistics=not self.keep_norms)
        finally:
            self._busy = False
        losses = {name: loss * self.weight for name, loss in found.items()}
        if isinstance(attached, D2Distillation):
            attached.check_later(losses)
        return with_losses(output, {**losses_of(output), **losses})

    def __deepcopy__(self, memo: dict[int, Any]) -> UnlabelledFeed:
        """Return the very hook: copies of a student are evaluated, and a loader cannot be copied."""
        return self


def feed_unlabelled(
    model: nn.Module,
    loader: Iterable[list[dict[str, Any]]],
    *,
    weight: float = 1.0,
    start: int = 0,
    keep_norms: bool = False,
) -> UnlabelledFeed:
    """Let every training step of a student learn from a batch without labels, too.

    Args:
        model: the student, or the DistributedDataParallel around it.
        loader: from ``build_unlabelled_loader``, or another one of inputs that have an ``image``.
        weight, start, keep_norms: see ``UnlabelledFeed``.

    Returns:
        The hook, to be removed again.

    Raises:
        ConfigError: the student has no distillation, or no method of it can use such images.
    """
    student = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    attached = getattr(student, "distillation", None)
    if not isinstance(attached, Distillation):
        raise ConfigError("unlabelled", f"a {type(student).__name__} without a distillation", "one that has a method")
    attached.on_unlabelled.check()
    return UnlabelledFeed(student, loader, weight=weight, start=start, keep_norms=keep_norms)
