"""The table of tuning runs, by which a row's arguments are chosen.

Their records have the entry ``tuning``, with the number of the candidate and its arguments. They are no results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["table"]

Record = Mapping[str, Any]


def table(records: Sequence[Record], metrics: Sequence[str], chosen: Mapping[str, int]) -> list[str]:
    """Write the lines of the table of one setting's tuning runs; none if there are no runs.

    Args:
        records: those of tuning runs, of any rows.
        metrics: names of metrics.
        chosen: row -> the number of the candidate that its results have.
    """
    if not records:
        return []
    heads = ["tuned row", "candidate", *metrics, "chosen"]
    lines = [f"Tuning runs, with seed {records[0]['seed']}, on data of their own; they are no results.", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in dict.fromkeys(record["row"] for record in records):
        own = sorted((r for r in records if r["row"] == row), key=lambda r: r["tuning"]["candidate"])
        for record in own:
            number, arguments = record["tuning"]["candidate"], " ".join(record["tuning"]["arguments"])
            values = [f"{record['metrics'].get(name, math.nan):.2f}" for name in metrics]
            cells = [row, f"`{arguments}`" if arguments else "", *values, "yes" if number == chosen.get(row) else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return lines
