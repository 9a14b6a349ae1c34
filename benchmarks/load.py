"""Time and memory of checking a large dataset: drawn annotations, and links to a few real images.

    python benchmarks/load.py --images 100000 --annotations 1000000 --folder /tmp/large

The first check looks at every file; the second one finds its facts in the cache, as a start or a resumed run does.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import time
from pathlib import Path

import numpy as np
from PIL import Image

from acam_kd.data.coco import CocoSplit
from acam_kd.files import to_json
from acam_kd.tv.data import CocoImages

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


def main() -> None:
    """Draw, check twice, and print seconds and the largest memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--annotations", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="is made, and must not exist")
    args = parser.parse_args()
    split = draw(args.folder, args.images, args.annotations)
    os.environ["ACAM_KD_CACHE"] = str(args.folder / "cache")
    for name in ("first", "second"):
        wall, cpu = time.perf_counter(), time.process_time()
        data = CocoImages(split, name="large")
        data[len(data) - 1]
        spent = f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name} check: {len(data)} images, {len(data.coco.anns)} annotations: {spent}, {memory:.2f} GiB at most")
        del data


if __name__ == "__main__":
    main()
