"""A drawn dataset in COCO format, which a test breaks in one way."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from acam_kd.data.check import Needs, check_coco

WIDTH, HEIGHT = 160, 120


@dataclass
class Drawn:
    """Four images with a box and an outline each, in memory and on the disk."""

    root: Path
    content: dict = field(default_factory=dict)

    @property
    def annotation(self):
        return self.content["annotations"][0]

    def image(self, number: int) -> Path:
        return self.root / "images" / f"{number}.png"

    def each(self, part, **makers):
        """Change every item of a part: key -> a function of the item."""
        for item in self.content[part]:
            item.update({key: make(item) for key, make in makers.items()})

    def save(self, data: bytes | None = None) -> str:
        path = self.root / "d.json"
        path.write_bytes(json.dumps(self.content).encode() if data is None else data)
        return str(path)

    def check(self, data: bytes | None = None, **options):
        """Check it; return what was mended and the content. The lines that were said are in ``said``."""
        self.said: list[str] = []
        needs = Needs(masks=options.pop("masks", True), areas=options.pop("areas", True), ids=options.pop("ids", True))
        checked = check_coco(
            self.save(data), str(self.root / "images"), name="mine", needs=needs, say=self.said.append, **options
        )
        return checked.mended, checked.content


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    folder.mkdir()
    images, annotations = [], []
    for number in range(1, 5):
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        pixels[30:80, 40:100] = (200, 60, 60)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        outline = [[40, 30, 100, 30, 100, 80, 40, 80]]
        annotation = {"id": number, "image_id": number, "category_id": 1, "bbox": [40, 30, 60, 50], "area": 3000}
        annotations.append({**annotation, "iscrowd": 0, "segmentation": outline})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    return Drawn(tmp_path, copy.deepcopy(content))
