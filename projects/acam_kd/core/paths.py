"""Levels by the paths of submodules: maps, tokens and vectors, read as maps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from .errors import ConfigError
from .features import Features
from .taps import ModuleTap

__all__ = ["Path", "Paths", "folded", "is_map", "keys_of", "pick", "split_key"]

MOST_LEADING = 32
"""The largest number of class and register tokens that is looked for."""


def split_key(path: str) -> tuple[str, str]:
    """Divide the path of an output into that of its submodule and a key or an index of what it returns.

    Example:
        >>> split_key("blocks.11[0]"), split_key("layer3")
        (('blocks.11', '0'), ('layer3', ''))
    """
    module, bracket, key = path.partition("[")
    return (module, key[:-1]) if bracket and key.endswith("]") else (path, "")


def keys_of(output: Any) -> list[str]:
    """List the keys of a mapping, or the indices of a sequence, as text; nothing for other outputs."""
    if isinstance(output, Mapping):
        return [str(key) for key in output]
    return [str(index) for index in range(len(output))] if isinstance(output, (tuple, list)) else []


def pick(output: Any, key: str) -> Any:
    """Return the part of an output under a key or an index; the output itself without one, None if there is no such."""
    if not key:
        return output
    parts = output.values() if isinstance(output, Mapping) else output
    return dict(zip(keys_of(output), parts)).get(key) if keys_of(output) else None


@dataclass(frozen=True)
class Path:
    """The output of a submodule as a map.

    Args:
        path: of the submodule.
        level: the level's name.
        axes: of the output: ``"NCHW"``, ``"NHWC"``, ``"NLC"`` and ``"LNC"`` for L tokens, or ``"NC"``.
        leading: class and register tokens before those of the positions.
        stride: in pixels of the batch.
        key: of the output, if it is a mapping or a sequence.
    """

    path: str
    level: str
    axes: str = "NCHW"
    leading: int = 0
    stride: int = 1
    key: str = ""

    def __call__(self, output: Any, batch: Tensor) -> Mapping[str, Tensor]:
        """Return the map under its name: (N, K) gets positions, tokens (N, L, C) are folded to (N, C, H, W).

        Raises:
            ConfigError: the output is no tensor, or its tokens are no patches of the batch.
        """
        output = pick(output, self.key)
        if not isinstance(output, Tensor):
            raise ConfigError(
                "levels", f"a {type(output).__name__} at {self.path}", "a tensor, as on the example",
                "name a part that gives the same in training and in evaluation",
            )  # fmt: skip
        if output.dim() == 2:
            output = output[..., None, None]
        elif self.axes == "NHWC":
            output = output.permute(0, 3, 1, 2)
        elif "L" in self.axes:
            output = self._folded(output.transpose(0, 1) if self.axes == "LNC" else output, batch)
        return {self.level: output}

    def _folded(self, tokens: Tensor, batch: Tensor) -> Tensor:
        height, width = (round(side / self.stride) for side in batch.shape[2:])
        tokens = tokens[:, self.leading :].transpose(1, 2)
        if tokens.shape[2] != height * width:
            raise ConfigError(
                "levels", f"{tokens.shape[2]} tokens at {self.path}, {self.leading} leading ones left out",
                f"{height} x {width} for {batch.shape[2]} x {batch.shape[3]} pixels",
                "sides must be multiples of the size of a patch",
            )  # fmt: skip
        return tokens.reshape(*tokens.shape[:2], height, width)


class Paths:
    """Runs a network once and returns the maps of its tapped submodules.

    A teacher's images are resized to the nearest multiples of its patches: a batch has the sides that the student
    needs. The map then covers the same images.

    Args:
        parts: the submodules.
        role: ``"student"`` or ``"teacher"``.
        entry: the path of the submodule that is given the batch; empty for the network itself.
    """

    def __init__(self, parts: Sequence[Path], role: str = "student", *, entry: str = "") -> None:
        self.parts, self.role, self.entry = list(parts), role, entry
        self.patch = math.lcm(*(part.stride for part in self.parts if "L" in part.axes))

    def __call__(self, network: nn.Module, batch: Tensor) -> Features:
        """Return the maps for a batch."""
        if self.role == "teacher":
            batch = _resized(batch, self.patch)
        features: dict[str, Tensor] = {}
        taps = [(ModuleTap(network.get_submodule(part.path), part.path, self.role), part) for part in self.parts]
        try:
            for tap, _ in taps:
                tap.arm()
            network.get_submodule(self.entry)(batch)
            for tap, part in taps:
                features.update(part(tap.read().output, batch))
        finally:
            for tap, _ in taps:
                tap.remove()
        return features


def _resized(batch: Tensor, patch: int) -> Tensor:
    size = [max(round(side / patch), 1) * patch for side in batch.shape[2:]]
    if size == list(batch.shape[2:]):
        return batch
    return F.interpolate(batch, size, mode="bilinear", antialias=True)


def is_map(output: Tensor, height: int, width: int) -> bool:
    """Say whether the positions of (N, C, H, W) have the image's proportions: those of (N, H, W, C) have not."""
    proportion = height / width
    return abs(output.shape[2] - output.shape[3] * proportion) <= 1 + proportion


def folded(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """Return leading tokens and the side of a patch for L tokens of an image, if L without them is H/p x W/p."""
    for leading in range(min(tokens, MOST_LEADING + 1)):
        patch = math.sqrt(height * width / (tokens - leading))
        if patch == round(patch) and height % round(patch) == 0 and width % round(patch) == 0:
            return leading, round(patch)
    return None
