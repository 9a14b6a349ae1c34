#!/usr/bin/env python
"""A look at what ACAM-KD's spatial masks go with, in finished runs of FCOS: "On chess pieces" in docs/masks.md.

    python -m benchmarks.mask_correlations output/chess_160/chess_at_160_fcos/acam_kd_raw_seed0

For each mask of each validation image, the correlation over positions with: the error between student and teacher, the
teacher's largest class probability, lying inside a labelled box, and the distance from the left and upper edge, which
mean nothing. Signs are dropped, since a mask and its complement weigh the same positions. Masks without contrast have
no correlation and are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from acam_kd.data.coco import CocoSplit
from acam_kd.methods import ACAMKD
from acam_kd.tv.build import build_models
from acam_kd.tv.card import resolved
from acam_kd.tv.checkpoint import PREFIX, read_checkpoint
from acam_kd.tv.data import Images
from acam_kd.tv.distillation import normalized_batch
from acam_kd.tv.labels import load_data
from acam_kd.tv.run import Settings

FLAT = 0.01
"""A mask whose standard deviation over positions is below has no contrast."""
SAME = 0.9
"""Two masks whose correlation is above are one, or one and its complement."""
QUANTITIES = ("error", "score", "inside", "x", "y")
SHOWN = ("mean", "flat", "same", *QUANTITIES)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return Pearson's correlation of two maps; 0 if one is constant."""
    a, b = (x.double().flatten() - x.double().mean() for x in (a, b))
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 0.0


def inside(boxes: Tensor, stride: float, shape: torch.Size) -> Tensor:
    """Return 1 at positions whose centre lies in a box, (h, w)."""
    ys, xs = ((torch.arange(size) + 0.5) * stride for size in shape)
    x0, y0, x1, y1 = boxes.unbind(1)
    covers = (xs >= x0[:, None]) & (xs <= x1[:, None])
    covered = (ys >= y0[:, None]) & (ys <= y1[:, None])
    return (covered[:, :, None] & covers[:, None, :]).any(0).float()


@torch.no_grad()
def measure(folder: Path, images: int) -> dict[str, dict[str, list[float]]]:
    """Return level -> quantity -> one value per mask with contrast."""
    values: dict[str, Any] = json.loads((folder / "settings.json").read_text())
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    splits = {name: CocoSplit(**value) for name, value in values.items() if name.endswith("_split")}
    settings = resolved(Settings(**{**values, **splits}))
    data: Images = load_data(settings.val_split, settings.student_name, name="validation data", size=settings.size)
    models = build_models(settings, data)
    student, teacher = models.student, cast(Any, models.teacher).eval()
    state = read_checkpoint(folder / "last.ckpt")
    student.load_state_dict({name.removeprefix(PREFIX): value for name, value in state["state_dict"].items()})
    attached: Any = student.distillation
    attached.load_state_dict(state["distiller"])
    method = attached.method
    assert isinstance(method, ACAMKD)
    seen: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    method.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for index in range(min(images, len(data))):
        image, target = data[index]
        batch, sizes = normalized_batch(student, [image])
        masks = attached.observe(batch)
        of_student, of_teacher = seen.pop()
        logits = teacher.head([of_teacher[level] for level in method.levels])["cls_logits"][0]
        counts = [of_teacher[level].shape[2:].numel() for level in method.levels]
        scores = logits.sigmoid().amax(1).split(counts)
        scale = sizes[0][0] / image.shape[1]
        for level, score, (own, theirs) in zip(method.levels, scores, method.compared(of_student, of_teacher)):
            error = (own - theirs).square().mean(1)[0]
            grid = torch.meshgrid(*(torch.arange(size).float() for size in error.shape), indexing="ij")
            box = inside(target["boxes"] * scale, attached.shapes["student"][level].stride, error.shape)
            maps = dict(zip(QUANTITIES, (error.log(), score.view(error.shape), box, grid[1], grid[0])))
            level_masks = masks[level]["spatial"][0]
            lively = [mask for mask in level_masks if mask.std() > FLAT]
            found[level]["mean"].append(float(level_masks.mean()))
            found[level]["flat"] += [float(mask.std() <= FLAT) for mask in level_masks]
            pairs = itertools.combinations(lively, 2)
            found[level]["same"] += [float(abs(correlation(a, b)) > SAME) for a, b in pairs]
            for name, other in maps.items():
                found[level][name] += [abs(correlation(mask, other)) for mask in lively]
    return found


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=43)
    arguments = parser.parse_args()
    for run in arguments.runs:
        print(f"\n{run.name}\n\n| level | mean | without contrast | pairs that are one | {' | '.join(QUANTITIES)} |")
        print("|---" * (len(QUANTITIES) + 4) + "|")
        for level, values in measure(run, arguments.images).items():
            cells = [statistics.fmean(values[n]) if values[n] else float("nan") for n in SHOWN]
            print(f"| {level} | {' | '.join(f'{cell:.2f}' for cell in cells)} |")


if __name__ == "__main__":
    main()
