"""HARD: an augmentor that looks for images on which student and teacher disagree, beside the training of a student.

Nix, Burg & Sinz, "Hard Augmentations for Robust Distillation", arXiv 2305.14890, 2023. Its abstract was readable and no
code was published, so this is a reconstruction. What the abstract says is the aim; the rest is ours, in ``CONSTANTS``.
The augmentor is the affine one, with colours as an option. One that edits images by a pretrained VAE is not here, since
no weights can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from ..core import ConfigError, Distillation
from ..core.teacher import evaluating
from ..core.unlabelled import keeping_statistics
from ..methods.kd import kd_loss
from ..methods.parts.augmentor import AffineAugmentor, augmentor_objective
from ..methods.recipes import RECIPES
from .class_adapter import family_of
from .classification import Classifier
from .run import Settings

__all__ = ["CONSTANTS", "LOSS", "Alternation", "Constants", "HardAugmentor", "check_augmentor"]

LOSS = "loss_hard"
"""The name of the loss that it adds to the model's own."""
COLOUR = "hard-colour"
"""The augmentor that changes colours, too."""
SIDE = 96
"""Smaller images are shown at about this size."""


@dataclass(frozen=True)
class Constants:
    """The numbers that no source gives for HARD; all of them are ours.

    Args:
        learning_rate, weight_decay: of the augmentor's AdamW; TeachAugment's (CVPR 2022).
        lambda_teacher: see ``augmentor_objective``.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    lambda_teacher: float = 1.0


CONSTANTS = Constants()


def check_augmentor(settings: Settings, student: nn.Module, teacher: nn.Module | None, *, comparable: bool) -> None:
    """Check the options of an augmentor.

    Args:
        settings: of the run.
        student, teacher: the models.
        comparable: the teacher knows the classes of the data.

    Raises:
        ConfigError: there is no classifier, no teacher of the same classes, or no method; or a number is out of range.
    """
    thresholds = settings.augmentor_thresholds
    if not settings.augmentor:
        if thresholds or settings.augmentor_ratio != Settings.__dataclass_fields__["augmentor_ratio"].default:
            name = "augmentor_thresholds" if thresholds else "augmentor_ratio"
            raise ConfigError(name, getattr(settings, name), "none without an augmentor", "give {augmentor}")
        return
    if not isinstance(student, Classifier):
        hint = "boxes and masks would have to move with the image"
        raise ConfigError("augmentor", f"{settings.augmentor} for {settings.student}", "a classifier", hint)
    if teacher is None or not settings.method:
        raise ConfigError("augmentor", f"{settings.augmentor} without a teacher", "a teacher", "give {teacher}")
    if not comparable:
        raise ConfigError("augmentor", f"a teacher {settings.teacher} of other classes", "a teacher of the data's")
    if thresholds and not 0 <= thresholds[0] < thresholds[1]:
        raise ConfigError("augmentor_thresholds", thresholds, "two numbers >= 0, the smaller one first")


class Alternation:
    """The turns of augmentor and student.

    By ratio the student learns from augmented images in every step, and each ``ratio``-th step the augmentor is trained
    too. By thresholds it is one of them at a time: the student learns from augmented images until they disagree less
    than the lower one; then the augmentor is trained until they disagree more than the upper one.

    Args:
        ratio: steps of the student for one of the augmentor.
        thresholds: lower and upper; None for the ratio.
    """

    def __init__(self, ratio: int, thresholds: tuple[float, float] | None) -> None:
        self.ratio, self.thresholds = ratio, thresholds
        self.augmentors = False

    def student_learns(self) -> bool:
        """Tell if the student learns from augmented images now."""
        return not self.augmentors

    def augmentor_learns(self, step: int) -> bool:
        """Tell if the augmentor is trained in this step."""
        return self.augmentors if self.thresholds else (step + 1) % self.ratio == 0

    def saw(self, disagreement: float) -> None:
        """Take turns where the disagreement has crossed a threshold."""
        if self.thresholds:
            lower, upper = self.thresholds
            self.augmentors = disagreement <= upper if self.augmentors else disagreement < lower


class HardAugmentor:
    """The augmentor of a run, its optimizer, and the student's loss on its images.

    D is KD's loss with the weight and the temperature of KD's recipe for the student. The student's batch norms keep
    the statistics of the images as they are. The augmentor's steps freeze both nets, in evaluation mode.

    Args:
        fabric: of the run.
        student: with the distillation attached.
        attached: the distillation.
        settings: of the run.
    """

    def __init__(self, fabric: Fabric, student: Classifier, attached: Distillation, settings: Settings) -> None:
        self.fabric, self.student, self.attached = fabric, student, attached
        recipe = RECIPES["KD"][family_of(student)].arguments
        self.alpha, self.temperature = float(recipe["alpha"]), float(recipe["temperature"])
        self.colour = settings.augmentor == COLOUR
        self.augmentor = AffineAugmentor(colour=self.colour, rank=fabric.global_rank, world=fabric.world_size).to(
            fabric.device
        )
        self.optimizer = torch.optim.AdamW(
            self.augmentor.parameters(), lr=CONSTANTS.learning_rate, weight_decay=CONSTANTS.weight_decay
        )
        self.turns = Alternation(settings.augmentor_ratio, settings.augmentor_thresholds)
        self._measured = dict[str, float]()

    def losses(self, images: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return ``loss_hard``, the weighted D on augmented images; nothing in a step that has none.

        Args:
            images: (3, H, W) each, in [0, 1].
        """
        if not self.attached.distils or not self.turns.student_learns():
            return {}
        batch = self.student.batch(images)
        with torch.no_grad():
            batch = self.augmentor(batch)
        with keeping_statistics(self.student.network):
            student = _logits(self.student.network, batch)
        with torch.no_grad():
            teacher = self._teacher(batch)
        loss = kd_loss(student, teacher, self.temperature)
        self._turn(loss.detach())
        return {LOSS: self.alpha * self.attached.weighting.factor(self.attached.iteration) * loss}

    def step(self, images: Sequence[Tensor], number: int) -> None:
        """Train the augmentor, if it is its turn.

        Args:
            images: as in ``losses``.
            number: of the student's step, from 0.
        """
        if not self.attached.distils or not self.turns.augmentor_learns(number):
            return
        batch = self.student.batch(images).detach()
        disagreement, change = self.measure(batch)
        objective = augmentor_objective(disagreement, change, CONSTANTS.lambda_teacher)
        parameters = list(self.augmentor.parameters())
        for parameter, gradient in zip(parameters, torch.autograd.grad(-objective, parameters)):
            parameter.grad = self.fabric.all_reduce(gradient, reduce_op="mean")  # type: ignore[assignment]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._measured = {"disagreement": disagreement.item(), "teacher_change": change.item()}
        if not self.turns.student_learns():
            self._turn(disagreement.detach())

    def measure(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return D of student and teacher on augmented images, and that of the teacher there and on the images."""
        hard = self.augmentor(batch)
        with evaluating(self.student.network):
            student = _logits(self.student.network, hard)
        with torch.no_grad():
            before = self._teacher(batch)
        after = self._teacher(hard)
        return kd_loss(student, after, self.temperature), kd_loss(after, before, self.temperature)

    def _teacher(self, batch: Tensor) -> Tensor:
        teacher = self.attached.teacher
        batch = teacher.pixels(batch) if teacher.pixels is not None else batch
        with evaluating(teacher.network):
            return _logits(teacher.network, batch)

    def _turn(self, disagreement: Tensor) -> None:
        if self.turns.thresholds:
            self.turns.saw(float(self.fabric.all_reduce(disagreement, reduce_op="mean")))  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """Return the last D of the augmentor's steps, and its mean deviation and distance from the identity."""
        with torch.no_grad():
            away = self.augmentor.bias - AffineAugmentor(colour=self.colour).bias.to(self.augmentor.bias)
            found = {"std": float(self.augmentor.std.abs().mean()), "shift": float(away.abs().max())}
        return {f"distill/augmentor/{name}": value for name, value in {**self._measured, **found}.items()}

    @torch.no_grad()
    def picture(self, images: Sequence[Tensor]) -> Any:
        """Draw images above their augmented selves, uint8 RGB (H, W, 3); no random number of the run is used."""
        batch = self.student.batch(images)
        with torch.random.fork_rng(devices=[batch.device] if batch.device.type == "cuda" else []):
            torch.manual_seed(0)
            hard = self.augmentor(batch)
        mean, std = (batch.new_tensor(x).view(3, 1, 1) for x in (self.student.image_mean, self.student.image_std))
        rows = torch.cat([torch.cat([*(part * std + mean)], 2) for part in (batch, hard)], 1)
        larger = max(1, SIDE // batch.shape[-1])
        shown = rows.repeat_interleave(larger, 1).repeat_interleave(larger, 2)
        return (shown.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """Return what it has learnt, for the checkpoint."""
        return {
            "augmentor": self.augmentor.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "turn": self.turns.augmentors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the state of a checkpoint."""
        self.augmentor.load_state_dict(state["augmentor"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.turns.augmentors = state["turn"]


def _logits(network: Any, batch: Tensor) -> Tensor:
    output = network(batch)
    return (output if isinstance(output, Tensor) else output[0]).float()
