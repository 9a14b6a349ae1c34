"""Time and memory of a large dataset: the check, and the start and the resuming of a run of four steps.

    python benchmarks/load.py --images 100000 --annotations 1000000 --folder /tmp/large

Annotations are drawn, and images are links to a few real ones. The first check looks at every file; the later ones find
their facts in the cache. Each row is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from acam_kd.data.coco import CocoSplit
from acam_kd.files import to_json
from acam_kd.tv.data import CocoImages
from acam_kd.tv.run import Settings
from acam_kd.tv.training import train

SIZE = 64
REAL = 8


def draw(folder: Path, images: int, annotations: int) -> CocoSplit:
    """Write a dataset of so many entries."""
    draws, numbers = random.Random(0), np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    for number in range(REAL):
        pixels = numbers.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"real{number}.png")
    entries = []
    for number in range(images):
        os.link(folder / f"real{number % REAL}.png", folder / "images" / f"{number}.png")
        entries.append({"id": number, "file_name": f"{number}.png", "width": SIZE, "height": SIZE})
    boxes = []
    for number in range(annotations):
        x, y, width, height = (draws.randint(1, SIZE // 2 - 1) for _ in range(4))
        common = {"id": number, "image_id": number % images, "category_id": 1 + number % 80, "iscrowd": 0}
        boxes.append({**common, "bbox": [x, y, width, height], "area": width * height})
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    content = {"images": entries, "annotations": boxes, "categories": categories}
    (folder / "train.json").write_text(to_json(content))
    return CocoSplit(str(folder / "train.json"), str(folder / "images"))


def check(split: CocoSplit) -> None:
    """Check a split, and read its last image."""
    data = CocoImages(split, name="large")
    data[len(data) - 1]


def run(split: CocoSplit, small: CocoSplit, output: Path) -> None:
    """Train until the first evaluation, or resume after it."""
    settings = Settings(
        split, small, "fcos_mobilenet_v3_small_fpn64", size=SIZE, iterations=4, batch_size=2, eval_period=2,
        workers=0, accelerator="cpu",
    )  # fmt: skip
    resume = output.is_dir()

    def stop(_: object, step: int) -> None:
        if step == 2 and not resume:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(settings, output, resume=resume, observers=[stop])


def measure(name: str, function: Callable[[], None]) -> None:
    """Call a function in a process of its own, and print seconds and the largest memory."""
    began, child = time.perf_counter(), os.fork()
    if not child:
        status = 1
        try:
            function()
            status = 0
        finally:
            os._exit(status)
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{name}: failed; see above")
    wall, cpu = time.perf_counter() - began, used.ru_utime + used.ru_stime
    print(f"{name}: {wall:.0f} s, {cpu:.0f} s of CPU, {used.ru_maxrss / 2**20:.2f} GiB at most", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw, check twice, start and resume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--annotations", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and must not exist")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    split, small = draw(args.folder, args.images, args.annotations), draw(args.folder / "small", REAL, REAL)
    os.environ["ACAM_KD_CACHE"] = str(args.folder / "cache")
    measure("first check", lambda: check(split))
    measure("second check", lambda: check(split))
    measure("start", lambda: run(split, small, args.folder / "run"))
    measure("resume", lambda: run(split, small, args.folder / "run"))


if __name__ == "__main__":
    main()
