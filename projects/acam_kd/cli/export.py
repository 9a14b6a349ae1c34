"""``acam-kd export``: a student as one file for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..fields import instance, option, positive
from .command import Command, Values
from .runs import detectron2, is_detectron2

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Export:
    """The options of an export."""

    run: str = option(flag="RUN", metavar="RUN", help="a run's folder, of either engine")
    format: str = option(choices=("onnx", "torchscript", "torch-export"), help="of the file; see docs/export.md")
    output: Path = option(type=Path, metavar="FILE", help="the file")
    checkpoint: str = option("last", choices=("last", "best"), help="which weights of the run")
    size: int | None = option(None, type=positive, metavar="PIXELS", help="shorter side; else the run's")
    images: tuple[str, ...] = option(
        (), metavar="PATH", help="to check the file with: image files or folders; else validation images of the run"
    )


def run(values: Values) -> None:
    """Export, check, and print the agreement.

    Raises:
        ConfigError: the run or an image cannot be used, or a package is missing.
        RunError: the file does not agree with torch, or cannot be written. Nothing is written then.
    """
    asked = instance(Export, values)
    if is_detectron2(asked.run):
        module = detectron2("export")
    else:
        from ..tv import run_export as module
    found = module.export_run(
        asked.run, asked.output, kind=asked.format, checkpoint=asked.checkpoint, size=asked.size, images=asked.images
    )
    for each in found:
        print(each)
    if not any(each.agreement.compared for each in found):
        print("nothing was found in the images of the check, which therefore says little: give --images with objects")
    print(f"the exported student: {asked.output} ({asked.output.stat().st_size / 2**20:.1f} MiB)")


COMMAND = Command(
    "export",
    "export a student as ONNX, TorchScript or torch.export's program, checked against torch",
    run,
    (Export,),
    "acam-kd export output/run --format onnx --output student.onnx",
)
