"""The learning of tokens for MasKD and FreeKD, on the frozen teacher and by the teacher's own losses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ...core.errors import ConfigError, RunError
from ...core.features import LOGITS
from ...core.outputs import non_finite
from .tokens import TokenModule

__all__ = ["TokenLearning", "learn_tokens"]

logger = logging.getLogger("acam_kd")

LOG_PERIOD = 20


class TokenLearning(nn.Module):
    """The tokens, and a frozen teacher that sees only the parts of its maps that they select.

    In training every map that has tokens is replaced by the parts selected from it, and the rest of the teacher runs
    on these. The teacher's losses, together with the overlap of the masks, train the tokens and nothing else.

    The teacher is in training mode, because only then does it return losses. Layers with running statistics and
    dropout stay in evaluation mode, so that nothing moves and nothing is random. The teacher is not a submodule:
    neither ``parameters()`` nor ``state_dict()`` has any of it.

    Args:
        teacher: a model that in training returns a dict of losses from ``teacher(*inputs)``. It calls
            ``teacher.backbone``, which returns a mapping from level name to (N, C, H, W). It is frozen in place.
        tokens: the teacher's level -> its tokens.
        logits: the module of the teacher that gives the logit map; needed if ``LOGITS`` is one of the levels.

    Raises:
        ConfigError: the teacher has no backbone.
        ValueError: there are tokens for logits without the module that gives the logits, or the reverse.
    """

    def __init__(
        self, teacher: nn.Module, tokens: Mapping[str, TokenModule], *, logits: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(getattr(teacher, "backbone", None), nn.Module):
            raise ConfigError(
                "teacher",
                f"{type(teacher).__name__}, which has no module called `backbone`",
                "a model whose backbone's maps can be replaced",
            )
        if (LOGITS in tokens) != (logits is not None):
            raise ValueError("tokens for a logit map need the module that gives it, and the module needs tokens")
        self.tokens = nn.ModuleDict(tokens)
        self._hidden = (teacher.requires_grad_(False), logits)  # in a tuple nn.Module does not find them
        self.train()

    @property
    def teacher(self) -> nn.Module:
        """The whole frozen model."""
        return self._hidden[0]

    def train(self, mode: bool = True) -> TokenLearning:
        """Set the mode of tokens and teacher; the teacher's normalisation and dropout stay in evaluation mode."""
        super().train(mode)
        self.teacher.train(mode)
        for module in self.teacher.modules():
            if isinstance(module, (_NormBase, _DropoutNd)) or type(module).__name__ == "StochasticDepth":
                module.eval()
        return self

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """Return the teacher's losses on the selected parts, and ``loss_tokens_diversity``, summed over levels.

        Raises:
            RunError: the teacher gave no map for a level that has tokens.
        """
        overlaps: dict[str, Tensor] = {}
        with self._replacing(overlaps):
            losses: dict[str, Tensor] = self.teacher(*inputs)
        missing = [level for level in self.tokens if level not in overlaps]
        if missing:
            raise RunError(f"the teacher gave no map for {', '.join(missing)}, so its tokens learn nothing")
        return {**losses, "loss_tokens_diversity": torch.stack(list(overlaps.values())).sum()}

    @contextmanager
    def _replacing(self, overlaps: dict[str, Tensor]) -> Iterator[None]:
        """Add hooks to the teacher for one forward only, so that its other uses do not change."""

        def replace(level: str, features: Tensor) -> Tensor:
            if level not in self.tokens:
                return features
            module = self.tokens[level]
            assert isinstance(module, TokenModule)
            replaced, overlaps[level] = module.replace(features)
            return replaced

        def of_backbone(module: nn.Module, args: Any, output: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            return {level: replace(level, features) for level, features in output.items()}

        def of_logits(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return replace(LOGITS, output)

        handles = [self.teacher.backbone.register_forward_hook(of_backbone)]  # type: ignore[operator,union-attr]
        if self._hidden[1] is not None:
            handles.append(self._hidden[1].register_forward_hook(of_logits))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenLearning:
        self.teacher._apply(fn)  # type: ignore[no-untyped-call]
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call, no-any-return]


def learn_tokens(
    learning: TokenLearning,
    batches: Iterable[tuple[Any, ...]],
    *,
    iterations: int = 2000,
    learning_rate: float = 0.01,
    weight_decay: float = 1e-3,
    log: logging.Logger = logger,
) -> list[dict[str, float]]:
    """Train the tokens as MasKD's authors do for detectors: Adam, and a cosine from ``learning_rate`` to 1e-6.

    For Faster R-CNN and on logits the authors use SGD with 0.1; on logits they take 10000 iterations.

    Args:
        learning: teacher and tokens, on their device.
        batches: the inputs of one forward each; at least as many as there are iterations.
        iterations: the number of steps.
        learning_rate, weight_decay: Adam's; the authors' weight decay for a Cascade Mask R-CNN is 0.1.
        log: gets a line for each logged step.

    Returns:
        The losses of every logged step: every ``LOG_PERIOD``-th and the last.

    Raises:
        ConfigError: the learning rate is not positive and finite.
        RunError: a loss is not finite.
    """
    if not 0 < learning_rate < math.inf:
        raise ConfigError("learning_rate", learning_rate, "> 0 and finite")
    optimizer = torch.optim.Adam(learning.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-6)
    learning.train()
    logged = []
    for step, inputs in zip(range(1, iterations + 1), batches):
        losses = learning(*inputs)
        loss = torch.stack([value.float().reshape(()) for value in losses.values()]).sum()
        if wrong := non_finite(losses):
            raise RunError(
                f"loss is not finite: {', '.join(wrong)}",
                where=f"iteration {step} of learning tokens",
                remedy="check the teacher and its data, or learn with a lower rate by acam_kd.learn_tokens",
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % LOG_PERIOD == 0 or step == iterations:
            logged.append({name: float(value.detach()) for name, value in losses.items()})
            diversity = logged[-1]["loss_tokens_diversity"]
            total = float(loss.detach()) - diversity
            log.info("tokens: step %d/%d  loss %.4g  diversity %.4g", step, iterations, total, diversity)
    return logged
