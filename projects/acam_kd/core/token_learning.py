"""The first stage of MasKD and FreeKD: tokens are learnt on the frozen teacher, by the teacher's own losses."""

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

from .features import LOGITS
from .losses import non_finite
from .tokens import TokenModule

__all__ = ["TokenLearning", "learn_tokens"]

logger = logging.getLogger("acam_kd")

LOG_PERIOD = 20


class TokenLearning(nn.Module):
    """A frozen teacher that sees only what the tokens select, and the tokens.

    In training every map that has tokens is replaced by what they select of it, the rest of the teacher runs on that,
    and its losses, together with the overlap of the masks, train the tokens and nothing else. The teacher is in
    training mode, because only then does it return losses, but not what would move or chance: layers with running
    statistics, and dropout. It is not a submodule, so neither ``parameters()`` nor ``state_dict()`` has any of it.

    Args:
        teacher: in training ``teacher(*inputs)`` returns a dict of losses and calls ``teacher.backbone``, which
            returns a mapping from level name to (N, C, H, W). It is frozen in place.
        tokens: the teacher's level -> its tokens.
        logits: the module of the teacher that gives the logit map; needed if ``LOGITS`` is one of the levels.

    Raises:
        ValueError: the teacher has no backbone, or there are tokens for logits and nothing that gives these.
    """

    def __init__(
        self, teacher: nn.Module, tokens: Mapping[str, TokenModule], *, logits: nn.Module | None = None
    ) -> None:
        super().__init__()
        if not isinstance(getattr(teacher, "backbone", None), nn.Module):
            raise ValueError(f"{type(teacher).__name__} has no module called `backbone` whose maps could be replaced")
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
        """Training mode for the tokens, and for all of the teacher that neither moves nor draws by it."""
        super().train(mode)
        self.teacher.train(mode)
        for module in self.teacher.modules():
            if isinstance(module, (_NormBase, _DropoutNd)) or type(module).__name__ == "StochasticDepth":
                module.eval()
        return self

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The teacher's losses on what is selected, and ``loss_tokens_diversity``, summed over levels.

        Raises:
            RuntimeError: the teacher did not come by every level that has tokens.
        """
        overlaps: dict[str, Tensor] = {}
        with self._replacing(overlaps):
            losses: dict[str, Tensor] = self.teacher(*inputs)
        missing = [level for level in self.tokens if level not in overlaps]
        if missing:
            raise RuntimeError(f"the teacher gave no map for {', '.join(missing)}, so its tokens learn nothing")
        return {**losses, "loss_tokens_diversity": torch.stack(list(overlaps.values())).sum()}

    @contextmanager
    def _replacing(self, overlaps: dict[str, Tensor]) -> Iterator[None]:
        """Hooks for one forward: a teacher that is used otherwise is as it was."""

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
) -> list[dict[str, float]]:
    """Train the tokens as MasKD's authors do for detectors: Adam, and a cosine from ``learning_rate`` to 1e-6.

    (They use SGD with 0.1 for Faster R-CNN and on logits, where they take 10000 iterations.)

    Args:
        learning: teacher and tokens, on their device.
        batches: the inputs of a forward each; as many as there are iterations at least.
        iterations: steps.
        learning_rate, weight_decay: Adam's; the authors' weight decay for a Cascade Mask R-CNN is 0.1.

    Returns:
        The losses of every step that was logged, each ``LOG_PERIOD`` and the last.

    Raises:
        ValueError: the learning rate is not positive and finite.
        FloatingPointError: a loss is not finite.
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(f"the learning rate must be positive and finite, found {learning_rate} (option: --lr)")
    optimizer = torch.optim.Adam(learning.parameters(), learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=1e-6)
    learning.train()
    logged = []
    for step, inputs in zip(range(1, iterations + 1), batches):
        losses = learning(*inputs)
        loss = torch.stack([value.float().reshape(()) for value in losses.values()]).sum()
        if wrong := non_finite(losses):
            raise FloatingPointError(
                f"iteration {step}: loss is not finite: {', '.join(wrong)}; lower the learning rate"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % LOG_PERIOD == 0 or step == iterations:
            logged.append({name: float(value.detach()) for name, value in losses.items()})
            diversity = logged[-1]["loss_tokens_diversity"]
            logger.info(
                "step %d/%d  loss %.4g  diversity %.4g", step, iterations, float(loss.detach()) - diversity, diversity
            )
    return logged
