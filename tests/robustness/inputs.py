"""The kinds of files that are damaged: a good one of each, and what reads it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from acam_kd import cli
from acam_kd.data import labels
from acam_kd.data.images import look, read_rgb
from acam_kd.data.splits import find_any_split
from acam_kd.files import to_json
from acam_kd.tv.labels import load_data

from .edits import as_json


@dataclass(frozen=True)
class Target:
    """A folder with good files, one of which is damaged.

    Args:
        folder: holds all the input.
        file: the one that is damaged.
        prepare: gets a folder for output, and returns the function that reads the input.
        content: what the file holds, if its values are changed too.
        encode: makes a file of such a content.
    """

    folder: Path
    file: Path
    prepare: Callable[[Path], Callable[[Path], Any]]
    content: Any = None
    encode: Callable[[Any], bytes] = as_json


TARGETS: dict[str, Callable[[Path], Target]] = {}
SIZE = (48, 32)


def target(name: str) -> Callable[[Callable[[Path], Target]], Callable[[Path], Target]]:
    """Register the maker of a target."""

    def register(make: Callable[[Path], Target]) -> Callable[[Path], Target]:
        TARGETS[name] = make
        return make

    return register


def picture(path: Path, mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    shape = SIZE[::-1] if mode in ("L", "I;16") else (*SIZE[::-1], 3)
    kind, top = (np.uint16, 60000) if mode == "I;16" else (np.uint8, 255)
    Image.fromarray(draw.integers(0, top, shape).astype(kind)).save(path, **options)
    return path


def command(*arguments: str) -> None:
    """Run a command of acam-kd; its errors are not yet lines."""
    args = cli._parser().parse_args([str(argument) for argument in arguments])
    args.command.run(args.command.values(args))


# Datasets: the check, and then everything that the check has accepted is read.


def dataset(out: Path) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        fixed = out / "fixed.json"
        fixed.unlink(missing_ok=True)
        command("check", folder)
        split = find_any_split(str(folder), "train", "", "auto")
        data = load_data(split, model="fcos_resnet18_fpn", name="train")
        for index in range(len(data)):
            image, aim = data[index]
            assert image.shape[0] == 3 and aim["boxes"].isfinite().all()

    return read


@target("COCO json")
def coco(folder: Path) -> Target:
    width, height = SIZE
    images = [{"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i in (1, 2)]
    [picture(folder / "train" / image["file_name"]) for image in images]
    outline = [[4.0, 4.0, 30.0, 4.0, 30.0, 20.0, 4.0, 20.0]]
    common = {"category_id": 1, "bbox": [4.0, 4.0, 26.0, 16.0], "area": 416.0, "iscrowd": 0}
    annotations = [{"id": i, "image_id": i, **common, "segmentation": outline} for i in (1, 2)]
    runs = {"counts": [5, 10, width * height - 15], "size": [height, width]}
    annotations.append({"id": 3, "image_id": 1, **common, "segmentation": runs, "iscrowd": 1})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "train.json").write_text(to_json(content))
    return Target(folder, folder / "train.json", dataset, content)


def yolo_files(folder: Path) -> None:
    for name in ("a", "b"):
        picture(folder / "images/train" / f"{name}.jpg")
        (folder / "labels/train").mkdir(parents=True, exist_ok=True)
        (folder / "labels/train" / f"{name}.txt").write_text("0 0.5 0.5 0.25 0.25\n1 0.1 0.1 0.9 0.1 0.9 0.9\n")
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnc: 2\nnames:\n  0: one\n  1: 'two'\n")


@target("YOLO yaml")
def yolo_yaml(folder: Path) -> Target:
    yolo_files(folder)
    return Target(folder, folder / "data.yaml", dataset)


@target("YOLO labels")
def yolo_labels(folder: Path) -> Target:
    yolo_files(folder)
    return Target(folder, folder / "labels/train/a.txt", dataset)


@target("VOC xml")
def voc(folder: Path) -> Target:
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>30</xmax><ymax>20</ymax></bndbox>"
    for name in ("a", "b"):
        picture(folder / "train" / f"{name}.jpg")
        size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
        entry = f"<object><name>thing</name><difficult>0</difficult>{box}</object>"
        (folder / "train" / f"{name}.xml").write_text(f"<annotation>{size}{entry}</annotation>\n")
    return Target(folder, folder / "train/a.xml", dataset)


# Images and label maps.


def image_kind(suffix: str, mode: str = "RGB", **options: Any) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        file = picture(folder / f"a{suffix}", mode, **options)

        def prepare(_: Path) -> Callable[[Path], None]:
            def read(_: Path) -> None:
                seen = look(str(file))
                pixels = read_rgb(str(file))
                assert pixels.dtype == np.uint8 and pixels.shape[2] == 3
                if not seen.problem:
                    assert (seen.height, seen.width) == pixels.shape[:2]

            return read

        return Target(folder, file, prepare)

    return make


for _suffix, _mode in ((".png", "RGB"), (".jpg", "RGB"), (".tif", "RGB"), (".webp", "RGB"), (".bmp", "L")):
    TARGETS[f"image {_suffix}"] = image_kind(_suffix, _mode)
TARGETS["image of 16 bits"] = image_kind(".png", "I;16")


@target("label map")
def label(folder: Path) -> Target:
    picture(folder / "train/images/a.png")
    file = folder / "train/labels/a.png"
    file.parent.mkdir()
    Image.fromarray(np.arange(SIZE[0] * SIZE[1], dtype=np.uint8).reshape(SIZE[::-1]) % 3).save(file)

    def prepare(_: Path) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            command("check", folder, "--classes", "a,b,c")
            assert labels.read_label(str(file)).max() < 3

        return read

    return Target(folder, file, prepare)


# Settings.


@target("options")
def options(folder: Path) -> Target:
    coco(folder)
    text = (
        "data: DATA\nstudent: fcos_resnet18_fpn\nteacher: null\nsize: 64\niterations: 3\nset: [alpha=1]\nworkers: 0\n"
    )
    (folder / "options.yaml").write_text(text.replace("DATA", str(folder)))

    def prepare(out: Path) -> Callable[[Path], None]:
        def read(folder: Path) -> None:
            args = cli._parser().parse_args(["train", "--config", str(folder / "options.yaml"), "--output", str(out)])
            args.command.values(args)

        return read

    return Target(folder, folder / "options.yaml", prepare)


@target("plan")
def plan(folder: Path) -> Target:
    from acam_kd.compare.reading import read_plan

    rows = "rows: {student alone: [], PKD: [--method, PKD]}, metrics: [AP], threshold: 0.5"
    (folder / "plan.yaml").write_text(f"seeds: [0, 1]\nsettings:\n  toy: {{engine: torchvision, run: [-x], {rows}}}\n")
    return Target(folder, folder / "plan.yaml", lambda _: lambda folder: read_plan(folder / "plan.yaml"))


@target("card of a student")
def card(folder: Path) -> Target:
    from acam_kd.tv.card import Card, read_card

    made = Card("fcos_resnet18_fpn", 3, 64, {1: "a", 2: "b"}, (0.1, 0.2, 0.3), (0.1, 0.2, 0.3))
    content = json.loads(to_json(vars(made)))
    (folder / "student.json").write_text(to_json(content))
    (folder / "student.pth").touch()
    return Target(folder, folder / "student.json", lambda _: read_card, content)


from . import tensor_inputs  # noqa: E402, F401 - it adds its own

if importlib.util.find_spec("detectron2") is not None:
    from . import detectron2_inputs  # noqa: F401 - it adds its own
