"""Inheritance of weights: a student's neck and head start from the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

__all__ = ["Inherited", "inherit"]


@dataclass
class Inherited:
    """The result of ``inherit``: the names of the tensors copied, and name -> reason for those skipped."""

    copied: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"inherited {len(self.copied)} tensors of the teacher's neck and head"]
        if self.skipped:
            lines[0] += f", skipped {len(self.skipped)} of the student's that do not fit and keep their own values:"
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped.items()])


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, *, exclude: Sequence[str]) -> Inherited:
    """Copy the teacher's tensors into the student wherever name and shape agree.

    Inheritance alone raises AP, so a comparison shows it as a separate row.

    Args:
        student: the model that is changed in place.
        teacher: a model of the same kind, with its weights loaded.
        exclude: prefixes of the tensors that stay the student's: those of its backbone without the neck.

    Returns:
        The names of the copied and of the skipped tensors.
    """
    report = Inherited()
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        if name.startswith(tuple(exclude)):
            continue
        if name not in source:
            report.skipped[name] = "the teacher has no tensor of that name"
        elif source[name].shape != tensor.shape:
            report.skipped[name] = f"{tuple(tensor.shape)} here, {tuple(source[name].shape)} in the teacher"
        else:
            tensor.copy_(source[name])
            report.copied.append(name)
    return report
