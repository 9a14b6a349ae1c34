#!/usr/bin/env python
"""By what the weights of a comparison's rows must be multiplied to pull at the student as hard as plain mimicking.

    python tools/match_weights.py --plan configs/compare/shapes_detection.yaml --output output/compare/detection

The published weights belong to other models, images and losses: a sum over a map of 100 x 168 positions is another
thing at 20 x 20. So that no method is handicapped by its unit, the weights of docs/comparison.md were set by one rule:
the distillation's gradient with respect to the student's backbone features has the norm of that of the plan's
``mimicking`` row. The student is that of the finished run of ``inheritance_alone``, or of ``student_alone``, with seed
0, and what the method itself has to learn is trained first, the student kept as it is. For the torchvision engine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acam_kd.cli import train_settings
from acam_kd.compare import Run, Setting, read_plan
from acam_kd.core import DistillationModel
from acam_kd.errors import one_line_errors
from acam_kd.tv.build import build
from acam_kd.tv.data import Stream, training_loader
from acam_kd.tv.distillation import load_weights
from acam_kd.tv.labels import load_data

SEED = 0


class Pull:
    """The norms, over all levels, of the gradients at the backbone's features: the distillation's and the task's."""

    def __init__(self, model: DistillationModel) -> None:
        assert model.distiller is not None
        self.features: list[Tensor] = []
        self.own: list[str] = []
        model.student.backbone.register_forward_hook(self._keep_features)  # type: ignore[operator, union-attr]
        model.distiller.register_forward_hook(self._keep_names)

    def _keep_features(self, module: Any, args: Any, output: dict[str, Tensor]) -> None:
        self.features = list(output.values())

    def _keep_names(self, module: Any, args: Any, output: dict[str, Tensor]) -> None:
        self.own = list(output)

    def distillation(self, losses: dict[str, Tensor]) -> Tensor:
        """The distiller's losses, added up."""
        return torch.stack([losses[name] for name in self.own]).sum()

    def __call__(self, losses: dict[str, Tensor]) -> tuple[float, float]:
        """The norms for one batch."""
        own = self.distillation(losses)
        task = torch.stack([loss for name, loss in losses.items() if name not in self.own]).sum()
        return self._norm(own), self._norm(task)

    def _norm(self, loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, self.features, retain_graph=True, allow_unused=True)
        return float(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())


def norms(setting: Setting, row: str, output: Path, warmup: int, steps: int) -> tuple[float, float]:
    """The mean norms of the distillation's gradient and of the task's; zeros for a row without a method."""
    settings = train_settings(Run(setting, row, SEED, output).options())
    data = load_data(settings.train_split, settings.student_name, name="training data")
    torch.manual_seed(SEED)
    model = build(settings, data).train()
    if model.distiller is None:
        return 0.0, 0.0
    base = setting.inheritance_alone if setting.inheritance_alone in setting.rows else setting.student_alone
    load_weights(model.student, str(Run(setting, base, SEED, output).folder / "student.pth"), role="student")
    learnt = [p for p in model.distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, 1e-3) if learnt else None
    pull, found = Pull(model), []
    stream = Stream(len(data), batch_size=settings.batch_size, batches=warmup + steps, seed=SEED)
    for step, batch in enumerate(training_loader(data, stream, workers=0)):
        losses = model(*batch)
        if step >= warmup:
            found.append(pull(losses))
        elif optimizer is not None:
            optimizer.zero_grad()
            pull.distillation(losses).backward(inputs=learnt)  # type: ignore[no-untyped-call]
            optimizer.step()
    return statistics.mean(own for own, _ in found), statistics.mean(task for _, task in found)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML; see configs/compare")
    parser.add_argument("--output", type=Path, required=True, help="of tools/compare.py with that plan")
    parser.add_argument("--warmup", type=int, default=30, help="steps that train the method alone")
    parser.add_argument("--steps", type=int, default=8, help="steps to average over")
    args = parser.parse_args()
    with one_line_errors("match_weights.py"):
        for setting in read_plan(args.plan):
            if setting.engine != "torchvision" or not setting.mimicking:
                raise ValueError(f"setting {setting.name!r}: the torchvision engine and a mimicking row are needed")
            aim, _ = norms(setting, setting.mimicking, args.output, args.warmup, args.steps)
            print(f"## {setting.name}\n\n| row | distillation | task | multiply by |\n|---|---|---|---|")
            for row in setting.rows:
                own, task = norms(setting, row, args.output, args.warmup, args.steps)
                if own:
                    print(f"| {row} | {own:.4g} | {task:.4g} | {aim / own:.3g} |", flush=True)


if __name__ == "__main__":
    main()
