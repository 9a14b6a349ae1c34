"""``acam-kd demo``: the whole story on drawn shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..fields import instance, natural, option
from .command import Command, Values

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class Demo:
    """The options of the demo."""

    engine: str = option("torchvision", choices=("torchvision", "detectron2"), help="who trains")
    seeds: tuple[int, ...] = option(
        (), type=natural, metavar="N", help="of the students; the teacher keeps its own; 0 if left out"
    )
    quick: bool = option(False, help="a few iterations, to see that everything is installed")
    output: Path | None = option(
        None,
        type=Path,
        metavar="FOLDER",
        help="a demo found there is resumed; default: output/demo, with _detectron2 or _quick added",
    )


def run(values: Values) -> None:
    """Run the demo.

    Raises:
        ConfigError: the engine is not installed, or another demo is at work in the folder.
    """
    from ..demo import demo

    asked = instance(Demo, values)
    suffix = "" if asked.engine == "torchvision" else f"_{asked.engine}"
    suffix += "_quick" if asked.quick else ""
    output = asked.output or Path(f"output/demo{suffix}")
    demo(output, engine=asked.engine, seeds=asked.seeds or (0,), quick=asked.quick)


COMMAND = Command("demo", "show the whole story on drawn shapes, in ten minutes", run, (Demo,), "acam-kd demo")
