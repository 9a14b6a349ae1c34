"""Where the masks of a Detectron2 run look: in TensorBoard while it trains, and from its checkpoints afterwards."""

from __future__ import annotations

import math
import os
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

from ..core import CLASSES, ConfigError, RunError
from ..core.errors import first_line
from ..report.panels import Array, mask_panel
from .config import META_ARCHITECTURE

if TYPE_CHECKING:
    from .distillation import D2Distillation

__all__ = ["image_files", "load_for_masks", "load_moment", "masks_of", "put_masks", "read_rgb", "strides_of"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def put_masks(distillation: D2Distillation, batched_inputs: list[dict[str, Any]]) -> None:
    """Put the last step's spatial masks of the first image into the event storage, for TensorBoard.

    Nothing is put for a method without spatial masks.

    Args:
        distillation: has made its training step on the batch.
        batched_inputs: the batch.
    """
    spatial = {level: kinds["spatial"][0] for level, kinds in distillation.masks().items() if "spatial" in kinds}
    if spatial:
        image = convert_image_to_rgb(batched_inputs[0]["image"].permute(1, 2, 0), distillation.input_format)
        masks = {level: mask.float().cpu().numpy() for level, mask in spatial.items()}
        panel = mask_panel(image.clip(0, 255).astype(np.uint8), masks, _strides(distillation))
        get_event_storage().put_image("distill/spatial masks", panel.transpose(2, 0, 1))


def load_for_masks(cfg: CfgNode, weights: str) -> nn.Module:
    """Build student, teacher and distiller, and load what a run had learnt at one moment.

    Args:
        cfg: the config of the run, as ``config.yaml`` in its output folder has it.
        weights: a checkpoint of the run.

    Returns:
        The model in evaluation mode, for ``masks_of``.

    Raises:
        ConfigError: the config is not one of a distillation.
        RunError: see ``load_moment``.
    """
    if cfg.MODEL.META_ARCHITECTURE != META_ARCHITECTURE:
        hint = "there are no masks without a distillation"
        raise ConfigError("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCHITECTURE, hint)
    if not cfg.DISTILL.METHOD:
        raise ConfigError("method", "", "a method with masks, as ACAMKD", "there are no masks without a distillation")
    if cfg.INPUT.FORMAT not in ("RGB", "BGR"):
        raise ConfigError("INPUT.FORMAT", cfg.INPUT.FORMAT, "RGB or BGR, on which masks can be shown")
    checkpoint = _read(weights)
    model = build_model(cfg)
    _load(model, checkpoint, weights)
    return model.eval()


def load_moment(model: nn.Module, weights: str) -> None:
    """Load another checkpoint of the same run into a model from ``load_for_masks``.

    Raises:
        ConfigError: there is no such file, or it holds no distiller.
        RunError: it is no checkpoint, or does not fit the model.
    """
    _load(model, _read(weights), weights)


def masks_of(model: nn.Module, cfg: CfgNode, image: Array) -> dict[str, dict[str, Array]]:
    """Return the masks for one image, prepared as Detectron2's DefaultPredictor prepares it.

    Args:
        model: from ``load_for_masks``; its mode does not matter and is kept.
        cfg: its config.
        image: uint8 RGB (H, W, 3).

    Returns:
        Level -> kind -> masks, ``"spatial"`` (M, h, w) and ``"channel"`` (M, C), in [0, 1]. Spatial ones cover the
        padded batch; ``strides_of`` says which pixels of the image a position stands for.

    Raises:
        ConfigError: the method makes no masks, or none without the boxes of an image.
    """
    resized = _resize(cfg, image)
    pixels = resized if cfg.INPUT.FORMAT == "RGB" else resized[:, :, ::-1]
    inputs = {"image": torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))}
    with torch.no_grad(), inference_context(model):
        masks = _distillation(model).observe(_padded(model, _batch(model, inputs)))
    if not any(masks.values()):
        raise ConfigError("method", cfg.DISTILL.METHOD, "one that makes masks from an image alone")
    return {
        level: {kind: mask[0].float().cpu().numpy() for kind, mask in kinds.items()} for level, kinds in masks.items()
    }


def strides_of(model: nn.Module, cfg: CfgNode, image: Array) -> dict[str, float]:
    """Return, by level, pixels of the image, as it is before resizing, per position of the masks."""
    scale = image.shape[0] / _resize(cfg, image).shape[0]
    return {level: stride * scale for level, stride in _strides(_distillation(model)).items()}


def image_files(paths: Sequence[str]) -> list[str]:
    """List the files among the paths, and the images in the folders among them, sorted.

    Raises:
        ConfigError: a folder has no images; or two files differ in folder and suffix only, so pictures named after
            them would collide.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(str(file) for file in Path(path).iterdir() if file.suffix.lower() in SUFFIXES)
        if not inside:
            raise ConfigError("images", f"none in {os.path.abspath(path)}", f"files that end in {', '.join(SUFFIXES)}")
        files += inside
    stems = [Path(file).stem for file in files]
    twice = [file for file, stem in zip(files, stems) if stems.count(stem) > 1]
    if twice:
        raise ConfigError("images", f"{twice[0]} and {twice[1]}", "names that differ")
    return files


def read_rgb(path: str) -> Array:
    """Read an image file as uint8 RGB (H, W, 3), turned as its EXIF entry says.

    Raises:
        ConfigError: there is no such file, or it is no image.
    """
    if not os.path.isfile(path):
        raise ConfigError("images", f"no file {os.path.abspath(path)}", "an existing one")
    try:
        return read_image(path, "RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError("images", f"{os.path.abspath(path)}: {error}", "a readable image") from error


def _distillation(model: nn.Module) -> D2Distillation:
    return model.distillation  # type: ignore[return-value]


def _strides(distillation: D2Distillation) -> dict[str, int]:
    """Return the strides of the levels that are maps: those of a class head are none."""
    shapes = distillation.shapes["student"]
    return {level: shapes[level].stride for level in distillation.levels if level != CLASSES}


def _resize(cfg: CfgNode, image: Array) -> Array:
    sides = [cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST
    return ResizeShortestEdge(*sides).get_transform(image).apply_image(image)


def divisibility(backbone: nn.Module, *, padding: bool = False) -> int:
    """Return the number that the sides of a backbone's batches are multiples of.

    Args:
        backbone: says what it needs.
        padding: return what batches are padded to for it.
    """
    constraints = getattr(backbone, "padding_constraints", None) or {}
    spelled = "size_divisibility", "size_divisiblity"  # Detectron2's ViTDet has the second
    padded = math.lcm(*(int(constraints.get(key, 0)) or 1 for key in spelled)) if padding else 1
    return padded if padded > 1 else int(getattr(backbone, "size_divisibility", 0) or 1)


def _batch(student: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the normalised, padded batch that the student's backbone gets for an input, of any meta-architecture."""
    got: list[torch.Tensor] = []
    handle = student.backbone.register_forward_pre_hook(lambda _, args: got.append(args[0]))  # type: ignore[operator, union-attr]
    try:
        student([inputs])
    finally:
        handle.remove()
    return got[0]


def _padded(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the batch, with as much mean colour at its end as the teacher's backbone needs: crops had that size."""
    network = _distillation(model).teacher.network
    needed = divisibility(getattr(network, "backbone", network))  # it may be the backbone itself
    multiple = math.lcm(needed, divisibility(model.backbone, padding=True))  # type: ignore[arg-type]
    height, width = (-side % multiple for side in batch.shape[2:])
    return F.pad(batch, (0, width, 0, height))


def _read(weights: str) -> dict[str, Any]:
    path = os.path.abspath(weights)
    if not os.path.isfile(path):
        raise ConfigError("weights", f"no file {path}", "a checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch makes of a damaged file
        reason = first_line(error).split(". ")[0]
        raise RunError(f"it cannot be read as a checkpoint: {reason}", path, "choose another checkpoint") from error
    if not isinstance(checkpoint, dict) or not {"model", "distiller"} <= checkpoint.keys():
        entries = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ConfigError(
            "weights", f"{path} with {entries[:200]}", "a checkpoint with 'distiller' beside 'model'",
            "those of train_net.py have it, those of other trainers after checkpoint_distiller(trainer)",
        )  # fmt: skip
    return checkpoint


def _load(model: nn.Module, checkpoint: dict[str, Any], weights: str) -> None:
    path = os.path.abspath(weights)
    try:
        missing, _ = model.load_state_dict(checkpoint["model"], strict=False)
        if missing:
            raise RuntimeError(f"{len(missing)} tensors are missing in it, as {missing[0]}")
        _distillation(model).load_state_dict(checkpoint["distiller"])
    except RunError as error:
        raise RunError(f"it does not fit the config: {error.what}", path, "name the config of its run") from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RunError(f"it does not fit the config: {reason[:300]}", path, "name the config of its run") from error
