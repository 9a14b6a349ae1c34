"""``acam-kd check``: the check of a dataset alone, as a run makes it before anything is built."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from .core.errors import ConfigError, RunError
from .data.check import Needs, check_coco, check_labels
from .data.coco import CocoSplit
from .data.labels import find_pairs
from .data.splits import LabelSplit, Split, find_any_split, named_split
from .files import to_json, write_atomically

__all__ = ["add_check_options", "run_check"]

logger = logging.getLogger("acam_kd")

SPLITS = ("train", "val")


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that only this command has."""
    parser.add_argument("folder", nargs="?", metavar="DATA", help="the same as --data")
    parser.add_argument("--masks", action="store_true", help="every annotation has to have a segmentation")
    parser.add_argument(
        "--engine", choices=("torchvision", "detectron2"), default="torchvision", help="who reads the images"
    )
    parser.add_argument(
        "--fix", type=Path, metavar="OUT.json", help="write the mended json; of two splits OUT_train.json, OUT_val.json"
    )


def run_check(args: argparse.Namespace) -> None:
    """Check the splits that are there, and print a line for each.

    Raises:
        ConfigError: no split is there, or one of them cannot be used. All are checked first.
        RunError: the mended json cannot be written.
    """
    splits = _splits(args)
    errors: list[ConfigError] = []
    mended: dict[str, Any] = {}
    for split, files in splits.items():
        try:
            if isinstance(files, CocoSplit):
                mended[split] = _check_coco(split, files, args)
            else:
                _check_labels(split, files, args)
        except ConfigError as error:
            errors.append(error)
    if errors:
        more = f"{errors[0].hint}; the other split has troubles too: see above" if len(errors) > 1 else errors[0].hint
        if len(errors) > 1:
            logger.error(str(errors[1]))
        raise ConfigError(errors[0].argument, errors[0].value, errors[0].allowed, more.removeprefix("; "))
    if args.fix and not mended:
        raise ConfigError("fix", args.fix, "a dataset in COCO format", "label images are not written")
    for split, content in mended.items() if args.fix else ():
        _write(args.fix if len(mended) == 1 else args.fix.with_stem(f"{args.fix.stem}_{split}"), content)


def _splits(args: argparse.Namespace) -> dict[str, Split]:
    """Find the splits: those that are named by their files, else those of the folder, of which one may be missing."""
    folder = args.data or args.folder
    found: dict[str, Split] = {}
    missing: list[ConfigError] = []
    for split in SPLITS:
        files = getattr(args, split)
        if files:
            found[split] = named_split(files[0], files[1], args.classes, args.image_range)
        elif folder:
            try:
                found[split] = find_any_split(folder, split, args.classes, args.image_range)
            except ConfigError as error:
                if error.argument != "data":
                    raise
                missing.append(error)
    if not found:
        raise missing[0] if missing else ConfigError("data", "nothing", "the folder of a dataset", "or --train, --val")
    for absent in missing:
        logger.warning(f"{absent.value}: not checked")
    return found


def _check_coco(split: str, files: CocoSplit, args: argparse.Namespace) -> dict[str, Any]:
    checked = check_coco(
        files.json_file,
        files.image_root,
        name=split,
        needs=Needs(masks=args.masks or None),
        image_range=files.image_range,
        reader=args.engine,
    )
    content = checked.content
    numbers = ", ".join(f"{len(content[part])} {part}" for part in ("images", "annotations", "categories"))
    state = "mended, see above; a run does the same" if checked.mended else "nothing to mend"
    print(f"{split}: {numbers}: {state}")
    return content


def _check_labels(split: str, files: LabelSplit, args: argparse.Namespace) -> None:
    pairs = find_pairs(files.image_root, files.label_root, name=split)
    counts = check_labels(pairs, files.classes, name=split, image_range=files.image_range, reader=args.engine)
    total = sum(counts)
    parts = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in zip(files.classes, counts))
    print(f"{split}: {len(pairs)} images with labels: {parts}")


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        write_atomically(path, to_json(content))
    except OSError as error:
        raise RunError(
            f"cannot be written ({error.strerror})", os.path.abspath(path), "choose another {fix}"
        ) from error
    print(f"the mended json: {path}")
