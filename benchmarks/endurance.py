"""Memory and open files over a long run of tiny steps, in either engine.

    python -m benchmarks.endurance --run torchvision --folder FOLDER
    python -m benchmarks.endurance --run classes --folder FOLDER
    python -m benchmarks.endurance --run detectron2 --folder FOLDER

A student learns from a teacher on small drawn images, two a step, with checkpoints and evaluations now and then: a
detector in either engine, or a classifier in torchvision's, whose steps cost a tenth.
The first tenth of the run is compared with the last one.
"""

from __future__ import annotations

import argparse
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from acam_kd.data.coco import find_split
from acam_kd.data.shapes import make_shapes

SAMPLES = 100
EVALUATIONS = 4
CHECKPOINTS = 20
SIZE = 64
CONFIG = Path(__file__).parents[1] / "configs" / "quick_schedules" / "acam_instant.yaml"


@dataclass(frozen=True)
class Sample:
    """The process after some steps: its resident memory in MiB, and its open files."""

    step: int
    memory: float
    files: int

    @classmethod
    def now(cls, step: int) -> Sample:
        """Look at this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(step, pages * resource.getpagesize() / 2**20, len(os.listdir("/proc/self/fd")))


def watched(run: Callable[[], object], iterations: int) -> list[Sample]:
    """Run a training of so many optimizer steps, and return samples at equal intervals."""
    samples, step, interval = list[Sample](), 0, max(1, iterations // SAMPLES)

    def after_step(*_: object) -> None:
        nonlocal step
        step += 1
        if step % interval == 0:
            samples.append(Sample.now(step))
            print(samples[-1], flush=True)

    handle = register_optimizer_step_post_hook(after_step)
    try:
        run()
    except (KeyboardInterrupt, SystemExit) as error:  # the samples so far are worth their time
        print(error)
    finally:
        handle.remove()
    return samples


def summary(samples: list[Sample]) -> str:
    """Compare the first tenth of the samples with the last one."""
    tenth = max(1, len(samples) // 10)
    (first, files), (last, files_last) = (
        (mean(sample.memory for sample in part), max(sample.files for sample in part))
        for part in (samples[:tenth], samples[-tenth:])
    )
    halfway = mean(sample.memory for sample in samples[len(samples) // 2 :][:tenth])
    return (
        f"{samples[-1].step} steps: {first:.1f} MiB in the first tenth, {halfway:.1f} halfway, {last:.1f} in the last "
        f"tenth ({last - first:+.1f}); open files {files} and {files_last}"
    )


def torchvision_run(data: Path, folder: Path, iterations: int) -> list[Sample]:
    """Train a detector of torchvision from one of its kind."""
    from acam_kd.tv.run import Settings
    from acam_kd.tv.training import train

    splits = (find_split(data, "train"), find_split(data, "val"))
    teacher = Settings(
        *splits, "fcos_mobilenet_v3_small_fpn64", size=SIZE, iterations=1, batch_size=2, workers=0, accelerator="cpu"
    )
    train(teacher, folder / "teacher")
    settings = replace(
        teacher, teacher=str(folder / "teacher"), method="PKD", inherit="never", iterations=iterations,
        eval_period=max(1, iterations // EVALUATIONS), checkpoint_period=max(1, iterations // CHECKPOINTS),
        no_teacher_check=True, learning_rate=1e-4,
    )  # fmt: skip
    return watched(lambda: train(settings, folder / "run"), iterations)


def classes_run(data: Path, folder: Path, iterations: int) -> list[Sample]:
    """Train a classifier from one of its kind, on parts of the images."""
    from acam_kd.cli import train_settings
    from acam_kd.tv.training import train

    classes = folder / "classes"
    for number, path in enumerate(sorted((data / "train").iterdir())[:24]):
        place = classes / ("val" if number % 3 else "train") / f"class {number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.crop((0, 0, 16, 16)).save(place / f"{number}.png")
    words = ["--data", str(classes), "--student", "resnet8", "--size", "16", "--batch-size", "2", "--workers", "0"]
    words += ["--accelerator", "cpu", "--output", str(folder)]
    train(train_settings([*words, "--iterations", "1"]), folder / "teacher")
    words += ["--teacher", str(folder / "teacher"), "--iterations", str(iterations), "--no-teacher-check"]
    settings = replace(
        train_settings(words), inherit="never", eval_period=max(1, iterations // EVALUATIONS),
        checkpoint_period=max(1, iterations // CHECKPOINTS),
    )  # fmt: skip
    return watched(lambda: train(settings, folder / "run"), iterations)


def detectron2_run(data: Path, folder: Path, iterations: int) -> list[Sample]:
    """Train the detector of the quick schedules, as ``train_net.py`` does."""
    from acam_kd.d2.train import run

    splits = {f"endurance_{name}": find_split(data, name) for name in ("train", "val")}
    words = ["--config-file", str(CONFIG)]
    for name, split in splits.items():
        words += ["--dataset", name, split.json_file, split.image_root]
    options = {
        "DATASETS.TRAIN": "('endurance_train',)", "DATASETS.TEST": "('endurance_val',)", "DISTILL.METHOD": "PKD",
        "INPUT.MIN_SIZE_TRAIN": f"({SIZE},)", "INPUT.MIN_SIZE_TEST": SIZE, "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": iterations, "SOLVER.BASE_LR": 1e-4, "MODEL.DEVICE": "cpu", "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": max(1, iterations // CHECKPOINTS),
        "TEST.EVAL_PERIOD": max(1, iterations // EVALUATIONS), "OUTPUT_DIR": folder / "run",
    }  # fmt: skip
    return watched(lambda: run([*words, *(str(word) for pair in options.items() for word in pair)]), iterations)


RUNS = {"torchvision": torchvision_run, "classes": classes_run, "detectron2": detectron2_run}


def main(arguments: list[str] | None = None) -> None:
    """Run, and print the samples and their summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=tuple(RUNS), required=True)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, required=True, help="gets data and runs")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = make_shapes(args.folder, size=SIZE)
    print(f"{args.run}: {summary(RUNS[args.run](data, args.folder, args.iterations))}")


if __name__ == "__main__":
    main()
