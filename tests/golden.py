"""Golden numbers: losses and weights of short runs with fixed seeds, recorded before the step moved house.

``ACAM_KD_GOLDEN=record pytest tests/d2/test_golden.py tests/tv/test_golden.py`` writes ``golden.json`` anew. Losses and
projections of the weights are compared up to rounding. A whole run from the command line multiplies rounding (another
processor or number of threads moved a projection by 0.4% of the norm within four steps), so its tolerance is wider. The
hash of the weights is exact, so it holds on the machine and the versions that wrote it only, with one thread;
``ACAM_KD_GOLDEN=exact`` asserts it too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from acam_kd.core import DISTILLER_REGISTRY, method_arguments

FILE = Path(__file__).with_name("golden.json")
MODE = os.environ.get("ACAM_KD_GOLDEN", "")


def fingerprint(state: Mapping[str, Tensor]) -> dict:
    """Summarise a state dict: norm and a projection of all floating-point tensors, and the hash of every byte."""
    digest, norm, projection = hashlib.sha256(), 0.0, 0.0
    for name, value in sorted(state.items()):
        value = value.detach().cpu().contiguous()
        digest.update(name.encode() + value.numpy().tobytes())
        if value.is_floating_point():
            flat = value.double().flatten()
            norm += float(flat.square().sum())
            projection += float((flat * torch.sin(0.7 * torch.arange(len(flat), dtype=torch.float64) + 0.3)).sum())
    return {"norm": norm**0.5, "projection": projection, "sha256": digest.hexdigest()[:16]}


def as_recorded(names: str, offered: Sequence[str]) -> dict[str, dict]:
    """Return the settings of methods as they were when the numbers were recorded, before recipes: method -> settings.

    Every argument had its default, and several methods shared levels and taps.
    """
    methods = {name: DISTILLER_REGISTRY.get(name) for name in names.split("+")}
    taps = list(dict.fromkeys(next(tap for tap in offered if tap in method.reads) for method in methods.values()))
    return {
        name: {
            **method_arguments(method),
            "levels": ["all"],
            "taps": [tap for tap in taps if tap in method.reads],
        }
        for name, method in methods.items()
    }


def calm(model: torch.nn.Module, *inputs) -> torch.nn.Module:
    """Give a random network the statistics of a batch, or its features in evaluation leave any scale."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(*inputs)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
    return model


def two_steps(model: torch.nn.Module, *inputs) -> dict:
    """Losses of two steps of SGD, and the student's state dict after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    losses = []
    for step in range(2):
        torch.manual_seed(step)
        found = model(*inputs)
        losses.append({name: float(value.detach()) for name, value in found.items()})
        optimizer.zero_grad()
        sum(found.values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    return {"losses": losses}


def check(name: str, found: Mapping, *, rel: float = 1e-3) -> None:
    """Compare with what was recorded under that name, or record it.

    Args:
        name: of the case.
        found: ``losses``, a list of dicts, and ``weights``, from ``fingerprint``.
        rel: tolerance of the losses; that of the weights' norm is a tenth of it, and their projection's is that tenth
            of the norm.
    """
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    if MODE == "record":
        known[name] = found
        FILE.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")
        return
    golden = known[name]
    for step, (here, there) in enumerate(zip(found["losses"], golden["losses"], strict=True)):
        assert list(here) == list(there), step
        assert here == pytest.approx(there, rel=rel, abs=1e-6), step
    here, there = found["weights"], golden["weights"]
    for key in ("norm", "projection"):
        assert here[key] == pytest.approx(there[key], abs=rel / 10 * there["norm"]), key
    if MODE == "exact":
        assert here["sha256"] == there["sha256"]
