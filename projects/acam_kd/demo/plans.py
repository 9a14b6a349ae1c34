"""The rows of the demo: a teacher, and one student trained in four ways."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PLANS", "TEACHER", "Plan"]


@dataclass(frozen=True)
class Plan:
    """One row of the table: the training of one model.

    Args:
        key: the name of its folder.
        name, note, role: see ``report.results.Row``.
        method: the distiller; empty for none.
        weight: the distiller's alpha, in multiples of the engine's alpha.
        inherit: the student's neck and head start from the teacher's.
        quick: a few iterations, to see that everything is installed.
    """

    key: str
    name: str
    note: str
    role: str = "student"
    method: str = ""
    weight: float = 1.0
    inherit: bool = True
    quick: bool = False


TEACHER = Plan("teacher", "teacher", "the large model", role="teacher", inherit=False)
PLANS = (
    Plan("alone", "student alone", "the small model, without a teacher", role="alone", inherit=False),
    Plan("inheritance", "inheritance alone", "starts from the teacher's neck and head, nothing else"),
    # ACAM-KD has two masked errors, one for each kind of mask: with all masks 1 they are twice the plain error.
    Plan("mimicking", "plain mimicking", "and imitates the teacher's features, all alike", method="Mimic", weight=2.0),
    Plan("acam", "ACAM-KD", "and imitates them where the masks say", method="ACAMKD"),
)
