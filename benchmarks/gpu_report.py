"""The tables of a record of ``benchmarks.gpu``, in the form of docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .report import described, table
from .timing import PARTS
from .variants import FLOOR, PLAIN

__all__ = ["tables"]

Row = Mapping[str, Any]
Rows = Mapping[str, Row]


def tables(record: Mapping[str, Any]) -> str:
    """Write all sections of a record; what failed or was left out is named below each."""
    lines = [f"{described(record)}. {record.get('seconds', 0):.0f} s in all."]
    for name, section in record["sections"].items():
        rows = {case: row for case, row in section["rows"].items() if "error" not in row}
        lines += [f"## {name}", f"{section['seconds']:.0f} s.", *TABLES[name](rows)]
        for case, row in section["rows"].items():
            if "error" in row:
                lines.append(f"FAILED {case}: {row['error'].strip().splitlines()[-1]}")
        if "error" in section:
            lines.append(f"FAILED {name}: {section['error'].strip().splitlines()[-1]}")
        if section["left_out"]:
            lines.append(f"Left out for want of time: {'; '.join(section['left_out'])}.")
    return "\n\n".join(line for line in lines if line) + "\n"


def _number(value: Any, form: str = ".1f") -> str:
    return "" if value is None else format(value, form)


def _paths(rows: Rows) -> list[str]:
    """Write the largest errors of every path and precision, over widths and kinds of masks."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows.values():
        groups.setdefault((row["path"], row["precision"]), []).append(row)
    cells = []
    for (path, precision), found in groups.items():
        worst = max(found, key=lambda row: row["gradient"] if row["gradient"] == row["gradient"] else float("inf"))
        used = sorted({kernel for row in found for kernel in row["kernels"] if "backward" not in kernel})
        masks, gradient = max(row["masks"] for row in found), worst["gradient"]
        fine = "yes" if all(row["within"] for row in found) else "NO"
        shown = ", ".join(name.removeprefix("_scaled_dot_product_") for name in used)
        cells.append([path, precision, f"{masks:.1e}", f"{gradient:.1e}", worst["worst"], fine, shown])
    heads = ["path", "precision", "masks, absolute", "gradients, relative", "of", "within", "kernels"]
    return [table(heads, cells), *_faults(rows)]


def _faults(rows: Rows) -> list[str]:
    return [f"BEYOND THE LIMIT {case}: {row['worst']} {row['gradient']:.2e}, missing {row['missing']}"
            for case, row in rows.items() if not row["within"]]  # fmt: skip


def _kernels(rows: Rows) -> list[str]:
    """Write the milliseconds of one image, forward and backward."""
    timed = {case: row for case, row in rows.items() if "forward" in row}
    cells = [
        [case, _number(row["forward"], ".2f"), _number(row["backward"], ".2f"), _number(row["peak_gib"], ".2f")]
        for case, row in timed.items()
    ]
    firsts = [
        f"{case}, ms: first {_several(row['first'])}; second {_several(row['second'])}."
        for case, row in rows.items()
        if "first" in row
    ]
    return [table(["positions, kernel, type, widths", "forward, ms", "backward, ms", "peak, GiB"], cells), *firsts]


def _several(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


def _steps(rows: Rows) -> list[str]:
    """Write the costs of each pair and precision, with ratios to its floor."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows.values():
        groups.setdefault((row["pair"], row["precision"]), {})[row["variant"]] = row
    found = []
    for (pair, precision), variants in groups.items():
        plain, floor = variants.get(PLAIN), variants.get(FLOOR)
        cells = [
            [
                name, _number(row["ms"]), _over(row, plain, "ms"), _over(row, floor, "ms"),
                *(_number(row["parts"][part]) for part in PARTS),
                _number(row["peak_gib"], ".2f"), _over(row, floor, "peak_gib"),
            ]
            for name, row in variants.items()
        ]  # fmt: skip
        heads = ["step", "ms", "/ plain", "/ floor", *PARTS, "peak, GiB", "/ floor"]
        found += [f"{pair}, {precision}", table(heads, cells)]
    return found


def _over(row: Row, other: Row | None, key: str) -> str:
    return f"{row[key] / other[key]:.2f}" if other and other[key] and row[key] else ""


def _methods(rows: Rows) -> list[str]:
    """Write what two steps of each method showed."""
    cells = [
        [case, "yes" if row["within"] else "NO", ", ".join(f"{loss:.4g}" for loss in row["losses"]),
         ", ".join([*row["missing"], *row["not_finite"]][:5])]
        for case, row in rows.items()
    ]  # fmt: skip
    return [table(["method", "finite, none missing", "losses", "missing or not finite"], cells)]


def _engines(rows: Rows) -> list[str]:
    """Write the ratio of the engine's step to the bare loop's."""
    cells = [
        [case, _number(row["bare"]), _number(row["engine"]), _number(row["ratio"], ".3f")] for case, row in rows.items()
    ]
    return [table(["step", "bare loop, ms", "engine, ms", "ratio"], cells)]


TABLES: dict[str, Callable[[Rows], list[str]]] = {
    "paths": _paths,
    "kernels": _kernels,
    "steps": _steps,
    "methods": _methods,
    "engines": _engines,
}
