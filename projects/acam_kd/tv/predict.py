"""Predictions of a torchvision run's student, or of an exported one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..core.errors import ConfigError
from ..export.exported import as_pixels, load_exported
from ..report.panels import Array
from ..report.predictions import Prediction
from .card import Card, read_card
from .distillation import load_weights
from .models import build_model

__all__ = ["CHECKPOINTS", "TorchPredictor", "load_predictor", "load_student"]

CHECKPOINTS = {"last": "student.pth", "best": "best.pth"}
"""The choices of a run's weights -> the file in its folder."""
MASK_THRESHOLD = 0.5


class TorchPredictor:
    """A predictor with a model of torchvision's interface.

    Args:
        model: in evaluation mode.
        categories: label -> name.
        device: of the model.
    """

    def __init__(self, model: nn.Module, categories: Mapping[int, str], device: torch.device) -> None:
        self.model, self.categories, self.device = model, categories, device

    @torch.no_grad()
    def __call__(self, image: Array) -> Prediction:
        """Predict one image, uint8 RGB (H, W, 3)."""
        (found,) = self.model([as_pixels(image).to(self.device)])
        return to_prediction(found)


def to_prediction(found: dict[str, Tensor]) -> Prediction:
    """Turn the output of torchvision's interface into a prediction."""
    arrays = {name: value.cpu().numpy() for name, value in found.items()}
    if "semantic" in arrays:
        return Prediction.of_map(arrays["semantic"])
    if "boxes" not in arrays:
        return Prediction.of_classes(arrays["scores"])
    masks = arrays["masks"][:, 0] > MASK_THRESHOLD if "masks" in arrays else None
    return Prediction(arrays["boxes"].astype(np.float64), arrays["labels"], arrays["scores"], masks)


def load_student(run: str, *, checkpoint: str = "last", size: int | None = None) -> tuple[nn.Module, Card]:
    """Load the student of a run's folder, and put it into evaluation mode.

    Args:
        run: the folder.
        checkpoint: one of ``CHECKPOINTS``.
        size: as in ``build_model``; None for the run's.

    Raises:
        ConfigError: there is no finished run, or no such file of weights.
    """
    card, path = read_card(run, argument="run")
    path = path.with_name(CHECKPOINTS[checkpoint])
    if not path.is_file():
        raise ConfigError("checkpoint", f"{checkpoint}, but no file {path.absolute()}", "one that the run has")
    model = build_model(card.name, num_classes=card.num_classes, size=size or card.size)
    load_weights(model, str(path), role="student")
    return model.eval(), card


def load_predictor(run: str, *, checkpoint: str = "last", size: int | None = None) -> TorchPredictor:
    """Load a run's folder, or an exported file, to predict with.

    Raises:
        ConfigError: it is neither, or an exported file is to have another size.
    """
    if Path(run).is_file():
        exported = load_exported(run, size=size)
        return TorchPredictor(exported, exported.metadata.categories, torch.device("cpu"))
    model, card = load_student(run, checkpoint=checkpoint, size=size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TorchPredictor(model.to(device), card.categories, device)
