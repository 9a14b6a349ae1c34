"""scikit-learn's 1797 handwritten digits as folders of images, for configs/compare/digits.yaml.

python -m benchmarks.digits --output datasets/digits

The wheel of scikit-learn has them: 8 x 8 pixels of 17 grey values, the test part of UCI's "Optical Recognition of
Handwritten Digits" (Alpaydin & Kaynak, 1998). They have no split of their own. Here each class is divided by a fixed
seed into train (half of it), val (a sixth) and test (a third). Images keep their 8 x 8 pixels.
FOLDER has train/ and val/; FOLDER_test has the same train/, and the test images as its val/.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

SEED = 0
PARTS = (0.5, 2 / 3)
"""The parts of a class, in the order drawn, at which val and test begin."""


def divide(labels: np.ndarray) -> np.ndarray:
    """Return for each label the number of its part: 0 for train, 1 for val, 2 for test."""
    draw, parts = np.random.default_rng(SEED), np.zeros(len(labels), int)
    for label in np.unique(labels):
        mine = draw.permutation(np.flatnonzero(labels == label))
        parts[mine] = np.searchsorted(PARTS, np.arange(len(mine)) / len(mine), side="right")
    return parts


def write(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write images of values 0 to 16 as ``folder/LABEL/NUMBER.png``."""
    for number, (image, label) in enumerate(zip(images, labels)):
        pixels = np.round(image * 255 / 16).astype(np.uint8)
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / str(label) / f"{number}.png")


def main() -> None:
    """Write both folders."""
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("datasets/digits"), help="the folder")
    folder = parser.parse_args().output
    digits = load_digits()
    parts = divide(digits.target)
    for place, val in ((folder, 1), (folder.with_name(f"{folder.name}_test"), 2)):
        for name, part in (("train", 0), ("val", val)):
            write(digits.images[parts == part], digits.target[parts == part], place / name)
        print(f"{place}: {(parts == 0).sum()} and {(parts == val).sum()} images")


if __name__ == "__main__":
    main()
