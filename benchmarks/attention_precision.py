"""The effect of half-precision attention under float32 training: on masks, on gradients and on a short training.

    python -m benchmarks.attention_precision --seeds 3

A CPU emulates the arithmetic of ``attention_precision``: inputs and results are rounded as on a GPU, sums are in
float32. The features have a scale per channel and vary smoothly, as a network's do. The trainings are those of
``benchmarks.mask_toy``; the spread of the seeds says which differences matter.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD
from benchmarks.mask_toy import run
from benchmarks.report import table

__all__ = ["differences", "main"]

PRECISIONS = ("float32", "bfloat16", "float16")
CHANNELS, SIZE = 256, (40, 56)
ROWS: dict[str, dict[str, object]] = {
    "ours (detached, pairwise)": {},
    "literal (full gradient, ratio)": {"mask_gradient": "full", "diversity": "ratio"},
}


def _features(draw: torch.Generator, dtype: torch.dtype) -> Tensor:
    coarse = torch.randn(2, CHANNELS, 5, 7, generator=draw, dtype=torch.float64)
    smooth = F.interpolate(coarse, size=SIZE, mode="bilinear")
    noise = 0.3 * torch.randn(2, CHANNELS, *SIZE, generator=draw, dtype=torch.float64)
    return ((smooth + noise) * torch.rand(1, CHANNELS, 1, 1, generator=draw, dtype=torch.float64) * 2).to(dtype)


def _step(precision: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return masks and gradients of a step, in float64."""
    torch.manual_seed(0)
    level = {"p": FeatureSpec(CHANNELS, 8)}
    method = ACAMKD(level, level, attention_precision=precision)
    with torch.no_grad():
        method.masking["spatial"]["p"].units.normal_(0, 0.3)  # type: ignore[index,operator,union-attr]
        method.masking["channel"]["p"].units.normal_(0, 3)  # type: ignore[index,operator,union-attr]
    method.to(dtype).fusion["p"].path = "parts"  # type: ignore[assignment]
    draw = torch.Generator().manual_seed(0)
    student, teacher = _features(draw, dtype).requires_grad_(), _features(draw, dtype)
    losses = method({"p": student}, {"p": teacher})
    torch.stack([*losses.values()]).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad for name, p in [("student", student), *method.named_parameters()]}
    found = {name: gradient.double() for name, gradient in gradients.items() if gradient is not None}
    return {kind: x.double() for kind, x in method.masks()["p"].items()}, found


def differences(precision: str) -> dict[str, float]:
    """Return the differences of one step from float64.

    Returns:
        ``<kind> masks``: the largest difference over the standard deviation of the masks. ``student``, ``fusion`` and
        ``units``: the norm of the gradient's difference over the gradient's norm, the largest of the tensors.
    """
    (masks, gradients), (found, theirs) = _step("auto", torch.float64), _step(precision, torch.float32)
    result = {f"{kind} masks": float((found[kind] - x).abs().max() / x.std()) for kind, x in masks.items()}
    for group, prefix in {"student": "student", "fusion": "fusion.", "units": "masking."}.items():
        pairs = [(theirs[name], g) for name, g in gradients.items() if name.startswith(prefix)]
        result[group] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args(arguments)
    found = {precision: differences(precision) for precision in PRECISIONS}
    names = list(found["float32"])
    rows = [[precision, *(f"{row[name]:.1e}" for name in names)] for precision, row in found.items()]
    print(table(["attention in", *names], rows), "\n", flush=True)
    rows = []
    for form, options in ROWS.items():
        for precision in PRECISIONS:
            given = {**options, "attention_precision": precision}
            runs = [run(given, seed=seed, scale=1.0, steps=args.steps) for seed in range(args.seeds)]
            cells = [", ".join(f"{one[key]:.4f}" for one in runs) for key in ("error", "mean", "std")]
            spread = statistics.pstdev(one["error"] for one in runs)
            rows.append([form, precision, *cells, f"{spread:.4f}"])
    heads = ["masks", "attention in", "error, end / start, of each seed", "mask mean", "std over positions", "spread"]
    print(table(heads, rows))


if __name__ == "__main__":
    main()
