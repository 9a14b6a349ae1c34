#!/usr/bin/env python
"""The shapes dataset, drawn: COCO-format detection and segmentation, for trials with any COCO tool.

python tools/make_shapes.py --output datasets
acam-kd train --data datasets/shapes_160_0 --student fcos_resnet18_fpn64 --size 160 --output output/run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from acam_kd.data.shapes import make_shapes


def main() -> None:
    """Draw the dataset, unless it is there, and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("datasets"), help="gets a folder shapes_SIZE_SEED")
    parser.add_argument("--size", type=int, default=160, help="height and width of the images, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.size < 64:
        parser.error(f"argument --size: found {args.size}, expected at least 64")
    print(make_shapes(args.output, size=args.size, seed=args.seed))


if __name__ == "__main__":
    main()
