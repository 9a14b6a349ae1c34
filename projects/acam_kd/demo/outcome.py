"""The table, the report and the picture of a demo, from the folders of its runs."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..data.coco import find_split
from ..files import numbers, write_atomically
from ..report.report import write_report
from ..report.results import Detections, Example, Row, Snapshot
from ..report.side_by_side import side_by_side
from .plans import PLANS, TEACHER, Plan

__all__ = ["Outcome", "keep_masks", "watched_images"]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
EXAMPLES = 3
SCORE = 0.3
"""Detections below this score are not drawn."""
PICTURE = ((TEACHER, "teacher"), (PLANS[0], "student alone"), (PLANS[-1], "distilled student"))
"""The columns of ``picture.jpg``, with their headings."""
Results = dict[str, list[dict[str, Any]]]
"""Row -> the results of its seeds."""


def watched_images(data: Path) -> list[str]:
    """Choose the file names of the examples: the first images whose objects have the most of three sizes."""
    content = _content(data)
    sizes: dict[int, set[int]] = {}
    for a in content["annotations"]:
        sizes.setdefault(a["image_id"], set()).add(int(a["area"] > 32**2) + int(a["area"] > 64**2))
    images = sorted(content["images"], key=lambda image: -len(sizes.get(image["id"], ())))
    return [image["file_name"] for image in images[:EXAMPLES]]


def keep_masks(
    folder: Path, step: int, number: int, masks: dict[str, dict[str, Any]], strides: dict[str, float]
) -> None:
    """Write one image's masks at one moment, for the report.

    Args:
        folder: the folder of the run.
        step: the moment.
        number: the place of the image among those watched.
        masks: level -> kind -> array.
        strides: level -> pixels of the image per position.
    """
    target = folder / "masks" / f"{step:07d}_{number}.npz"
    target.parent.mkdir(parents=True, exist_ok=True)
    arrays = {f"{level}/{kind}": np.asarray(mask) for level, kinds in masks.items() for kind, mask in kinds.items()}
    arrays |= {f"{level}/stride": np.array(stride) for level, stride in strides.items()}
    np.savez(target, **arrays)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """The finished runs of a demo.

    Args:
        output: the folder of the demo.
        engine: a key of ``ENGINES``.
        description: what its models are, for people.
        seeds: those of the students.
        data: the folder of the shapes.
    """

    output: Path
    engine: str
    description: str
    seeds: Sequence[int]
    data: Path

    def write(self) -> str:
        """Write ``table.md``, ``report.html`` and ``picture.jpg``; return the table."""
        results = {plan.key: [_result(folder) for folder in self.folders(plan)] for plan in (TEACHER, *PLANS)}
        table = self._table(results)
        write_atomically(self.output / "table.md", table + "\n")
        shown = {plan.key: self.folders(plan)[0] for plan in (TEACHER, *PLANS)}
        examples = _examples(self.data, {plan.name: shown[plan.key] for plan in (TEACHER, *PLANS)})
        self._report(results, shown, examples)
        self._picture(results, examples)
        return table

    def folders(self, plan: Plan) -> list[Path]:
        """Return the folders of a row, one per seed; the teacher has one."""
        if plan is TEACHER:
            return [self.output / plan.key]
        return [self.output / f"seed{seed}" / plan.key for seed in self.seeds]

    def _table(self, results: Results) -> str:
        """Write the Markdown table. Several seeds give the mean, and the standard deviation of AP."""
        several = len(self.seeds) > 1
        heads = [*METRICS, *(["AP per seed"] if several else []), "parameters", "time"]
        lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
        for plan in (TEACHER, *PLANS):
            runs = results[plan.key]
            cells = [f"{statistics.mean(r['metrics'][m] for r in runs):.2f}" for m in METRICS]
            if several:
                values = [r["metrics"]["AP"] for r in runs]
                if len(runs) > 1:
                    cells[0] += f" ({statistics.stdev(values):.2f})"
                cells.append(", ".join(f"{value:.2f}" for value in values))
            cells += [f"{runs[0]['parameters'] / 1e6:.2f} M", f"{statistics.mean(r['seconds'] for r in runs):.0f} s"]
            lines.append(f"| {plan.name} | {' | '.join(cells)} |")
        return "\n".join(lines)

    def _report(self, results: Results, shown: dict[str, Path], examples: list[Example]) -> None:
        """Write ``report.html``; its curves and pictures are those of the folders ``shown``, of the first seed."""
        rows = []
        for plan in (TEACHER, *PLANS):
            runs = results[plan.key]
            per_seed = ", ".join(f"{r['metrics']['AP']:.2f}" for r in runs)
            rows.append(
                Row(
                    name=plan.name,
                    note=plan.note + (f"; AP per seed: {per_seed}" if len(runs) > 1 else ""),
                    metrics={m: statistics.mean(r["metrics"][m] for r in runs) for m in METRICS},
                    seconds=statistics.mean(r["seconds"] for r in runs),
                    parameters=runs[0]["parameters"],
                    history=_lines(shown[plan.key] / "metrics.jsonl"),
                    role=plan.role,
                )
            )
        result = results["acam"][0]
        several = len(self.seeds) > 1
        write_report(
            self.output / "report.html",
            title="ACAM-KD: a small detector learns from a large one",
            intro=f"{self.description} All students have the same data and iterations and, for a seed, the same random "
            "start, before they inherit. "
            f"{'Means over the seeds; curves and pictures are of the first' if several else 'One seed'}.",
            caveat="This is a demonstration on drawn shapes, from scratch and short. Differences of less than about "
            f"{'one' if several else 'two'} AP are within what another seed would change; docs/demo.md says what "
            "was measured.",
            about={
                "engine": self.engine,
                "command": f"acam-kd demo --engine {self.engine} --seeds {' '.join(map(str, self.seeds))}",
                "seeds": ", ".join(map(str, self.seeds)),
                "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
                "date": result["date"],
                "machine": f"{result['device']}, {platform.machine()}",
            },
            rows=rows,
            examples=examples,
            snapshots=_snapshots(shown["acam"]),
        )

    def _picture(self, results: Results, examples: list[Example]) -> None:
        """Write ``picture.jpg``: the watched images, and what the rows of ``PICTURE`` find in them."""
        heads = {plan.name: f"{head}: AP {results[plan.key][0]['metrics']['AP']:.1f}" for plan, head in PICTURE}
        picture = side_by_side(examples, heads)
        cv2.imwrite(str(self.output / "picture.jpg"), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])


def _result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {**result, "metrics": numbers(result["metrics"])}


def _lines(path: Path) -> list[dict[str, float]]:
    return [numbers(json.loads(line)) for line in path.read_text().splitlines()]


def _content(data: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(find_split(data, "val").json_file).read_text())
    return content


def _examples(data: Path, folders: dict[str, Path]) -> list[Example]:
    content = _content(data)
    names = {category["id"]: category["name"] for category in content["categories"]}
    predictions = {name: json.loads((folder / "predictions.json").read_text()) for name, folder in folders.items()}
    images = {image["file_name"]: image for image in content["images"]}
    examples = []
    for image in (images[name] for name in watched_images(data)):

        def of(annotations: list[dict[str, Any]], image: dict[str, Any] = image) -> Detections:
            kept = [a for a in annotations if a["image_id"] == image["id"] and a.get("score", 1) >= SCORE]
            boxes = np.array([a["bbox"] for a in kept], float).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            scores = np.array([a["score"] for a in kept]) if "score" in (annotations or [{}])[0] else None
            return Detections(boxes, [names[a["category_id"]] for a in kept], scores)

        pixels = cv2.imread(str(Path(find_split(data, "val").image_root) / image["file_name"]), cv2.IMREAD_COLOR_RGB)
        found = {name: of(results) for name, results in predictions.items()}
        examples.append(Example(image["file_name"], pixels, of(content["annotations"]), found))  # type: ignore[arg-type]
    return examples


def _snapshots(folder: Path) -> list[Snapshot]:
    snapshots = []
    for path in sorted((folder / "masks").glob("*.npz")):
        step, number = map(int, path.stem.split("_"))
        masks: dict[str, dict[str, Any]] = {}
        strides: dict[str, float] = {}
        with np.load(path) as arrays:
            for key, array in arrays.items():
                level, kind = key.split("/")
                if kind == "stride":
                    strides[level] = float(array)
                else:
                    masks.setdefault(level, {})[kind] = array
        snapshots.append(Snapshot(step, number, masks, strides))
    return snapshots
