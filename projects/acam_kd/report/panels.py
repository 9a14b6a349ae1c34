"""Pictures of masks and detections, as RGB arrays.

Letters: M masks, C channels, H x W pixels, h x w positions of one level, K boxes. All pictures are uint8 RGB,
(H, W, 3). The heat scale is the same everywhere, 0 to 1, so panels of different levels and moments can be compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

__all__ = ["Array", "channel_panel", "draw_detections", "heat", "mask_panel", "stack"]

Array = np.ndarray[Any, Any]
Colour = tuple[int, int, int]
Place = tuple[int, int, int, int]
"""x, y, width and height, in pixels."""

TILE = 150
"""The longest side of one picture of a mask panel, in pixels."""
STRIP_WIDTH, STRIP_HEIGHT = 768, 14
"""The size of one channel mask, in pixels. Its real width is the largest multiple of C up to that, but at least C."""
OPACITY = 0.6
"""The opacity of the heat over the grey image."""
MARGIN, GAP, LINE = 10, 6, 18
INK, PAPER = (40, 40, 40), (255, 255, 255)
FONT, SIZE = cv2.FONT_HERSHEY_SIMPLEX, 0.42


def heat(values: Array) -> Array:
    """Colour values on the fixed scale from 0, dark blue, to 1, yellow: (...) float -> (..., 3)."""
    index = (values.clip(0, 1) * 255).round().astype(np.uint8)
    table = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_VIRIDIS)
    return table.reshape(256, 3)[:, ::-1][index]


def mask_panel(image: Array, masks: Mapping[str, Array], strides: Mapping[str, float]) -> Array:
    """Draw spatial masks over the image they were made for: a row per label, the image and then its M masks.

    Masks cover the batch, which is padded at the right and at the bottom. Positions beyond the image are neither shown
    nor counted. Under each mask stand its mean and its smallest and largest value, because the eye misses small
    differences.

    Args:
        image: (H, W, 3).
        masks: label -> (M, h, w) in [0, 1]; labels are levels, or moments of one level, or both.
        strides: label -> pixels of ``image`` per position.

    Raises:
        ValueError: the image or a mask has another shape.
    """
    _check(image, masks, 3)
    small = _fit(image)
    rows = [_scale()]
    for label, mask in masks.items():
        shown = [_over_image(m, strides[label], image.shape[:2], small.shape[:2]) for m in mask]
        visible = np.stack([values for values, _ in shown]) if shown else np.zeros(1)
        grey = cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[..., None]
        tiles = [_captioned(small, "image")]
        for values, full in shown:
            overlay = (1 - OPACITY) * grey + OPACITY * heat(full)
            tiles.append(_captioned(overlay.round().astype(np.uint8), _range(values)))
        rows += [_text(f"{label}: mean {visible.mean():.3f}"), _beside(tiles)]
    return _framed(rows)


def channel_panel(masks: Mapping[str, Array]) -> Array:
    """Draw channel masks as strips, one cell per channel: a group per label, a strip per mask.

    Args:
        masks: label -> (M, C) in [0, 1].

    Raises:
        ValueError: a mask has another shape.
    """
    _check(np.zeros((1, 1, 3), np.uint8), masks, 2)
    rows = [_scale()]
    for label, mask in masks.items():
        rows.append(_text(f"{label}: mean {mask.mean():.3f}"))
        for values in mask:
            cell = max(1, STRIP_WIDTH // len(values))
            strip = np.repeat(heat(values)[None], STRIP_HEIGHT, 0).repeat(cell, 1)
            rows.append(_beside([strip, _text(_range(values), STRIP_HEIGHT)]))
    return _framed(rows, gap=3)


def draw_detections(
    image: Array, boxes: Array, labels: Sequence[str], scores: Array | None, colours: Sequence[Colour]
) -> Array:
    """Draw boxes with their labels on a copy of the image, the first box on top.

    A label stands above its box, else below it. It is left out where both places are taken by labels of earlier boxes.

    Args:
        image: (H, W, 3).
        boxes: (K, 4), x0, y0, x1, y1 in pixels.
        labels: K names; an empty one gets no text.
        scores: (K,), printed behind the label; None for ground truth.
        colours: K RGB colours.
    """
    out = np.array(image, order="C")
    corners = np.asarray(boxes, dtype=float).reshape(-1, 4).round().astype(int).tolist()
    for k in reversed(range(len(corners))):
        x0, y0, x1, y1 = corners[k]
        cv2.rectangle(out, (x0, y0), (x1, y1), colours[k], 2)
    taken: list[Place] = []
    for k, (x0, y0, _, y1) in enumerate(corners):
        text = labels[k] if scores is None else f"{labels[k]} {scores[k]:.2f}".lstrip()
        place = _free_place(text, x0, (y0, y1), out.shape, taken) if text else None
        if place is not None:
            taken.append(place)
            _tag(out, text, place, colours[k])
    return out


def _free_place(
    text: str, x: int, edges: tuple[int, int], shape: Sequence[int], taken: Sequence[Place]
) -> Place | None:
    """Return the place of a label within the image: above the upper edge of its box, else below the lower one."""
    width, height = _extent(text)[0] + 4, LINE - 3
    x = max(0, min(x - 1, shape[1] - width))
    above = edges[0] - height if edges[0] >= height else edges[0]
    for y in (above, edges[1]):
        y = max(0, min(y, shape[0] - height))
        if not any(x < u + w and u < x + width and y < v + h and v < y + height for u, v, w, h in taken):
            return x, y, width, height
    return None


def _tag(out: Array, text: str, place: Place, colour: Colour) -> None:
    """Draw a text on a patch of the colour."""
    x, y, width, height = place
    cv2.rectangle(out, (x, y), (x + width, y + height), colour, -1)
    dark = sum(c * w for c, w in zip(colour, (0.299, 0.587, 0.114))) < 140
    cv2.putText(out, text, (x + 2, y + height - 4), FONT, SIZE, PAPER if dark else INK, 1, cv2.LINE_AA)


def _check(image: Array, masks: Mapping[str, Array], dims: int) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(f"an image must be uint8 RGB (H, W, 3), not {image.dtype} {image.shape}")
    for label, mask in masks.items():
        if mask.ndim != dims:
            raise ValueError(f"masks of {label} must be {('(M, C)', '(M, h, w)')[dims - 2]}, not {mask.shape}")


def _fit(image: Array) -> Array:
    height, width = image.shape[:2]
    factor = TILE / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)


def _over_image(mask: Array, stride: float, image: Sequence[int], tile: Sequence[int]) -> tuple[Array, Array]:
    """Return the positions whose corner lies in the image, and for each pixel of a tile the value of the nearest."""
    index = []
    for size, pixels, positions in zip(image, tile, mask.shape):
        centres = (np.arange(pixels) + 0.5) * size / pixels
        index.append((centres / stride).astype(int).clip(max=positions - 1))
    rows, columns = (int(np.ceil(size / stride)) for size in image)
    return mask[:rows, :columns], mask[index[0][:, None], index[1]]


def _range(values: Array) -> str:
    return f"{values.mean():.3f}  ({values.min():.3f}-{values.max():.3f})"


def _extent(text: str) -> tuple[int, int]:
    (width, height), _ = cv2.getTextSize(text, FONT, SIZE, 1)
    return width, height


def _text(text: str, height: int = LINE) -> Array:
    width, tall = _extent(text)
    out = np.full((height, width + 4, 3), PAPER, np.uint8)
    cv2.putText(out, text, (1, (height + tall) // 2), FONT, SIZE, INK, 1, cv2.LINE_AA)
    return out


def _scale() -> Array:
    """Draw the scale of the colours."""
    strip = np.repeat(heat(np.linspace(0, 1, 128))[None], LINE - 6, 0)
    padded = np.pad(strip, ((3, 3), (0, 0), (0, 0)), constant_values=255)
    return _beside([_text("mask value 0"), padded, _text("1")])


def _captioned(tile: Array, caption: str) -> Array:
    return stack([tile, _text(caption)], 0)


def _beside(pictures: Sequence[Array], gap: int = GAP) -> Array:
    height = max(p.shape[0] for p in pictures)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, gap), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded, 1)[:, :-gap]


def stack(pictures: Sequence[Array], gap: int = GAP) -> Array:
    """Put pictures below each other on white."""
    width = max(p.shape[1] for p in pictures)
    padded = [np.pad(p, ((0, gap), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(padded, 0)


def _framed(rows: Sequence[Array], gap: int = GAP) -> Array:
    return np.pad(stack(rows, gap), ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255)
