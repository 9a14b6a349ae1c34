"""The export of a student to one file, which is written only if it agrees with the model in torch."""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from ..core.errors import ConfigError, RunError, first_line
from ..files import write_atomically
from .agreement import Agreement, compare
from .exported import ENTRY, FORMATS, Metadata, load_exported, needed, unbatched

__all__ = ["CHECKED", "Comparison", "Deployable", "check_file", "export_model"]

OPSET = 18
"""The opset of ONNX for models that need no newer one."""
SIZE = 320
"""The shorter side of the example of a model without a size of its own."""
SHAPES = ((1.0, 4 / 3), (1.25, 1.0), (0.75, 0.8))
"""Height and width of the images that a file is checked with, in parts of the model's size, beside their own."""
AT_LEAST = 64
CHECKED = 2
"""The number of images that a file is checked with at each size."""


class Deployable(Protocol):
    """A module that takes (1, 3, H, W), RGB in [0, 1], and returns tensors."""

    outputs: tuple[str, ...]
    """Their names."""
    opset: int
    """The version of ONNX's operators."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """Predict one image: a tensor in, a tuple of tensors out."""

    def exporting(self) -> AbstractContextManager[Any]:
        """Return a context for torch.export."""


@dataclass(frozen=True)
class Comparison:
    """The agreement at one size.

    Args:
        height, width: of the images.
        agreement: of the two models.
    """

    height: int
    width: int
    agreement: Agreement

    def __str__(self) -> str:
        return f"{self.agreement} at {self.height} x {self.width}"


def export_model(
    model: Deployable, metadata: Metadata, images: Sequence[Tensor], path: str | Path, *, kind: str
) -> list[Comparison]:
    """Export a model, run the file on images of several sizes, and write it if both agree.

    Args:
        model: to export.
        metadata: goes into the file.
        images: (3, H, W) each, RGB in [0, 1]; at least one, and better such that something is found in them.
        path: the file.
        kind: one of ``FORMATS``.

    Raises:
        ConfigError: an unknown format, or a package is missing.
        RunError: the model cannot be exported so, or the file does not agree, or cannot be written. Nothing is written.
    """
    if kind not in FORMATS:
        raise ConfigError("format", kind, f"one of {', '.join(FORMATS)}")
    path = Path(path)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "model"
        _make(model, metadata, made, kind, _example(images[0], metadata.shorter or SIZE))
        found = check_file(model, made, images)
        for each in found:
            if not each.agreement:
                raise RunError(f"the {kind} file disagrees with torch: {each}", str(path), "choose another {format}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, made.read_bytes())
        except OSError as error:
            raise RunError(f"it cannot be written ({error.strerror})", str(path), "choose another {output}") from error
    return found


def check_file(model: Deployable, path: str | Path, images: Sequence[Tensor]) -> list[Comparison]:
    """Run an exported file beside the model in torch, on images of three sizes and of their own."""
    exported = load_exported(path)
    size = exported.metadata.shorter or SIZE
    exported.metadata = replace(exported.metadata, resize=None)  # the images have the sizes that are to be checked
    shapes = [(round(h * size), round(w * size)) for h, w in SHAPES]
    found = []
    for image in itertools.islice(images, CHECKED):
        for height, width in (*shapes, image.shape[1:]):
            pixels = image if image.shape[1:] == (height, width) else _fitted(image, height, width)
            with torch.no_grad():
                reference = unbatched(dict(zip(model.outputs, model(pixels[None]))))
            (other,) = _run(exported, pixels, path)
            found.append(Comparison(pixels.shape[1], pixels.shape[2], compare(reference, other)))
    return found


def _run(exported: Any, pixels: Tensor, path: str | Path) -> Any:
    try:
        return exported([pixels])
    except Exception as error:  # the runtimes' errors have no common type
        shape = f"{pixels.shape[1]} x {pixels.shape[2]}"
        raise RunError(
            f"the exported model fails at {shape} ({first_line(error)[:160]})",
            exported.metadata.name,
            "choose another {format}",
        ) from error


def _example(image: Tensor, size: int) -> Tensor:
    height, width = (round(side * size) for side in SHAPES[0])
    return _fitted(image, height, width)[None]


def _fitted(image: Tensor, height: int, width: int) -> Tensor:
    shape = (max(AT_LEAST, height), max(AT_LEAST, width))
    return F.interpolate(image[None], shape, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def _make(model: Deployable, metadata: Metadata, path: Path, kind: str, example: Tensor) -> None:
    makers = {"onnx": _make_onnx, "torchscript": _make_script, "torch-export": _make_program}
    if kind == "onnx":
        for package in ("onnx", "onnxruntime"):
            needed(package, "the export")
    with warnings.catch_warnings(), torch.no_grad(), _silent():
        warnings.simplefilter("ignore")  # the tracers' about constants, which the check at several sizes is for
        try:
            makers[kind](model, metadata, path, example)
        except ConfigError:
            raise
        except Exception as error:  # the exporters' errors have no common type
            raise RunError(
                f"it cannot be exported as {kind} ({first_line(error)[:160]})",
                metadata.name,
                "choose another {format}; see docs/export.md",
            ) from error


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep back the logs of the exporters, which are those of a debugger."""
    before = logging.root.manager.disable  # for all, since some of their loggers have levels of their own
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _mute():
            yield  # else whole graphs are printed
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Send what C++ prints to standard output nowhere."""
    before = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(before, 1)
        os.close(before)


def _make_onnx(model: Any, metadata: Metadata, path: Path, example: Tensor) -> None:
    onnx = needed("onnx", "the export")
    axes = {"images": {2: "height", 3: "width"} | ({0: "batch"} if metadata.batched else {})}
    names: Any = {"input_names": ["images"], "output_names": list(model.outputs)}
    part = path.with_suffix(".part")
    if metadata.batched and metadata.size:  # the other exporter has no resizing with antialiasing
        needed("onnxscript", "the export of a classifier, or of a segmentation model with a size")
        dynamic, example = torch.export.Dim.DYNAMIC, torch.cat([example, example])
        shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
        torch.onnx.export(
            model, (example,), part, dynamo=True, dynamic_shapes=shapes, external_data=False, verbose=False, **names
        )
    else:
        axes |= _output_axes(model.outputs)
        torch.onnx.export(model, (example,), part, dynamo=False, opset_version=model.opset, dynamic_axes=axes, **names)
    made = onnx.load(str(part))
    entry = made.metadata_props.add()
    entry.key, entry.value = ENTRY, metadata.to_json()
    onnx.save(made, str(path))


def _output_axes(outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    if "semantic" in outputs:
        return {"semantic": {0: "batch", 1: "height", 2: "width"}}
    return {name: {0: "detections"} | ({2: "height", 3: "width"} if name == "masks" else {}) for name in outputs}


def _make_script(model: Any, metadata: Metadata, path: Path, example: Tensor) -> None:
    script = torch.jit.trace(model, (example,), check_trace=False)  # type: ignore[no-untyped-call]
    torch.jit.save(script, str(path), _extra_files={ENTRY: metadata.to_json()})


def _make_program(model: Any, metadata: Metadata, path: Path, example: Tensor) -> None:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto if metadata.batched else torch.export.Dim.STATIC, 2: auto, 3: auto},)
    if metadata.batched:
        example = torch.cat([example, example])  # a batch of one would be taken for a constant
    with model.exporting():
        program = torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    torch.export.save(program, str(path.with_suffix(".pt2")), extra_files={ENTRY: metadata.to_json()})
    path.with_suffix(".pt2").rename(path)
