"""The choice among a row's candidates by tuning runs, and the table of these runs.

Their records have the entry ``tuning``, with the number of the candidate and its arguments. They are no results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["best", "table"]

Record = Mapping[str, Any]


def best(records: Sequence[Record], metric: str) -> int:
    """Return the number of the candidate with the highest metric; of equal ones the first.

    A value that is not finite ranks below every other.

    Args:
        records: those of all candidates of one row, in any order.
        metric: the name of the metric.
    """

    def rank(record: Record) -> tuple[float, int]:
        value = float(record["metrics"].get(metric, math.nan))
        return (value if math.isfinite(value) else -math.inf), -record["tuning"]["candidate"]

    number: int = max(records, key=rank)["tuning"]["candidate"]
    return number


def table(records: Sequence[Record], metrics: Sequence[str]) -> list[str]:
    """Write the lines of the table of one setting's tuning runs; none if there are no runs.

    Args:
        records: those of tuning runs, of any rows.
        metrics: names of metrics; the first one decides.
    """
    if not records:
        return []
    heads = ["tuned row", "candidate", *metrics, "chosen"]
    lines = [f"Tuning runs, with seed {records[0]['seed']}, on data of their own; they are no results.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in dict.fromkeys(record["row"] for record in records):
        own = sorted((r for r in records if r["row"] == row), key=lambda r: r["tuning"]["candidate"])
        chosen = best(own, metrics[0])
        for record in own:
            number, arguments = record["tuning"]["candidate"], " ".join(record["tuning"]["arguments"])
            values = [f"{record['metrics'].get(name, math.nan):.2f}" for name in metrics]
            cells = [row, f"`{arguments}`" if arguments else "", *values, "yes" if number == chosen else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
