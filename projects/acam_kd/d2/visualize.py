"""Where the masks of a Detectron2 run look: in TensorBoard while it trains, and from its checkpoints afterwards."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb, read_image
from detectron2.data.transforms import ResizeShortestEdge
from detectron2.evaluation import inference_context
from detectron2.modeling import build_model
from detectron2.utils.events import get_event_storage
from torch import nn
from torch.nn import functional as F  # noqa: N812

from ..core import BACKBONE, CLASSES, LOGITS
from ..vis.panels import Array, mask_panel
from .config import META_ARCHITECTURE
from .taps import backbone_of, divisibility, pyramid

if TYPE_CHECKING:
    from .meta_arch import DistillationMetaArch

__all__ = ["image_files", "load_for_masks", "load_moment", "masks_of", "put_masks", "read_rgb", "strides_of"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def put_masks(model: DistillationMetaArch, batched_inputs: list[dict[str, Any]], image_format: str) -> None:
    """Put the last step's spatial masks of the first image into the event storage, for TensorBoard.

    Nothing is put for a method without spatial masks.

    Args:
        model: has made its training step on the batch.
        batched_inputs: the batch.
        image_format: of its images, as in INPUT.FORMAT.
    """
    assert model.distiller is not None
    found = {level: kinds["spatial"][0] for level, kinds in model.distiller.masks().items() if "spatial" in kinds}
    if found:
        image = convert_image_to_rgb(batched_inputs[0]["image"].permute(1, 2, 0), image_format)
        masks = {level: mask.float().cpu().numpy() for level, mask in found.items()}
        panel = mask_panel(image.clip(0, 255).astype(np.uint8), masks, _strides(model))
        get_event_storage().put_image("distill/spatial masks", panel.transpose(2, 0, 1))


def load_for_masks(cfg: CfgNode, weights: str) -> DistillationMetaArch:
    """Build student, teacher and distiller, and load what a run had learnt at one moment.

    Args:
        cfg: the config of the run, as ``config.yaml`` in its output folder has it.
        weights: a checkpoint of the run.

    Returns:
        The model in evaluation mode, for ``masks_of``.

    Raises:
        FileNotFoundError, ValueError: the config is not one of a distillation, or see ``load_moment``.
    """
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE or not cfg.DISTILL.METHOD:
        raise ValueError(
            f"there are no masks without a distillation: MODEL.META_ARCHITECTURE is {cfg.MODEL.META_ARCHITECTURE}, "
            f"which must be {META_ARCHITECTURE}, and DISTILL.METHOD {cfg.DISTILL.METHOD!r}, which must not be empty"
        )
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ValueError(f"masks can be shown on RGB and BGR images only: INPUT.FORMAT is {cfg.INPUT.FORMAT}")
    checkpoint = _read(weights)
    model = build_model(cfg)
    _load(model, checkpoint, weights)
    return model.eval()


def load_moment(model: DistillationMetaArch, weights: str) -> None:
    """Load another checkpoint of the same run into a model from ``load_for_masks``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, holds no distiller, or does not fit the model.
    """
    _load(model, _read(weights), weights)


def masks_of(model: DistillationMetaArch, cfg: CfgNode, image: Array) -> dict[str, dict[str, Array]]:
    """The masks for one image, prepared as Detectron2's DefaultPredictor prepares it.

    Args:
        model: from ``load_for_masks``; its mode does not matter and is kept.
        cfg: its config.
        image: uint8 RGB (H, W, 3).

    Returns:
        Level -> kind -> masks, ``"spatial"`` (M, h, w) and ``"channel"`` (M, C), in [0, 1]. Spatial ones cover the
        padded batch; ``strides_of`` says which pixels of the image a position stands for.

    Raises:
        ValueError: the method makes no masks, or none without the boxes of an image.
    """
    resized = _resize(cfg, image)
    pixels = resized if cfg.INPUT.FORMAT == "RGB" else resized[:, :, ::-1]
    inputs = {"image": torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))}
    with torch.no_grad(), inference_context(model):
        masks = model.observe(_padded(model, _batch(model.student, inputs)))
    if not any(masks.values()):
        raise ValueError(f"{cfg.DISTILL.METHOD} makes no masks from an image alone (key: DISTILL.METHOD)")
    return {
        level: {kind: mask[0].float().cpu().numpy() for kind, mask in kinds.items()} for level, kinds in masks.items()
    }


def strides_of(model: DistillationMetaArch, cfg: CfgNode, image: Array) -> dict[str, float]:
    """Level -> pixels of the image, as it is before resizing, per position of the masks."""
    scale = image.shape[0] / _resize(cfg, image).shape[0]
    return {level: stride * scale for level, stride in _strides(model).items()}


def image_files(paths: Sequence[str]) -> list[str]:
    """The files among the paths, and the images in the folders among them, sorted.

    Raises:
        FileNotFoundError: a folder has no images.
        ValueError: two files have the same name but for folder and suffix, so pictures named after them would too.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise FileNotFoundError(f"no images in {os.path.abspath(path)} (suffixes: {', '.join(SUFFIXES)})")
        files += inside
    stems = [Path(file).stem for file in files]
    twice = [file for file, stem in zip(files, stems) if stems.count(stem) > 1]
    if twice:
        raise ValueError(f"two images share a name: {twice[0]}, {twice[1]}")
    return files


def read_rgb(path: str) -> Array:
    """Read an image file as uint8 RGB (H, W, 3), turned as its EXIF entry says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no image.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no image {os.path.abspath(path)}")
    try:
        return read_image(path, "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{os.path.abspath(path)} cannot be read as an image: {error}") from error


def _strides(model: DistillationMetaArch) -> dict[str, int]:
    """Of the levels that are maps: what a class head predicts is none."""
    shapes = pyramid(model.student, (BACKBONE, LOGITS) if LOGITS in model.levels else (BACKBONE,))
    return {level: shapes[level].stride for level in model.levels if level != CLASSES}


def _resize(cfg: CfgNode, image: Array) -> Array:
    sides = [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
    return ResizeShortestEdge(*sides).get_transform(image).apply_image(image)


def _batch(student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The normalised, padded batch that the student's backbone gets for an input, of any meta-architecture."""
    got: list[torch.Tensor] = []
    handle = student.backbone.register_forward_pre_hook(lambda _, args: got.append(args[0]))  # type: ignore[operator, union-attr]
    try:
        student([inputs])
    finally:
        handle.remove()
    return got[0]


def _padded(model: DistillationMetaArch, batch: torch.Tensor) -> torch.Tensor:
    """The batch, with as much mean colour at its end as the teacher's backbone needs: crops had that size."""
    assert model.teacher is not None
    network = model.teacher.network
    needed = divisibility(getattr(network, "backbone", network))  # it may be the backbone itself
    multiple = math.lcm(needed, divisibility(backbone_of(model.student), padding=True))
    height, width = (-side % multiple for side in batch.shape[2:])
    return F.pad(batch, (0, width, 0, height))


def _read(weights: str) -> dict[str, Any]:
    path = os.path.abspath(weights)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not {"model", "distiller"} <= checkpoint.keys():
        entries = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} has no entry 'distiller' beside 'model', so its masks are unknown (it has: {entries[:200]}); "
            "checkpoints of train_net.py have one, those of other trainers after checkpoint_distiller(trainer)"
        )
    return checkpoint


def _load(model: DistillationMetaArch, checkpoint: dict[str, Any], weights: str) -> None:
    assert model.distiller is not None
    try:
        missing, _ = model.load_state_dict(checkpoint["model"], strict=False)
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing in it, as {missing[0]}")
        model.distiller.load_state_dict(checkpoint["distiller"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.path.abspath(weights)} does not fit the config: {reason[:300]}") from error
