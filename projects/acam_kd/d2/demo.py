"""The demo's runs with Detectron2: ``train_net.py``, each run in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model

from ..core import ConfigError, RunError
from ..core.interrupts import Interrupted, Signals
from ..data.coco import find_split
from ..demo import Plan, keep_masks
from ..files import to_json, write_atomically
from .config import add_distillation_config, student_config
from .visualize import load_for_masks, load_moment, masks_of, read_rgb, strides_of

__all__ = ["AT_ONCE", "DESCRIPTION", "USES_GPU", "run"]

logger = logging.getLogger("acam_kd")

AT_ONCE = 2
USES_GPU = False
"""The configs say ``MODEL.DEVICE cpu``."""

CHECKOUT = Path(__file__).resolve().parents[3]
ALPHA = 2.0
DESCRIPTION = (
    "The teacher is Detectron2's RetinaNet on a ResNet-18, 220 iterations; the student RetinaNet on half a "
    "MobileNetV2, 200 iterations; both from scratch, 8 images of 160 x 160 pixels a step (configs/demo)."
)
NAMES = {"iteration": "step", "total_loss": "loss"}
"""Detectron2's name -> the report's."""


def run(plan: Plan, folder: Path, *, data: Path, teacher: Path, seed: int, watched: Sequence[str]) -> None:
    """Run one training; see ``demo.Engine``.

    Raises:
        ConfigError: the package is installed without the repository, whose ``configs`` are needed.
        RunError: Detectron2 failed.
    """
    if not (CHECKOUT / "configs/demo").is_dir():
        raise ConfigError(
            "engine", "detectron2", "torchvision", f"there is no checkout with configs/demo in {CHECKOUT}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    config = "teacher.yaml" if plan.role == "teacher" else "acam.yaml"
    command = [
        sys.executable,
        "-m",
        "acam_kd.d2.train",
        "--config-file",
        str(CHECKOUT / "configs/demo" / config),
        "--resume",
    ]
    command += ["SEED", str(seed), "OUTPUT_DIR", str(folder)]
    if plan.quick:
        command += ["SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "10", "TEST.EVAL_PERIOD", "10"]
    if plan.role != "teacher":
        command += ["DISTILL.TEACHER.WEIGHTS", str(teacher / "model_final.pth"), "DISTILL.METHOD", plan.method]
        command += ["DISTILL.INHERIT", "always" if plan.inherit else "never"]
        if plan.method:
            command += [f"DISTILL.{plan.method.upper()}.ALPHA", str(ALPHA * plan.weight)]
    settings = {"command": command[1:], "config": _digest(command)}
    if _is_complete(folder, settings):
        return
    # Beside another run its lines would be mixed with that one's.
    console = folder / "console.txt" if multiprocessing.parent_process() else None
    if console:
        logger.info("what Detectron2 says goes to %s", console)
    if _status(command, {"DETECTRON2_DATASETS": str(data.parent.absolute())}, console):
        said = f"is in {console}" if console else "is above"
        raise RunError(f"{plan.name} failed; what Detectron2 says {said}", str(folder / "log.txt"))
    cfg = _config(folder / "config.yaml")
    history = _history(folder, cfg.SOLVER.MAX_ITER)
    write_atomically(folder / "metrics.jsonl", "\n".join(to_json(line) for line in history))
    detections = (folder / "inference/coco_instances_results.json").read_text()
    write_atomically(folder / "predictions.json", detections)
    if plan.method and watched:
        _keep_masks(folder, cfg, [Path(find_split(data, "val").image_root) / name for name in watched])
    write_atomically(folder / "result.json", to_json({**_result(cfg, history), **settings}, indent=1))


def _status(command: Sequence[str], environment: dict[str, str], console: Path | None = None) -> int:
    """Run a command with this process's number of threads, and return its exit status.

    Args:
        command: the program and its arguments.
        environment: what is to be added to this process's.
        console: a file, which gets its output; the console itself if left out.

    Raises:
        Interrupted: at a signal, after the command has saved what it has.
    """
    environment = {**os.environ, **environment, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(console, "a")) if console else None
        stack.enter_context(Signals())
        process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
        try:
            return process.wait()
        except KeyboardInterrupt as error:
            process.terminate()
            with contextlib.suppress(KeyboardInterrupt):  # a second one: the context waits on
                process.wait()
            raise Interrupted.of(error, "what the run had saved is kept") from None


def _digest(command: Sequence[str]) -> str:
    """Return a hash of the settings that a command asks for, those of its config files included."""
    options = [*command[command.index("--resume") + 1 :]]
    cfg = _config(Path(command[command.index("--config-file") + 1]), options)
    return hashlib.sha256(cfg.dump().encode()).hexdigest()


def _is_complete(folder: Path, settings: dict[str, Any]) -> bool:
    path = folder / "result.json"
    if not path.is_file():
        return False
    before = json.loads(path.read_text())
    if any(before.get(name) != value for name, value in settings.items()):
        raise ConfigError(
            "output", f"{folder} with a run of other settings, {' '.join(before['command'])}", "another folder"
        )
    return True


def _config(path: Path, options: Sequence[str] = ()) -> CfgNode:
    cfg = get_cfg()
    add_distillation_config(cfg)
    cfg.merge_from_file(str(path))
    cfg.merge_from_list([*options])
    return cfg


def _history(folder: Path, end: int) -> list[dict[str, float]]:
    """Return Detectron2's metrics.json with the report's names: its iteration 19 is the end of step 20."""
    history = []
    for text in (folder / "metrics.json").read_text().splitlines():
        line = {NAMES.get(k, k.removeprefix("bbox/")): v for k, v in json.loads(text).items()}
        history.append({**line, "step": min(line["step"] + 1, end)})
    return history


def _keep_masks(folder: Path, cfg: CfgNode, images: Sequence[Path]) -> None:
    """Keep the masks at every checkpoint of the run."""
    checkpoints = sorted(folder.glob("model_0*.pth"))
    model = load_for_masks(cfg, str(checkpoints[0]))
    if not model.distillation.method.makes_masks:  # type: ignore[union-attr]
        return
    for checkpoint in checkpoints:
        load_moment(model, str(checkpoint))
        step = int(checkpoint.stem.removeprefix("model_")) + 1
        for number, path in enumerate(images):
            image = read_rgb(str(path))
            keep_masks(folder, step, number, masks_of(model, cfg, image), strides_of(model, cfg, image))


def _result(cfg: CfgNode, history: Sequence[dict[str, float]]) -> dict[str, Any]:
    last: dict[str, float] = {}
    for line in history:
        last.update(line)
    device = cfg.MODEL.DEVICE
    return {
        "metrics": {name: last[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
        "seconds": last["time"] * cfg.SOLVER.MAX_ITER,  # the median step of the last 20; evaluations not included
        "parameters": sum(p.numel() for p in build_model(student_config(cfg)).parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, detectron2)},
        "device": "CPU" if device == "cpu" else torch.cuda.get_device_name(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
