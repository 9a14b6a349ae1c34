#!/usr/bin/env python
"""A toy that shows in seconds whether the masks collapse: the table of docs/masks.md.

    python -m benchmarks.mask_toy --seeds 3

Images are noise with a bright square. Teacher and student are three convolutions each, and the teacher is frozen. One
SGD trains student, alignment, fusion and units, on the distillation losses alone.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor, nn

from acam_kd.core import DISTILLER_REGISTRY, FeatureSpec
from acam_kd.methods.acam.method import VANISHED
from acam_kd.methods.parts.losses import mse

ROWS: dict[str, dict[str, object]] = {
    "all masks 1 (mimicking)": {"spatial_masking": "UniformMasking", "channel_masking": ""},
    "full gradient, lambda 0": {"mask_gradient": "full", "lambda_div": 0.0},
    "full gradient, pairwise": {"mask_gradient": "full"},
    "full gradient, pairwise, standardised": {"mask_gradient": "full", "standardize_fused": True},
    "literal (full gradient, ratio)": {"mask_gradient": "full", "diversity": "ratio"},
    "literal, standardised": {"mask_gradient": "full", "diversity": "ratio", "standardize_fused": True},
    "ours (detached, pairwise)": {},
    "ours, standardised": {"standardize_fused": True},
    "detached, ratio": {"diversity": "ratio"},
}


def net(channels: int, width: int) -> nn.Module:
    """Build three convolutions with strides 2, 2, 1."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.ReLU(), nn.Conv2d(width, width, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(width, channels, 3, 1, 1),
    )  # fmt: skip


def images(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images, (N, 3, 64, 64), and the place of the square at stride 4, (N, 16, 16)."""
    batch, inside = torch.randn(n, 3, 64, 64, generator=draw) * 0.3, torch.zeros(n, 16, 16)
    for i in range(n):
        x, y, size = torch.randint(1, 9, (3,), generator=draw).tolist()
        inside[i, y : y + size, x : x + size] = 1
        batch[i, :, 4 * y : 4 * (y + size), 4 * x : 4 * (x + size)] += torch.randn(3, 1, 1, generator=draw) + 2
    return batch, inside.bool()


def run(arguments: dict[str, object], *, seed: int, scale: float, steps: int) -> dict[str, float]:
    """Train one row; return the ratio of the errors after and before, and figures of its spatial masks at the end."""
    torch.manual_seed(seed)
    teacher, student = net(32, 32).requires_grad_(False), net(32, 8)
    draw = torch.Generator().manual_seed(seed)
    features = teacher(images(64, draw)[0])
    shift, scale = features.mean((0, 2, 3), keepdim=True), scale / features.std((0, 2, 3), keepdim=True)  # type: ignore[assignment]
    spec = {"p": FeatureSpec(32, 4)}
    method = DISTILLER_REGISTRY.get("ACAMKD")(spec, spec, **arguments)
    optimizer = torch.optim.SGD([*student.parameters(), *method.parameters()], lr=0.01, momentum=0.9)
    errors = []
    for _ in range(steps):
        batch, inside = images(8, draw)
        target, out = (teacher(batch) - shift) * scale, student(batch)
        losses = method({"p": out}, {"p": target})
        optimizer.zero_grad()
        sum(losses.values()).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 35)
        optimizer.step()
        errors.append(float(mse(method.align["p"](out), target).detach()))
    masks = method.masks()["p"]["spatial"]  # (N, M, 16, 16)
    on = torch.stack([masks[i][:, inside[i]].mean(1) for i in range(len(masks))]).mean(0)
    off = torch.stack([masks[i][:, ~inside[i]].mean(1) for i in range(len(masks))]).mean(0)
    return {
        "error": errors[-1] / errors[0],
        "mean": float(masks.mean()),
        "std": float(masks.flatten(2).std(2, unbiased=False).mean()),
        "vanished": float((masks.mean((0, 2, 3)) < VANISHED).sum()),
        "square": float((on - off).abs().mean()),
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    columns = ["masks", "feature scale", "error, end / start", "mask mean", "std over positions", "vanished of 6"]
    print(f"| {' | '.join([*columns, 'on/off the square'])} |")
    print("|---" * 7 + "|")
    for scale in (1.0, 5.0):
        for name, arguments in ROWS.items():
            runs = [run(arguments, seed=seed, scale=scale, steps=args.steps) for seed in range(args.seeds)]
            mean = {key: statistics.mean(r[key] for r in runs) for key in runs[0]}
            print(
                f"| {name} | {scale:g} | {mean['error']:.3f} | {mean['mean']:.3f} | {mean['std']:.3f} | "
                f"{mean['vanished']:.1f} | {mean['square']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
