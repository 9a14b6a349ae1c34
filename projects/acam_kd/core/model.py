"""The training step of distillation, for any detector that has a ``backbone`` and returns a dict of losses."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .class_head import ClassHead, Predictions
from .distiller import Distiller
from .features import CLASSES, LOGITS, Features
from .losses import non_finite, with_unused
from .taps import FeatureTap
from .targets import Targets
from .teacher import Extract, FrozenTeacher

__all__ = ["DistillationModel"]


def backbone_features(network: nn.Module, batch: Tensor) -> Features:
    """What the backbone makes of a batch."""
    return network.backbone(batch)  # type: ignore[operator]


def nothing_known(*inputs: Any) -> Targets:
    """For methods that need nothing but features."""
    return Targets()


class DistillationModel(nn.Module):
    """A student, the frozen teacher that it learns from, and the method.

    In evaluation this is exactly the student. In training it is the student's losses plus the distiller's,
    which sees the student's backbone features and the teacher's features of the same batch.

    The teacher is not a submodule; ``FrozenTeacher`` says why.

    Args:
        student: in training ``student(*inputs)`` returns a dict of losses and calls ``student.backbone``
            once, on the (N, C, H, W) batch.
        teacher: called on that batch; None if nothing is distilled.
        distiller: the method, whose level names are the student's; None for the control without any:
            the student alone, or with nothing but inheritance.
        levels: student's level name -> teacher's level name, from ``match_levels``.
        logits: the module of the student whose output is its logit map, before upsampling: the level ``LOGITS``. The
            teacher's logit map is resized to the student's size, bilinearly with corners aligned.
        class_head: reads the predictions of the student's class head: the level ``CLASSES``. The teacher is then asked
            about the same regions.
        read_targets: the inputs of ``student`` -> boxes, image sizes and, with ``logits``, the labels of all pixels of
            the batch, as far as the engine can; called if the distiller needs any.
        extract: makes the student's features outside of a training step; its backbone's if left out.
        period: only steps whose ``iteration``, which the engine sets, is a multiple of this are distilled. The others
            are the student's alone: neither teacher nor distiller runs, and the distiller's parameters get a gradient
            of zero, so that nothing is unused (weight decay and momentum go on for them). No weight makes up for it:
            the pull is 1 / ``period`` of what it was.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: FrozenTeacher | None,
        distiller: Distiller | None,
        levels: Mapping[str, str],
        logits: nn.Module | None = None,
        class_head: ClassHead | None = None,
        read_targets: Callable[..., Targets] = nothing_known,
        extract: Extract = backbone_features,
        period: int = 1,
    ) -> None:
        super().__init__()
        if period < 1:
            raise ValueError(f"the period of distillation must be at least 1, not {period} (key: DISTILL.PERIOD)")
        if not isinstance(getattr(student, "backbone", None), nn.Module):
            raise ValueError(
                f"{type(student).__name__} has no module called `backbone` whose features could be distilled"
            )
        self.student = student
        self.teacher = teacher
        self.distiller = distiller
        self.levels = dict(levels)
        if (teacher is None) != (distiller is None):
            raise ValueError("a teacher needs a distiller and a distiller a teacher; one of them is None")
        self._class_head, self._read_targets = class_head, read_targets
        self._taps: list[FeatureTap] = []
        if distiller is not None:
            self._taps.append(FeatureTap(student.backbone))  # type: ignore[arg-type]
            if logits is not None:
                self._taps.append(FeatureTap(logits, level=LOGITS))
        self._extract = extract
        self._ratio = torch.zeros(())
        self._finite: dict[str, Tensor] = {}
        self.period, self.iteration = period, 0

    @property
    def distils(self) -> bool:
        """Whether this iteration is distilled, if anything is."""
        return self.iteration % self.period == 0

    def last_of(self, iterations: int) -> bool:
        """Whether this is the last distilled one of so many iterations: when to log what was measured, if at all."""
        return self.distils and self.iteration // iterations != (self.iteration + self.period) // iterations

    def first_of(self, iterations: int) -> bool:
        """Whether this is the first distilled one of so many iterations."""
        return self.distils and self.iteration // iterations != (self.iteration - self.period) // iterations

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Evaluation: the student's output. Training: the losses of student and distiller in one dict."""
        if not self.training or self.teacher is None or self.distiller is None:
            return self.student(*inputs, **kwargs)
        self._clear_taps()
        self._finite = {}
        task_losses = self.student(*inputs, **kwargs)
        if not self.distils:
            self._clear_taps()
            return with_unused(task_losses, self.distiller)
        (batch, student_features), *others = (tap.pop() for tap in self._taps)
        student_features = dict(student_features)
        for _, logits in others:
            student_features.update(logits)
        regions: tuple[Any, ...] = ()
        predictions = None
        if self._class_head is not None:
            predictions = self._class_head.pop()
            student_features[CLASSES], regions = predictions.logits, (predictions.regions,)
        pair = self._paired(student_features, self.teacher(batch, *regions), self.levels)
        if self.teacher.precision:
            self._finite = {s: x.isfinite().all() for s, x in pair[1].items()}
        distillation_losses = self.distiller(*pair, self._targets(inputs, pair[0], predictions))
        self._ratio = _values(distillation_losses).sum() / _values(task_losses).sum()
        return {**task_losses, **distillation_losses}

    def _clear_taps(self) -> None:
        for tap in self._taps:
            tap.clear()
        if self._class_head is not None:
            self._class_head.clear()

    def _targets(self, inputs: Any, student: Features, predictions: Predictions | None) -> Targets:
        """What the distiller needs to know; the labels of pixels at the size of the student's logits."""
        assert self.distiller is not None
        targets = self._read_targets(*inputs) if self.distiller.needs else Targets()
        labels = dict(targets.labels)
        if LOGITS in student and LOGITS in labels:
            labels[LOGITS] = _labels_at(labels[LOGITS], student[LOGITS])
        else:  # of a map that is not distilled
            labels.pop(LOGITS, None)
        if predictions is not None:
            labels[CLASSES] = predictions.labels
        return dataclasses.replace(targets, labels=labels)

    def _paired(self, student: Features, teacher: Features, levels: Iterable[str]) -> tuple[Features, Features]:
        levels = list(levels)
        if torch.is_grad_enabled() and not any(student[s].requires_grad for s in levels):
            raise RuntimeError(
                "the student's features have no gradient, so nothing can be distilled into them: is its backbone "
                "frozen, or checkpointed with use_reentrant=True?"
            )
        teacher = dict(teacher)
        if LOGITS in levels:
            name = self.levels[LOGITS]
            teacher[name] = _resized(teacher[name], student[LOGITS])
        for s in levels:
            own, other = tuple(student[s].shape[2:]), tuple(teacher[self.levels[s]].shape[2:])
            if own != other and s == CLASSES:
                raise ValueError(
                    f"the student's class head predicts for {own[0]} anchors, the teacher's for {other[0]}: they do "
                    "not correspond (keys: DISTILL.TAPS, DISTILL.METHOD)"
                )
            if own != other:
                raise ValueError(
                    f"level {s} of the student is {own}, level {self.levels[s]} of the teacher is {other}, for the "
                    "same batch: their strides are not what they claim"
                )
        paired = {s: teacher[self.levels[s]] for s in levels}
        if self.teacher is not None and self.teacher.precision:
            paired = {s: x.to(student[s].dtype) for s, x in paired.items()}
        return {s: student[s] for s in levels}, paired

    @torch.no_grad()
    def observe(self, batch: Tensor) -> dict[str, dict[str, Tensor]]:
        """The distiller's masks for a batch, student and distiller in evaluation mode; nothing is trained.

        Args:
            batch: (N, C, H, W), normalised and padded as the student's backbone gets it.

        Returns:
            As ``Distiller.masks``; empty without a distiller.
        """
        if self.teacher is None or self.distiller is None:
            return {}
        training = self.training
        self.eval()
        try:
            student = self._extract(self.student, batch)
            pair = self._paired(student, self.teacher(batch), [level for level in self.levels if level in student])
            for method in self.distiller.parts():
                if not method.needs and all(level in student for level in method.levels):
                    method(*pair)
                    if masks := method.masks():
                        return masks
        finally:
            self.train(training)
        return {}

    def metrics(self) -> dict[str, Tensor]:
        """The distiller's metrics of the last distilled step, and its ratio of the distillation to the task losses."""
        if self.distiller is None:
            return {}
        return {"distillation_to_task": self._ratio, **self.distiller.metrics()}

    def raise_if_not_finite(self, losses: Mapping[str, Tensor], when: str) -> None:
        """Stop before a non-finite loss reaches the weights; or, where its precision was chosen, a teacher's feature.

        Args:
            losses: what ``forward`` returned in training.
            when: said in the message, as "iteration 7".

        Raises:
            FloatingPointError: names the losses that are not finite, and the levels where they are not.
        """
        finite = torch.stack([*self._finite.values()]).tolist() if self._finite else []  # the device is asked once
        if broken := [level for level, ok in zip(self._finite, finite) if not ok]:
            assert self.teacher is not None
            raise FloatingPointError(
                f"{when}: the teacher's features, made in {self.teacher.precision}, are not finite: "
                f"{', '.join(broken)} (float16, be it the student's, ends at 65504; key: DISTILL.TEACHER.PRECISION)"
            )
        terms = non_finite(losses)
        if not terms:
            return
        places = [name for name, value in self.metrics().items() if not math.isfinite(value)]
        where = f" (not finite there: {', '.join(places)})" if places else ""
        raise FloatingPointError(f"{when}: loss is not finite: {', '.join(terms)}{where}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationModel:
        if self.teacher is not None:
            self.teacher._apply(fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


def _resized(logits: Tensor, like: Tensor) -> Tensor:
    """(N, K, H, W) with the height and width of ``like``: output strides may differ."""
    if logits.shape[2:] == like.shape[2:]:
        return logits
    return F.interpolate(logits, like.shape[2:], mode="bilinear", align_corners=True)


def _labels_at(labels: Tensor, logits: Tensor) -> Tensor:
    """(N, H', W') labels for the positions of (N, K, H, W) logits: those nearest to the cells' centres.

    Where a head is scaled up with corners aligned, as ours of Detectron2, its outermost positions lie on the border
    itself: up to half a cell from there.
    """
    if labels.shape[1:] == logits.shape[2:]:
        return labels
    return F.interpolate(labels[:, None].float(), logits.shape[2:], mode="nearest-exact")[:, 0].long()


def _values(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack([loss.detach().float().reshape(()) for loss in losses.values()])
