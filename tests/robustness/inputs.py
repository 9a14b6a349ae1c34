"""The kinds of files that are damaged: a good one of each, and what reads it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from acam_kd import cli
from acam_kd.core.weights import load_file
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


# Weights, checkpoints, tokens.


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def weights_kind(name: str, encode: Callable[[Any], bytes]) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        file = folder / name
        file.write_bytes(encode(network().state_dict()))

        def prepare(_: Path) -> Callable[[Path], None]:
            model = network()

            def read(_: Path) -> None:
                before = {key: value.clone() for key, value in model.state_dict().items()}
                try:
                    load_file(model, str(file), argument="teacher_weights")
                except BaseException:
                    after = model.state_dict()
                    assert all(after[key].equal(value) for key, value in before.items()), "half of it was loaded"
                    raise
                assert all(value.isfinite().all() for value in model.state_dict().values())

            return read

        return Target(folder, file, prepare, dict(network().state_dict()), encode)

    return make


def as_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_old_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def as_safetensors(content: Any) -> bytes:
    known = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return safetensors.torch.save(known)


TARGETS["weights .pth"] = weights_kind("w.pth", as_torch)
TARGETS["weights of old torch"] = weights_kind("w.pth", as_old_torch)
TARGETS["weights .safetensors"] = weights_kind("w.safetensors", as_safetensors)


@target("checkpoint")
def checkpoint(folder: Path) -> Target:
    from lightning.fabric.plugins.precision import Precision

    from acam_kd.core.average import Average
    from acam_kd.tv.checkpoint import Parts, read_checkpoint, restore_random

    def parts() -> Parts:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model[2](torch.rand(1, 4)).sum().backward()
        optimizer.step()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return Parts(model, None, optimizer, schedule, Precision(), Average(model, 0.0))

    file = folder / "last.ckpt"
    state = parts().state(step=3, seconds=1.0)
    torch.save(state, file)

    def prepare(_: Path) -> Callable[[Path], None]:
        def read(_: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                state = read_checkpoint(file)
                parts().load(state, file)
                restore_random(state)

        return read

    return Target(folder, file, prepare, state, as_torch)


@target("tokens")
def tokens(folder: Path) -> Target:
    from acam_kd.core.features import FeatureSpec
    from acam_kd.methods.parts.token_files import build_tokens, check_teacher, load_tokens, save_tokens

    pyramid = {"p3": FeatureSpec(8, 8, False)}
    file = folder / "tokens.pth"
    save_tokens(str(file), "MasKD", build_tokens("MasKD", pyramid), pyramid, teacher="x")

    def prepare(_: Path) -> Callable[[Path], None]:
        def read(_: Path) -> None:
            check_teacher(str(file), "MasKD", "x")
            load_tokens(str(file), "MasKD", build_tokens("MasKD", pyramid), pyramid)

        return read

    return Target(folder, file, prepare, torch.load(file, weights_only=True), as_torch)


if importlib.util.find_spec("detectron2") is not None:
    from . import detectron2_inputs  # noqa: F401 - it adds its own
