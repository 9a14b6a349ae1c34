"""PS-KD: the network's own past prediction of an image, mixed into its label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.distiller import NOTHING_KNOWN, Distiller
from ..core.errors import ConfigError
from ..core.features import CLASSES, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.logits import check_several_classes
from .parts.losses import full_precision
from .recipes import RECIPES

__all__ = ["PSKD", "PastPredictions", "progressive_cross_entropy", "progressive_target"]


def progressive_target(labels: Tensor, past: Tensor, share: Tensor) -> Tensor:
    """Return (1 - share) * onehot + share * past, (N, K).

    Args:
        labels: (N,) int64.
        past: (N, K), the past predictions.
        share: (N,) or 0-d.
    """
    share = share.reshape(-1, 1)
    return (1 - share) * F.one_hot(labels, past.shape[1]) + share * past


@full_precision
def progressive_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross-entropy with soft targets, a mean over images; the target has no gradient.

    Args:
        logits, target: (N, K).
    """
    return -(target.detach() * logits.log_softmax(1)).sum() / max(len(logits), 1)


class PastPredictions:
    """A table in main memory: the last prediction of each image, float32, and how often the image was seen."""

    def __init__(self, classes: int) -> None:
        self.rows: dict[int, int] = {}
        self.table = torch.zeros(0, classes)
        self.seen = torch.zeros(0, dtype=torch.int64)

    def read(self, ids: list[int], labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the past predictions (N, K), one-hot labels for new images, and (N,), how often each was seen."""
        past = F.one_hot(labels.cpu(), self.table.shape[1]).float()
        seen = torch.zeros(len(ids), dtype=torch.int64)
        known = [(place, self.rows[number]) for place, number in enumerate(ids) if number in self.rows]
        if known:
            places, rows = (list(x) for x in zip(*known))
            past[places], seen[places] = self.table[rows], self.seen[rows]
        return past, seen

    def write(self, ids: list[int], predictions: Tensor) -> None:
        """Replace the predictions of images; of an image that is there twice the last one counts."""
        last = {number: place for place, number in enumerate(ids)}
        for number in last:
            self.rows.setdefault(number, len(self.rows))
        if (missing := len(self.rows) - len(self.table)) > 0:  # doubled, so that growing is cheap
            missing = max(missing, len(self.table))
            self.table = torch.cat([self.table, self.table.new_zeros(missing, self.table.shape[1])])
            self.seen = torch.cat([self.seen, self.seen.new_zeros(missing)])
        rows = [self.rows[number] for number in last]
        self.table[rows] = predictions.float().cpu()[list(last.values())]
        self.seen[rows] += 1

    def state(self) -> dict[str, Tensor]:
        """Return the table as tensors, for a checkpoint."""
        count = len(self.rows)
        return {"ids": torch.tensor([*self.rows], dtype=torch.int64), "table": self.table[:count].clone(),
                "seen": self.seen[:count].clone()}  # fmt: skip

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the table of a checkpoint.

        Raises:
            RuntimeError: it has other classes.
        """
        if state["table"].shape[1] != self.table.shape[1]:
            raise RuntimeError(f"predictions of {state['table'].shape[1]} classes for {self.table.shape[1]}")
        self.rows = {number: row for row, number in enumerate(state["ids"].tolist())}
        self.table, self.seen = state["table"].clone(), state["seen"].clone()


@DISTILLER_REGISTRY.register()
class PSKD(Distiller):
    r"""Progressive self-distillation: the label is mixed with the network's own prediction of the epoch before.

    Kim et al., "Self-Knowledge Distillation with Progressive Refinement of Targets", ICCV 2021; there is no teacher. In
    epoch e of E, from 0, the target of an image is

    .. math:: (1 - \alpha_e) \, \mathrm{onehot} + \alpha_e P_{e-1}, \quad \alpha_e = \alpha \frac{e + 1}{E}

    P is the softmax of the training forward in which the image was seen last: in training mode, on another
    augmentation. Where an image is new it is the label. The epoch of an image is the number of times that it was seen.

    The published loss replaces the task's cross-entropy. Here it is added, so ``loss_pskd_past`` is the published loss
    minus the cross-entropy, and may be negative. The sum is the published loss where the task's loss is the mean
    cross-entropy of the same logits. With ``period`` above 1 the predictions are older.

    The predictions are kept in main memory, K numbers of 4 bytes an image, and in the checkpoint. Several processes
    exchange theirs in each step. Labels of mixed images have no prediction of their own, so mixing is no choice here.

    Published: alpha 0.8 on CIFAR-100 with 300 epochs. For detectors the paper trains the trunk as a classifier.

    Args:
        student_channels, teacher_channels: ``classes``, the logits.
        alpha: the share of the past prediction in the last epoch, 0 to 1.
        epochs: E, of the whole training. ``acam-kd`` fills it in.

    Raises:
        ConfigError: an argument is out of range, or the level is not the logits of a classifier.

    Example:
        >>> from acam_kd import Targets
        >>> method = PSKD({"classes": 10}, {"classes": 10}, epochs=3)
        >>> logits = {"classes": torch.rand(4, 10, 1, 1)}
        >>> known = Targets(labels={"classes": torch.randint(10, (4, 1, 1))}, ids=torch.arange(4))
        >>> losses = method(logits, logits, known)  # all images are new: 0
    """

    reads = (CLASSES,)
    needs = ("labels", "ids")
    families = ("classifier", "small_classifier", "")
    teacherless = True
    recipes = RECIPES["PSKD"]

    def __init__(
        self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 0.8, epochs: int = 0
    ) -> None:
        super().__init__(student_channels, teacher_channels)
        if not 0 <= alpha <= 1:
            raise ConfigError("alpha", alpha, "0 to 1")
        if epochs < 1:
            raise ConfigError("epochs", epochs, ">= 1", "the number of epochs of the whole training")
        if len(self.levels) != 1 or self.student_levels[self.levels[0]].sigmoid:
            raise ConfigError("levels", ", ".join(self.levels), "the logits of a classifier alone, as classes")
        check_several_classes(self.student_levels, method="PSKD")
        self.alpha, self.epochs, self.logits = alpha, epochs, self.levels[0]
        self.past = PastPredictions(self.student_levels[self.logits].channels)

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_pskd_past``, and keep the predictions."""
        logits = student[self.logits].flatten(1)
        if self.logits not in targets.labels or targets.ids is None:
            missing = "ids" if self.logits in targets.labels else "labels"
            raise ConfigError("targets", f"no {missing}", "the label and the number of every image", "give {targets}")
        labels, ids = targets.labels[self.logits].flatten(), targets.ids.flatten()
        if not len(logits) == len(labels) == len(ids):
            raise ConfigError("targets", f"{len(labels)} labels and {len(ids)} ids", f"{len(logits)}, as images")
        past, seen = self.past.read(ids.tolist(), labels)
        share = (self.alpha * (seen + 1) / self.epochs).clamp(0, self.alpha).to(logits.device)
        target = progressive_target(labels, past.to(logits.device), share)
        loss = progressive_cross_entropy(logits, target - F.one_hot(labels, logits.shape[1]))
        self.past.write(*_gathered(ids, logits.detach().float().softmax(1)))
        self._step = {f"{self.logits}/share": share.mean(), f"{self.logits}/images": torch.tensor(len(self.past.rows))}
        return {"loss_pskd_past": loss}

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean share of the past predictions, and the number of images that have one."""
        return dict(self._step)

    def get_extra_state(self) -> Any:
        """Return the table for the state dict."""
        return self.past.state()

    def set_extra_state(self, state: Any) -> None:
        """Take over the table of a state dict."""
        self.past.load(state)


def _gathered(ids: Tensor, predictions: Tensor) -> tuple[list[int], Tensor]:
    """Join the images of all processes, which have equally many each."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return ids.tolist(), predictions
    world = torch.distributed.get_world_size()
    everywhere = [torch.empty_like(ids) for _ in range(world)]
    theirs = [torch.empty_like(predictions) for _ in range(world)]
    torch.distributed.all_gather(everywhere, ids.contiguous())
    torch.distributed.all_gather(theirs, predictions.contiguous())
    return torch.cat(everywhere).tolist(), torch.cat(theirs)
