#!/usr/bin/env python
"""The strength with which the rows of a comparison pull at the student, and by what to multiply their weights.

    python -m benchmarks.match_weights --plan configs/compare/shapes_detection.yaml --output output/compare/detection

The published weights belong to other models, images and losses: a sum over a map of 100 x 168 positions is another
thing at 20 x 20. Two rules tell how far off they are: the distillation's gradient at the student's backbone features
beside that of the plan's ``mimicking`` row; and its loss beside the task's, above the floor that it has where the
student predicts what the teacher does. Both are measured on the student of the finished run of "inheritance alone",
or of "student alone", with seed 0; what the method itself has to learn is trained first, the student kept as it is.
For the torchvision engine.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from acam_kd.cli import train_settings
from acam_kd.compare import Run, Setting, read_plan
from acam_kd.core import ConfigError, Distillation
from acam_kd.core.errors import one_line_errors
from acam_kd.report.comparison import INHERITANCE_ALONE, STUDENT_ALONE
from acam_kd.tv.build import build
from acam_kd.tv.data import Stream, training_loader
from acam_kd.tv.distillation import load_weights
from acam_kd.tv.labels import load_data

SEED = 0


class Pull:
    """The gradients that the distillation and the task send into the student in a step.

    Args:
        student: with a distillation attached.
    """

    def __init__(self, student: nn.Module) -> None:
        assert isinstance(student.distillation, Distillation)
        self.distiller = student.distillation.method
        self.features: list[Tensor] = []
        self.inputs: tuple[Any, ...] = ()
        self.own: list[str] = []
        student.backbone.register_forward_hook(self._keep_features)  # type: ignore[operator, union-attr]
        self.distiller.register_forward_hook(self._keep_losses)

    def _keep_features(self, module: Any, args: Any, output: dict[str, Tensor]) -> None:
        self.features = list(output.values())

    def _keep_losses(self, module: Any, args: Any, output: dict[str, Tensor]) -> None:
        self.inputs, self.own = args, list(output)

    def distillation(self, losses: dict[str, Tensor]) -> Tensor:
        """Add up the distiller's losses."""
        return torch.stack([losses[name] for name in self.own]).sum()

    def __call__(self, losses: dict[str, Tensor]) -> list[float]:
        """Return norms of the gradients over all levels, then losses: of the distillation and of the task."""
        own = self.distillation(losses)
        task = torch.stack([loss for name, loss in losses.items() if name not in self.own]).sum()
        return [self._norm(own), self._norm(task), float(own) - self._floor(), float(task)]

    def _norm(self, loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss, self.features, retain_graph=True, allow_unused=True)
        return float(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())

    @torch.no_grad()
    def _floor(self) -> float:
        """Return the loss of a student equal to the teacher; 0 where the method has parameters of its own."""
        if any(True for _ in self.distiller.parameters()):
            return 0.0
        _, teacher, targets = self.inputs
        return float(torch.stack(list(self.distiller(teacher, teacher, targets).values())).sum())


def measure(setting: Setting, row: str, output: Path, warmup: int, steps: int) -> list[float]:
    """Return what ``Pull`` gives, averaged over steps; nothing for a row without a method."""
    settings = train_settings(Run(setting, row, SEED, output).options())
    data = load_data(settings.train_split, settings.student_name, name="training data")
    torch.manual_seed(SEED)
    model = build(settings, data).train()
    if not hasattr(model, "distillation"):
        return []
    base = INHERITANCE_ALONE if INHERITANCE_ALONE in setting.rows else STUDENT_ALONE
    load_weights(model, str(Run(setting, base, SEED, output).folder / "student.pth"), role="student")
    attached: Any = model.distillation
    learnt = [p for p in attached.method.parameters() if p.requires_grad]
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
    return [statistics.mean(values) for values in zip(*found)]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", type=Path, required=True, help="YAML; see configs/compare")
    parser.add_argument("--output", type=Path, required=True, help="of acam-kd compare with that plan")
    parser.add_argument("--warmup", type=int, default=30, help="steps that train the method alone")
    parser.add_argument("--steps", type=int, default=8, help="steps to average over")
    parser.add_argument("--ratio", type=float, default=10.0, help="of the distillation's loss to the task's")
    args = parser.parse_args()
    with one_line_errors("match_weights.py"):
        for setting in read_plan(args.plan):
            if setting.engine != "torchvision" or not setting.mimicking:
                raise ConfigError("plan", f"setting {setting.name!r}", "the torchvision engine and a mimicking row")
            aim = measure(setting, setting.mimicking, args.output, args.warmup, args.steps)[0]
            print(f"## {setting.name}\n\n| row | gradient | task's | to pull as mimicking, x | loss | task's |", end="")
            print(f" to weigh {args.ratio:g} times the task, x |\n|---|---|---|---|---|---|---|")
            for row in setting.rows:
                if found := measure(setting, row, args.output, args.warmup, args.steps):
                    gradient, pull, loss, task = found
                    cells = [gradient, pull, aim / gradient, loss, task, args.ratio * task / loss]
                    print(f"| {row} | {' | '.join(f'{cell:.3g}' for cell in cells)} |", flush=True)


if __name__ == "__main__":
    main()
