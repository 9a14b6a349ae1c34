"""ScoreWeighted: mimicking where the teacher sees an object."""

from __future__ import annotations

from torch import Tensor, nn

from ..core.distiller import NOTHING_KNOWN, Distiller, check_weights
from ..core.errors import ConfigError
from ..core.features import BACKBONE, Channels, Features
from ..core.registry import DISTILLER_REGISTRY
from ..core.targets import Targets
from .parts.losses import check_shapes, full_precision
from .recipes import RECIPES

__all__ = ["ScoreWeighted", "score_weighted_mse"]

EPS = 1e-12
"""The least sum of scores: where the teacher sees nothing at all the loss is 0."""


@full_precision
def score_weighted_mse(student: Tensor, teacher: Tensor, scores: Tensor) -> Tensor:
    r"""Compute the squared error weighted by scores, averaged over their sum and over channels.

    .. math:: L = \frac{\sum_{n,p} s_{n,p} \lVert S_{n,p} - T_{n,p} \rVert^2}{C \sum_{n,p} s_{n,p}}

    A common factor of all scores changes nothing; equal scores give the mean squared error.

    Args:
        student, teacher: (N, C, H, W).
        scores: (N, 1, H, W), not negative.

    Raises:
        ValueError: the shapes do not fit each other.

    Example:
        >>> import torch
        >>> student, teacher = torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]])
        >>> score_weighted_mse(student, teacher, torch.tensor([[[[0.75, 0.25]]]]))  # 0.75 * 1 + 0.25 * 9
        tensor(3.)
    """
    check_shapes(student, teacher)
    expected = (len(student), 1, *student.shape[2:])
    if scores.shape != expected:
        raise ValueError(f"scores {tuple(scores.shape)} do not fit features {tuple(student.shape)}")
    weighted = (student - teacher).square() * scores
    return weighted.sum() / (student.shape[1] * scores.sum().clamp_min(EPS))


@DISTILLER_REGISTRY.register()
class ScoreWeighted(Distiller):
    """The squared error of a projected student, weighted by the teacher's largest class probability at each position.

    An independent implementation of the formula in the documentation of Ultralytics' distillation:

        L = alpha sum_levels sum(s * (projected(F_S) - F_T)^2) / (C sum(s))

    The projection of a level is a 1x1 convolution, ReLU and a 1x1 convolution, from the student's to the teacher's
    width. It starts at random also where the widths agree.

    s comes from the teacher's own class head. Sigmoid heads give the largest sigmoid of a class and an anchor, softmax
    heads the largest probability without the background's. Of R-CNNs it is the objectness of the region proposal
    network, since their classes lie on no map. A level that the head does not see gets the scores of the nearest one,
    resized bilinearly. FCOS's centerness does not count.

    The documentation's weight is 6 times the batch, on a loss that is a mean. Its task loss is a sum over the batch;
    those of Detectron2 and torchvision are means, so 6 without the batch is the same ratio. The sum over levels is
    ours (assumption).

    Args:
        student_channels, teacher_channels: the levels to distil, of a backbone.
        alpha: weight.

    Raises:
        ConfigError: the weight is out of range. In ``forward``: the scores of a level are not known.

    Example:
        >>> import torch
        >>> from acam_kd import Targets
        >>> method = ScoreWeighted(student_channels={"p3": 16}, teacher_channels={"p3": 24})
        >>> known = Targets(scores={"p3": torch.rand(2, 1, 12, 20)})
        >>> losses = method({"p3": torch.rand(2, 16, 12, 20)}, {"p3": torch.rand(2, 24, 12, 20)}, known)
        >>> sorted(losses)
        ['loss_scoreweighted_mse']
    """

    reads = (BACKBONE,)
    needs = ("scores",)
    recipes = RECIPES["ScoreWeighted"]

    def __init__(self, student_channels: Channels, teacher_channels: Channels, *, alpha: float = 6.0) -> None:
        super().__init__(student_channels, teacher_channels)
        check_weights(alpha=alpha)
        self.alpha = alpha
        self.project = nn.ModuleDict()
        for level, spec in self.student_levels.items():
            width = self.teacher_levels[level].channels
            self.project[level] = nn.Sequential(
                nn.Conv2d(spec.channels, width, 1), nn.ReLU(), nn.Conv2d(width, width, 1)
            )

    def forward(self, student: Features, teacher: Features, targets: Targets = NOTHING_KNOWN) -> dict[str, Tensor]:
        """Return ``loss_scoreweighted_mse``."""
        if missing := [level for level in self.levels if level not in targets.scores]:
            raise ConfigError(
                "targets", f"no scores for {', '.join(missing)}", "the teacher's score of every position",
                "ScoreWeighted needs them: choose a method that needs none, such as Mimic, or give {targets}",
            )  # fmt: skip
        errors = {}
        for level in self.levels:
            projected = self.project[level](student[level])
            scores = targets.scores[level].detach()
            errors[level] = score_weighted_mse(projected, teacher[level].detach(), scores)
            self._step[level] = {"mse": errors[level].detach(), "score": scores.float().mean()}
        return {"loss_scoreweighted_mse": self.alpha * sum(errors.values())}  # type: ignore[dict-item]

    def metrics(self) -> dict[str, Tensor]:
        """Return ``<level>/mse``, weighted, and ``<level>/score``, the mean score."""
        return {f"{level}/{name}": value for level, part in self._step.items() for name, value in part.items()}
