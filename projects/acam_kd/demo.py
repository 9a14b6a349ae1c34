"""The demo: a teacher, and one student trained in four ways, on shapes that are drawn on demand.

Both engines fill the same folder, table and report. Complete runs are not repeated, so a demo that was interrupted
resumes when it is started again.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import multiprocessing
import platform
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch

from .core.errors import ConfigError
from .core.interrupts import Interrupted, PassedOn
from .data.coco import find_split
from .data.shapes import make_shapes
from .files import numbers, write_atomically
from .lock import Lock
from .report.report import write_report
from .report.results import Detections, Example, Row, Snapshot
from .report.side_by_side import side_by_side

__all__ = ["ENGINES", "PLANS", "Engine", "Plan", "demo", "keep_masks"]

logger = logging.getLogger("acam_kd")

ENGINES = {"torchvision": ".tv.demo", "detectron2": ".d2.demo"}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
EXAMPLES = 3
SCORE = 0.3
"""Detections below this score are not drawn."""


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


PICTURE = ((TEACHER, "teacher"), (PLANS[0], "student alone"), (PLANS[-1], "distilled student"))
"""The columns of ``picture.jpg``, with their headings."""


class Engine(Protocol):
    """The interface of the modules ``tv.demo`` and ``d2.demo``."""

    DESCRIPTION: str
    AT_ONCE: int
    """The number of runs that a CPU makes at once, each in a process with its share of the threads."""

    def run(self, plan: Plan, folder: Path, *, data: Path, teacher: Path, seed: int, watched: Sequence[str]) -> None:
        """Train and evaluate, or resume; a complete run is left alone.

        ``folder`` gets these files, besides those that the engine itself needs:

        - ``result.json``: ``metrics``, ``seconds``, ``parameters``, ``versions``, ``device``, ``date``. It marks a
          complete run.
        - ``metrics.jsonl``: lines with ``step`` and losses or metrics.
        - ``predictions.json``: COCO's results format.
        - the files of ``keep_masks``, for the watched images at several moments.
        """


def demo(output: Path, *, engine: str = "torchvision", seeds: Sequence[int] = (0,), quick: bool = False) -> None:
    """Make the missing runs, print the table, write ``table.md``, ``picture.jpg`` and ``report.html``.

    Args:
        output: a folder, which gets the data, the teacher, and a folder per seed.
        engine, quick: a key of ``ENGINES``; see ``Plan``.
        seeds: the seeds of the students; data and teacher have seed 0.

    Raises:
        ConfigError: the engine is not installed, or another demo is at work in the folder.
    """
    runner = _engine(engine)
    with Lock(output):
        _demo(output, runner, engine, seeds, quick)


def _demo(output: Path, runner: Engine, engine: str, seeds: Sequence[int], quick: bool) -> None:
    started = time.perf_counter()
    data = make_shapes(output / "data")
    watched = _watched(data)
    folders = {(seed, plan.key): output / f"seed{seed}" / plan.key for seed in seeds for plan in PLANS}
    given = {"data": data, "teacher": output / "teacher", "watched": watched}
    plans = [(TEACHER, output / "teacher", 0), *((p, folders[seed, p.key], seed) for seed in seeds for p in PLANS)]
    teacher, *students = (
        _Run(engine, f"{number} of {len(plans)}", replace(plan, quick=quick), folder, {**given, "seed": seed})
        for number, (plan, folder, seed) in enumerate(plans, 1)
    )
    teacher.make()
    _make_all(students, 1 if torch.cuda.is_available() else min(runner.AT_ONCE, torch.get_num_threads()))
    results = {plan.key: [_result(folders[seed, plan.key]) for seed in seeds] for plan in PLANS}
    results["teacher"] = [_result(output / "teacher")]
    table = _table(results, seeds)
    write_atomically(output / "table.md", table + "\n")
    _report(output, results, seeds=seeds, data=data, watched=watched, engine=engine, description=runner.DESCRIPTION)
    _picture(output, results, output / f"seed{seeds[0]}", data)
    print(f"\n{table}\n\ntook {time.perf_counter() - started:.0f} s; the report: {output / 'report.html'}")


@dataclass(frozen=True)
class _Run:
    """A training of the demo.

    Args:
        engine: a key of ``ENGINES``.
        place: among all of them, for people.
        plan, folder, given: see ``Engine.run``.
    """

    engine: str
    place: str
    plan: Plan
    folder: Path
    given: dict[str, Any]

    def make(self) -> None:
        """Make it, or resume it."""
        logger.info("== %s: %s, seed %d (%s) ==", self.place, self.plan.name, self.given["seed"], self.folder)
        _engine(self.engine).run(self.plan, self.folder, **self.given)

    def make_beside_others(self, threads: int) -> None:
        """Make it in a process of its own, whose lines name it."""
        torch.set_num_threads(threads)
        logging.basicConfig(level=logging.INFO, format=f"{self.plan.name}: %(message)s", force=True)
        self.make()


def _make_all(runs: Sequence[_Run], at_once: int) -> None:
    """Make runs, some of them at once.

    Raises:
        Interrupted: at a signal, after the runs at work have saved what they have.
    """
    if at_once == 1:
        for run in runs:
            run.make()
        return
    threads, spawn = torch.get_num_threads() // at_once, multiprocessing.get_context("spawn")
    waiting, at_work = iter(runs), set[Future[None]]()
    with PassedOn() as signals, ProcessPoolExecutor(at_once, spawn) as pool:
        while not signals.received:  # none is handed in ahead: the pool would begin it after a signal or an error
            free = itertools.islice(waiting, at_once - len(at_work))
            at_work |= {pool.submit(run.make_beside_others, threads) for run in free}
            if not at_work:
                return
            done, at_work = wait(at_work, return_when=FIRST_COMPLETED)
            if not signals.received:
                for future in done:
                    future.result()
    raise Interrupted("each run kept its last checkpoint", signals.received)


def _engine(name: str) -> Engine:
    try:
        return importlib.import_module(ENGINES[name], __package__)  # type: ignore[return-value]
    except ImportError as error:
        raise ConfigError(
            "engine",
            f"{name}, which cannot be imported ({error})",
            allowed="an engine that is installed",
            hint="see Set-up in README.md, or choose another {engine}",
        ) from error


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


def _result(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return {**result, "metrics": numbers(result["metrics"])}


def _lines(path: Path) -> list[dict[str, float]]:
    return [numbers(json.loads(line)) for line in path.read_text().splitlines()]


def _content(data: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(find_split(data, "val").json_file).read_text())
    return content


def _watched(data: Path) -> list[str]:
    """Choose the file names of the examples: the first images whose objects have the most of three sizes."""
    content = _content(data)
    sizes: dict[int, set[int]] = {}
    for a in content["annotations"]:
        sizes.setdefault(a["image_id"], set()).add(int(a["area"] > 32**2) + int(a["area"] > 64**2))
    images = sorted(content["images"], key=lambda image: -len(sizes.get(image["id"], ())))
    return [image["file_name"] for image in images[:EXAMPLES]]


def _table(results: dict[str, list[dict[str, Any]]], seeds: Sequence[int]) -> str:
    """Write the Markdown table. Several seeds give the mean, and the standard deviation of AP."""
    several = len(seeds) > 1
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


def _report(
    output: Path,
    results: dict[str, list[dict[str, Any]]],
    *,
    seeds: Sequence[int],
    data: Path,
    watched: Sequence[str],
    engine: str,
    description: str,
) -> None:
    shown = {"teacher": output / "teacher", **{plan.key: output / f"seed{seeds[0]}" / plan.key for plan in PLANS}}
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
    several = len(seeds) > 1
    write_report(
        output / "report.html",
        title="ACAM-KD: a small detector learns from a large one",
        intro=f"{description} All students have the same data and iterations and, for a seed, the same random start, "
        "before they inherit. "
        f"{'Means over the seeds; curves and pictures are of the first' if several else 'One seed'}.",
        caveat="This is a demonstration on drawn shapes, from scratch and short. Differences of less than about "
        f"{'one' if several else 'two'} AP are within what another seed would change; docs/demo.md has several seeds.",
        about={
            "engine": engine,
            "command": f"acam-kd demo --engine {engine} --seeds {' '.join(map(str, seeds))}",
            "seeds": ", ".join(map(str, seeds)),
            "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
            "date": result["date"],
            "machine": f"{result['device']}, {platform.machine()}",
        },
        rows=rows,
        examples=_examples(data, watched, {plan.name: shown[plan.key] for plan in (TEACHER, *PLANS)}),
        snapshots=_snapshots(shown["acam"]),
    )


def _picture(output: Path, results: dict[str, list[dict[str, Any]]], students: Path, data: Path) -> None:
    """Write ``picture.jpg``: the watched images, and what the rows of ``PICTURE`` find in them."""
    heads = {plan.name: f"{head}: AP {results[plan.key][0]['metrics']['AP']:.1f}" for plan, head in PICTURE}
    folders = {plan.name: (output if plan is TEACHER else students) / plan.key for plan, _ in PICTURE}
    picture = side_by_side(_examples(data, _watched(data), folders), heads)
    cv2.imwrite(str(output / "picture.jpg"), picture[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 80])


def _examples(data: Path, watched: Sequence[str], folders: dict[str, Path]) -> list[Example]:
    content = _content(data)
    names = {category["id"]: category["name"] for category in content["categories"]}
    predictions = {name: json.loads((folder / "predictions.json").read_text()) for name, folder in folders.items()}
    images = {image["file_name"]: image for image in content["images"]}
    examples = []
    for image in (images[name] for name in watched):

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
