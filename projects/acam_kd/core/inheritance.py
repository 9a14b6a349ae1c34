"""Inheritance: a student's neck and head start from the teacher's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

__all__ = ["Inherited", "inherit"]


@dataclass
class Inherited:
    """What ``inherit`` did: names of tensors copied, and name -> reason for those it skipped."""

    copied: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"inherited {len(self.copied)} tensors of the teacher's neck and head, skipped {len(self.skipped)}"]
        return "\n".join(lines + [f"  {name}: {reason}" for name, reason in self.skipped.items()])


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, *, exclude: Sequence[str]) -> Inherited:
    """Copy the teacher's tensors into the student wherever name and shape agree.

    It is worth AP of its own, so a comparison shows it as a row of its own.

    Args:
        student: changed in place.
        teacher: of the same kind, its weights loaded.
        exclude: prefixes of the tensors that stay the student's: those of its backbone proper.
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
