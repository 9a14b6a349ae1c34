"""Exported models: their metadata, and how a file of each format is read and run."""

from __future__ import annotations

import importlib
import json
import subprocess
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import acam_kd

from ..core.errors import ConfigError, first_line

__all__ = [
    "CLASSIFICATION",
    "DETECTION",
    "FORMATS",
    "INSTANCES",
    "SEGMENTATION",
    "Exported",
    "Metadata",
    "load_exported",
    "needed",
    "package_commit",
    "unbatched",
]

VERSION = 1
DETECTION = ("boxes", "scores", "labels")
INSTANCES = (*DETECTION, "masks")
SEGMENTATION = ("semantic",)
CLASSIFICATION = ("probabilities",)
"""The names of a model's outputs."""
ENTRY = "acam_kd.json"
"""The name of the metadata in a file."""
EXTRA = "pip install 'acam-kd[export]'"
FORMATS = ("onnx", "torchscript", "torch-export")
Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Metadata:
    """The facts about an exported model, which lie inside its file as JSON.

    Args:
        name: the model's.
        outputs: names of the tensors that it returns.
        categories: label -> name.
        num_classes: the number of labels.
        size: the shorter side that images are resized to inside; None for the model's own.
        mean, std: the statistics of pixels, RGB in [0, 1], that are taken off inside.
        method: the method that it was distilled with; empty for none.
        teacher: its teacher; empty for none.
        weights: the file of the run's folder.
        commit: the commit of the package's checkout; empty if there is none.
        package: version of the package.
        torch: version of torch.
        version: of these entries.
        resize: the shorter side that images are to have, and the longest that a longer side may have, where the file
            does not resize by itself.
    """

    name: str
    outputs: tuple[str, ...]
    categories: dict[int, str]
    num_classes: int
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    method: str = ""
    teacher: str = ""
    weights: str = ""
    commit: str = field(default_factory=lambda: package_commit())
    package: str = acam_kd.__version__
    torch: str = torch.__version__
    version: int = VERSION
    resize: tuple[int, int] | None = None

    @property
    def semantic(self) -> bool:
        """True for label maps, False for detections."""
        return self.outputs == SEGMENTATION

    @property
    def batched(self) -> bool:
        """True where a file takes several images at once: not for detections."""
        return self.outputs in (SEGMENTATION, CLASSIFICATION)

    @property
    def shorter(self) -> int | None:
        """The shorter side that images are resized to, inside of the file or before; None for theirs."""
        return self.size or (self.resize[0] if self.resize else None)

    def to_json(self) -> str:
        """Write the metadata as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str, path: str) -> Metadata:
        """Read the metadata of a file.

        Raises:
            ConfigError: there is none, or it is of another version.
        """
        if not text:
            raise ConfigError("student", f"{path} without metadata", "a file that acam-kd export has written")
        content: dict[str, Any] = json.loads(text)
        if content.get("version") != VERSION:
            found = f"{path} of version {content.get('version')}"
            raise ConfigError("student", found, f"version {VERSION}", "export the run anew with this version")
        content["categories"] = {int(label): name for label, name in content["categories"].items()}
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        return cls(**values)


class Exported(nn.Module):
    """An exported model with the interface of torchvision's models in evaluation.

    Args:
        run: the file's model: (1, 3, H, W) -> tensors.
        metadata: of the file.
    """

    def __init__(self, run: Run, metadata: Metadata) -> None:
        super().__init__()
        self.run, self.metadata = run, metadata

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Predict images one by one; see torchvision's detectors and ``Segmentor``."""
        return [self._predict(image) for image in images]

    def _predict(self, image: Tensor) -> dict[str, Tensor]:
        pixels = image if self.metadata.resize is None else _resized(image, *self.metadata.resize)
        found = unbatched(dict(zip(self.metadata.outputs, self.run(pixels[None]))))
        if self.metadata.semantic:
            labels = found["semantic"]
            if labels.shape != image.shape[1:]:
                labels = F.interpolate(labels[None, None].float(), image.shape[1:])[0, 0].long()
            return {"semantic": labels}
        if self.metadata.batched:
            return found
        scale = [image.shape[axis] / pixels.shape[axis] for axis in (2, 1, 2, 1)]
        found["boxes"] = found["boxes"] * torch.tensor(scale)
        if "masks" in found and pixels.shape != image.shape:
            found["masks"] = F.interpolate(found["masks"], image.shape[1:], mode="bilinear", align_corners=False)
        return found


def unbatched(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs for one image in the interface of torchvision's models in evaluation."""
    if "probabilities" in outputs:
        return {"scores": outputs["probabilities"][0]}
    return {"semantic": outputs["semantic"][0]} if "semantic" in outputs else outputs


def as_pixels(image: np.ndarray[Any, Any]) -> Tensor:
    """Turn an image, uint8 (H, W, 3), into a tensor (3, H, W) in [0, 1], as exported models take it."""
    return torch.from_numpy(image).permute(2, 0, 1).float().div(255)


def as_image(pixels: Tensor) -> np.ndarray[Any, Any]:
    """Turn a tensor (3, H, W) in [0, 1] into an image, uint8 (H, W, 3)."""
    return (pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def _resized(image: Tensor, shorter: int, longest: int) -> Tensor:
    """Resize an image (3, H, W) in [0, 1] as Detectron2 does: by Pillow, on whole numbers."""
    height, width = image.shape[1:]
    scale = min(shorter / min(height, width), longest / max(height, width))
    size = (int(width * scale + 0.5), int(height * scale + 0.5))
    resized = np.array(Image.fromarray(as_image(image)).resize(size, Image.Resampling.BILINEAR))
    return as_pixels(resized)


def load_exported(path: str | Path, *, size: int | None = None) -> Exported:
    """Load a file that ``acam-kd export`` has written.

    Args:
        path: the file.
        size: the size that it is expected to have; None for any.

    Raises:
        ConfigError: it is another file, or of another version or size, or a package for its format is missing.
    """
    exported = _load(str(path))
    if size not in (None, exported.metadata.shorter):
        raise ConfigError("size", size, f"{exported.metadata.shorter}, which is in {path}", "leave {size} out")
    return exported


def _load(path: str) -> Exported:
    if not zipfile.is_zipfile(path):
        return _load_onnx(path)
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if not any(Path(name).name == ENTRY for name in names):
        hint = "export a run's folder first" if path.endswith((".pth", ".ckpt")) else ""
        raise ConfigError("student", f"{path} without metadata", "a file that acam-kd export has written", hint)
    extra: dict[str, Any] = {ENTRY: ""}
    if any("/code/" in name for name in names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's own about TorchScript, which docs/export.md says
            script = torch.jit.load(path, map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
        text = extra[ENTRY]
        return Exported(_tensors(script), Metadata.read(text.decode() if isinstance(text, bytes) else text, path))
    with open(path, "rb") as file:  # a path would have to end in .pt2
        program = torch.export.load(file, extra_files=extra)
    return Exported(_tensors(program.module()), Metadata.read(extra[ENTRY], path))


def _tensors(model: Callable[[Tensor], Any]) -> Run:
    def run(images: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            found = model(images)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return run


def _load_onnx(path: str) -> Exported:
    runtime = needed("onnxruntime", path)
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, too
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common type
        found = f"{path}, which cannot be read ({first_line(error)[:120]})"
        raise ConfigError("student", found, "a folder, a model's name, or an exported file") from error
    metadata = Metadata.read(session.get_modelmeta().custom_metadata_map.get(ENTRY, ""), path)

    def run(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(array) for array in session.run(None, {"images": images.cpu().numpy()})]

    return Exported(run, metadata)


def needed(package: str, purpose: str) -> Any:
    """Import a package of the extra ``export``.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        found = f"onnx, for which {package} cannot be imported ({error})"
        raise ConfigError("format", found, f"{package} for {purpose}", EXTRA) from error


def package_commit() -> str:
    """Return the commit of the checkout that the package is imported from; empty if it is none."""
    folder = Path(acam_kd.__file__).parent
    try:
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
