"""The sections of ``benchmarks.gpu`` about attention: exactness of every path, and its kernels alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD
from acam_kd.methods.acam.attention import summarized_attention
from acam_kd.methods.acam.kernels import attend

from .gpu_case import Case, Scale
from .timing import Clock

__all__ = ["exactness", "kernels"]

PATHS = ("auto", "map", "parts", "summary")
PRECISIONS: dict[str, tuple[torch.dtype, str, torch.dtype | None]] = {
    "float64": (torch.float64, "auto", None),
    "float32": (torch.float32, "float32", None),
    "float32, attention auto": (torch.float32, "auto", None),
    "AMP float16": (torch.float32, "auto", torch.float16),
    "AMP bfloat16": (torch.float32, "auto", torch.bfloat16),
}
"""Name -> type of model and features, precision of the attention, autocast."""
LIMITS = {"float64": 1e-7, "float32": 2e-2, "float32, attention auto": 6e-2, "AMP float16": 6e-2, "AMP bfloat16": 2e-1}
"""The largest relative error of any gradient that is no fault: float32 convolutions are in TF32 on a GPU."""
LOSS_SCALE = 2.0**10
"""Mixed precision scales losses; otherwise the gradients of masks leave float16."""
MODES: dict[str, dict[str, Any]] = {"both masks": {}, "spatial masks": {"channel_masking": ""}}


def exactness(scale: Scale) -> Iterator[Case]:
    """List every width, kind of masks, path and precision; each is compared with the definition in float64."""
    for channels in scale.of((64, 256, 512), (16,)):
        for mode in MODES:
            reference = _Level(channels, mode, scale)
            for path, precision in itertools.product(PATHS, scale.of(PRECISIONS, ("float64", "AMP bfloat16"))):
                name = f"C {channels}, {mode}, {path}, {precision}"
                about = {"channels": channels, "mode": mode, "path": path, "precision": precision}
                yield Case(name, partial(reference.compare, path, precision), about)


class _Level:
    """One level with fixed weights and features; the definition's masks and gradients are made once."""

    def __init__(self, channels: int, mode: str, scale: Scale) -> None:
        self.channels, self.mode, self.scale = channels, mode, scale
        self._expected: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    def run(self, path: str, precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the masks and the gradients, in float64."""
        dtype, attention, autocast = PRECISIONS[precision]
        torch.manual_seed(0)
        level = {"p": FeatureSpec(self.channels, 8)}
        method = ACAMKD(level, level, mask_gradient="full", attention_precision=attention, **MODES[self.mode])
        with torch.no_grad():
            for masking in method.masking.values():
                masking["p"].units.normal_(0, 1)  # type: ignore[index,operator,union-attr]
        shape = (2, self.channels, *self.scale.of((64, 72), (5, 6)))
        student, teacher = torch.randn(shape), torch.randn(shape)
        method = method.to(self.scale.device, dtype)
        method.fusion["p"].path = path  # type: ignore[assignment]
        student, teacher = (x.to(self.scale.device, dtype) for x in (student, teacher))
        student.requires_grad_()
        context = torch.autocast(self.scale.device, autocast) if autocast else nullcontext()
        with context:
            losses = method({"p": student}, {"p": teacher})
        (torch.stack([x.to(dtype) for x in losses.values()]).sum() * LOSS_SCALE).backward()  # type: ignore[no-untyped-call]
        parameters = {name: p.grad for name, p in method.named_parameters()}
        gradients = {name: g.double() for name, g in {"student": student.grad, **parameters}.items() if g is not None}
        return {kind: m.double() for kind, m in method.masks()["p"].items()}, gradients

    def compare(self, path: str, precision: str) -> dict[str, Any]:
        """Return the largest errors against the definition in float64."""
        if self._expected is None:
            self._expected = self.run("materialized", "float64")
        (masks, gradients), seen = self._expected, _Kernels()
        with seen:
            found, found_gradients = self.run(path, precision)
        missing = sorted(gradients.keys() - found_gradients.keys())
        errors = {
            name: float((found_gradients[name] - g).norm() / g.norm().clamp_min(1e-30))
            for name, g in gradients.items()
            if name in found_gradients
        }
        worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
        return {
            "masks": max(float((found[kind] - m).abs().max()) for kind, m in masks.items()),
            "gradient": errors[worst],
            "worst": worst,
            "errors": errors,
            "missing": missing,
            "within": not missing and errors[worst] <= LIMITS[precision],
            "kernels": sorted(seen.names),
        }


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the attention kernels that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if "scaled_dot_product" in name or "flash_attention" in name or "efficient_attention" in name:
            self.names.add(name)
        return func(*args, **(kwargs or {}))


# Kernels alone.

CUDNN, FLASH, EFFICIENT, MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
KERNELS: tuple[tuple[str, SDPBackend, torch.dtype, int, int], ...] = (
    *(("cuDNN", CUDNN, torch.bfloat16, e, v) for e, v in ((128, 8), (128, 128), (128, 256), (256, 256), (64, 128))),
    ("cuDNN", CUDNN, torch.float16, 128, 128),
    *(("flash", FLASH, torch.bfloat16, e, v) for e, v in ((128, 128), (256, 256), (64, 64))),
    *(("efficient", EFFICIENT, torch.float32, e, v) for e, v in ((128, 8), (128, 128), (128, 256))),
    ("efficient", EFFICIENT, torch.bfloat16, 128, 128),
)
OWN: dict[str, tuple[Callable[..., Any], torch.dtype]] = {
    "attend (our order)": (attend, torch.bfloat16),
    "summarized_attention": (summarized_attention, torch.float32),
}


def kernels(scale: Scale) -> Iterator[Case]:
    """List torch's kernels and the project's own functions, and the first calls of the kernels at new sizes."""
    for positions in scale.of((16_800, 67_200), (64,)):
        for name, backend, dtype, e, v in scale.of(KERNELS, ()):
            title = f"{positions}, {name}, {str(dtype).removeprefix('torch.')}, E {e}, V {v}"
            about = {"positions": positions, "kernel": name, "dtype": str(dtype), "E": e, "V": v}
            yield Case(title, partial(_kernel, scale, backend, dtype, positions, e, v), about)
        for name, (function, dtype) in OWN.items():
            about = {"positions": positions, "kernel": name, "dtype": str(dtype), "E": 128}
            yield Case(f"{positions}, {name}", partial(_own, scale, name, function, dtype, positions), about)
    for name, backend in scale.of({"cuDNN": CUDNN, "flash": FLASH}, {"math": MATH}).items():
        yield Case(f"first calls, {name}", partial(_first_calls, scale, backend), {"kernel": name})


def _inputs(scale: Scale, dtype: torch.dtype, positions: int, *channels: int) -> list[Tensor]:
    torch.manual_seed(0)
    shape = (1, 1, positions)
    return [torch.randn(*shape, c, device=scale.device, dtype=dtype, requires_grad=True) for c in channels]


def _kernel(scale: Scale, backend: SDPBackend, dtype: torch.dtype, positions: int, e: int, v: int) -> dict[str, Any]:
    query, key, value = _inputs(scale, dtype, positions, e, e, v)

    def forward() -> Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(query, key, value)

    return _timed(scale, forward, [query, key, value])


def _own(scale: Scale, name: str, function: Callable[..., Any], dtype: torch.dtype, positions: int) -> dict[str, Any]:
    """Time a function of the project, with 6 columns or, for one kernel, values of the width of the queries."""
    width = 128 if function is attend else 6
    query, key, value = _inputs(scale, dtype, positions, 128, 128, width)
    if function is summarized_attention:
        maps = [x[0].mT.unsqueeze(3) for x in (query, key, value)]  # (1, C, L, 1)
        return _timed(scale, lambda: function(*maps), [query, key, value])
    return _timed(scale, lambda: function(query[0], key[0], value[0], 128**-0.5), [query, key, value])


def _timed(scale: Scale, forward: Callable[[], Any], inputs: Sequence[Tensor], repeats: int = 3) -> dict[str, Any]:
    """Return the median milliseconds of forward and backward, and the peak of the memory in GiB."""
    clock, spans = Clock(scale.on_gpu), []
    for _ in range(repeats + 1):
        start = clock.now()
        outputs = forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        middle = clock.now()
        torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
        spans.append((start, middle, clock.now()))
    clock.wait()
    times = [(clock.seconds(a, b), clock.seconds(b, c)) for a, b, c in spans[1:]]
    peak = torch.cuda.max_memory_allocated() / 2**30 if scale.on_gpu else None
    return {
        "forward": 1e3 * statistics.median(t[0] for t in times),
        "backward": 1e3 * statistics.median(t[1] for t in times),
        "peak_gib": peak,
    }


def _first_calls(scale: Scale, backend: SDPBackend) -> dict[str, Any]:
    """Return wall-clock milliseconds, forward and backward, of first and second calls at sizes that are new."""
    clock = Clock(False)
    found: dict[str, list[float]] = {"first": [], "second": []}
    for positions in scale.of((10_000, 10_400, 10_800, 11_200), (24, 28)):
        query, key, value = _inputs(scale, torch.bfloat16, positions, 128, 128, 128)
        for call in found:
            scale.wait()
            start = clock.now()
            with sdpa_kernel([backend]):
                out = F.scaled_dot_product_attention(query, key, value)
            torch.autograd.grad(out, [query, key, value], torch.ones_like(out))
            scale.wait()
            found[call].append(1e3 * clock.seconds(start, clock.now()))
    return dict(found)
