"""Attention without its matrix: every path against the definition, values and gradients; the largest allocation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD
from acam_kd.methods.acam import attention, kernels, paths
from acam_kd.methods.acam.attention import fused_attention, materialized_attention, summarized_attention
from acam_kd.methods.acam.fusion import CrossAttentionFusion


def attend(q, k, v):
    """Compute softmax(Q^T K / sqrt(E)) V, position by position."""
    out = q.new_empty(len(q), v.shape[1], q[0, 0].numel())
    for n in range(len(q)):
        for i, query in enumerate(q[n].flatten(1).T):
            weights = torch.softmax(query @ k[n].flatten(1) / q.shape[1] ** 0.5, 0)
            out[n, :, i] = v[n].flatten(1) @ weights
    return out.view(len(q), -1, *q.shape[2:])


def maps(e, c, hq, hk, n=2):
    q, k, v = torch.randn(n, e, *hq), torch.randn(n, e, *hk), torch.randn(n, c, *hk)
    return tuple(x.double().requires_grad_() for x in (q, k, v))


def check_gradients(got, expected, inputs):
    """Compare the gradients of a random weighted sum of all outputs."""
    weights = [torch.randn_like(x) for x in got]
    found = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, got)), inputs)
    wanted = torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, expected)), inputs)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)


WIDTHS = [(4, 8), (8, 4), (5, 5), (1, 3)]
SIZES = [((3, 5), (3, 5)), ((2, 2), (4, 3)), ((1, 1), (1, 1))]


@pytest.mark.parametrize("attention", [materialized_attention, fused_attention])
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("sizes", SIZES)
def test_the_map_is_that_of_the_definition(attention, widths, sizes):
    q, k, v = maps(*widths, *sizes)
    out, expected = attention(q, k, v), attend(q, k, v)
    assert out.shape == (2, widths[1], *sizes[0])
    torch.testing.assert_close(out, expected)
    check_gradients([out], [expected], (q, k, v))


@pytest.mark.parametrize("rows", [1, 2, 3, 64])
@pytest.mark.parametrize("widths", [*WIDTHS, (4, 0)])
@pytest.mark.parametrize("sizes", SIZES)
def test_the_summary_is_that_of_the_definition(rows, widths, sizes, monkeypatch):
    """Any part of the matrix may be held at a time, from one row to all of it."""
    monkeypatch.setitem(attention.BLOCK, "cpu", 1)
    monkeypatch.setitem(attention.MIN_ROWS, "cpu", rows)
    q, k, u = maps(*widths, *sizes)
    columns, received = summarized_attention(q, k, u)
    eye = torch.eye(k[0, 0].numel(), dtype=q.dtype).view(1, -1, *sizes[1]).expand(2, -1, -1, -1)
    matrix = materialized_attention(q, k, eye)  # (N, keys, Hq, Wq)
    expected = torch.einsum("nkij,nmk->nmij", matrix, u.flatten(2)), matrix.mean((2, 3)).view(2, 1, *sizes[1])
    assert columns.shape == (2, widths[1], *sizes[0]) and received.shape == (2, 1, *sizes[1])
    torch.testing.assert_close((columns, received), expected)
    torch.testing.assert_close(received.sum((1, 2, 3)), torch.ones(2).double())
    check_gradients((columns, received), expected, (q, k, u))


def test_one_output_of_the_summary_is_enough_for_its_gradient():
    q, k, u = maps(3, 2, (2, 3), (3, 2))
    for pick in (0, 1):
        torch.autograd.gradcheck(lambda *x, pick=pick: summarized_attention(*x)[pick], (q, k, u))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_summary_is_in_float32_at_least(dtype):
    q, k, u = (x.detach().to(dtype) for x in maps(4, 2, (3, 4), (3, 4)))
    expected = summarized_attention(*(x.float() for x in (q, k, u)))
    with torch.autocast("cpu", dtype):
        found = summarized_attention(*(x.requires_grad_() for x in (q, k, u)))
        sum(x.sum() for x in found).backward()
    assert all(torch.equal(a, b) for a, b in zip(found, expected)) and q.grad.dtype == dtype


def test_the_summary_survives_large_products():
    """A softmax that is one-hot to the last digit: rows of 0 and 1, no NaN."""
    q, k, u = (x.detach() for x in maps(4, 2, (3, 3), (3, 3)))
    q = (q * 1e4).requires_grad_()
    columns, received = summarized_attention(q, k, u)
    assert received.isfinite().all() and (received * 9).round().sub(received * 9).abs().max() < 1e-6
    columns.sum().backward()
    assert columns.isfinite().all() and q.grad.isfinite().all()


MODES = {
    "default": {},
    "full": {"mask_gradient": "full"},
    "spatial": {"channel_masking": ""},
    "spatial, full": {"channel_masking": "", "mask_gradient": "full"},
    "channel": {"spatial_masking": ""},
    "channel, full": {"spatial_masking": "", "mask_gradient": "full"},
    "channel, standardised": {"spatial_masking": "", "standardize_fused": True},
    "standardised": {"standardize_fused": True, "mask_gradient": "full"},
    "student query": {"query": "student", "mask_gradient": "full"},
    "student query, detached": {"query": "student"},
    "frozen": {"mask_gradient": "frozen"},
    "keys pooled": {"max_positions": 9, "mask_gradient": "full"},
    "all pooled": {"max_positions": 9, "pooling": "all", "mask_gradient": "full"},
    "student query, keys pooled": {"max_positions": 9, "query": "student", "mask_gradient": "full"},
}
NEED_THE_MAP = ["standardised"]


def acam(mode, path="summary", channels=6):
    torch.manual_seed(3)
    levels = {"p3": FeatureSpec(channels, 8)}
    method = ACAMKD(levels, levels, **MODES[mode])
    method.fusion["p3"].path = path
    with torch.no_grad():  # so that masks differ, and with them all gradients
        for masking in method.masking.values():
            masking["p3"].units.normal_(0, 2)
    return method


@pytest.mark.parametrize("path", ["auto", "map", "parts", "materialized"])
@pytest.mark.parametrize("mode", MODES)
def test_acam_is_the_same_by_every_path(mode, path, monkeypatch):
    """Losses, masks, and the gradients of student and parameters, in float64."""
    if path == "auto":
        monkeypatch.setattr(paths, "RULES", (paths.Rule("columns", mean=False), paths.Rule("summary")))
    monkeypatch.setitem(attention.BLOCK, "cpu", 100)
    monkeypatch.setitem(attention.MIN_ROWS, "cpu", 4)
    features = torch.randn(2, 6, 5, 7).double().requires_grad_(), torch.randn(2, 6, 5, 7).double() * 2
    results = []
    for compared in ("map" if path == "auto" else "summary", path):
        method = acam(mode, compared).double()
        losses = method({"p3": features[0]}, {"p3": features[1]})
        parameters = [features[0], *(p for p in method.parameters() if p.requires_grad)]
        results.append((losses, method.masks(), torch.autograd.grad(sum(losses.values()), parameters)))
    torch.testing.assert_close(*results)
    assert all(gradient.abs().max() > 1e-9 for gradient in results[0][2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision(dtype):
    """Without autocast; wide enough for the summary."""
    levels = {"p3": FeatureSpec(64, 8)}
    method = ACAMKD(levels, levels).to(dtype)
    features = torch.randn(2, 1, 64, 5, 7).to(dtype)
    losses = method({"p3": features[0].requires_grad_()}, {"p3": features[1]})
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in method.parameters())
    method.fusion["p3"].path = "map"
    torch.testing.assert_close(method({"p3": features[0]}, {"p3": features[1]}), losses, rtol=0.02, atol=0)


def test_mixed_precision():
    """The summary's masks, in float32, are those of the map, in bfloat16."""
    levels = {"p3": FeatureSpec(64, 8)}
    method, features = ACAMKD(levels, levels), torch.randn(2, 1, 64, 5, 7)
    found = []
    for path in ("auto", "map"):
        method.fusion["p3"].path = path
        with torch.autocast("cpu", torch.bfloat16):
            losses = method({"p3": features[0]}, {"p3": features[1]})
        found.append((losses, method.masks()))
        gradients = torch.autograd.grad(sum(losses.values()), [*method.parameters()])
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients)
    torch.testing.assert_close(*found, rtol=0.02, atol=0.01, check_dtype=False)


@pytest.mark.parametrize("mode", MODES)
def test_the_map_is_made_only_where_it_is_needed(mode, monkeypatch):
    method, made = acam(mode), []
    method.fusion["p3"].register_forward_hook(lambda *_: made.append(1))
    method({"p3": torch.randn(1, 6, 5, 7)}, {"p3": torch.randn(1, 6, 5, 7)})
    assert bool(made) == (mode in NEED_THE_MAP)


@pytest.mark.parametrize("path", ["summary", "map", "parts"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_has_the_size_of_the_matrix(mode, path, sizes):
    """The largest result of any operator, forward and backward, has the size of a block or of the features."""
    side, channels = 40, 16
    positions = side**2
    method = acam(mode, path, channels)
    method.max_positions *= 50  # 9 -> 450: halved, 400
    student, teacher = torch.randn(1, channels, side, side, requires_grad=True), torch.randn(1, channels, side, side)
    with sizes:
        sum(method({"p3": student}, {"p3": teacher}).values()).backward()
    largest = max(sizes.seen)
    assert positions * channels <= largest <= max(attention.BLOCK["cpu"], 2 * positions * channels)
    assert largest < positions**2 / 9


def test_blocks_do_not_grow_with_the_positions(sizes, monkeypatch):
    """Four times the positions are sixteen times the matrix; the memory held grows with the features, four times."""
    monkeypatch.setitem(attention.BLOCK, "cpu", 2**12)
    largest = []
    for side in (16, 32):
        sizes.seen.clear()
        with sizes:
            levels = {"p3": torch.randn(1, 16, side, side, requires_grad=True)}
            sum(acam("default", channels=16)(levels, {"p3": torch.randn(1, 16, side, side)}).values()).backward()
        largest.append(max(sizes.seen))
    assert largest[1] <= 4 * largest[0]


MEMORY = """
import torch
from benchmarks.memory import peak_memory, start_peak_memory
from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD
torch.manual_seed(0)
levels = {"p2": FeatureSpec(256, 4)}
method = ACAMKD(levels, levels)
student, teacher = torch.randn(1, 256, 100, 168, requires_grad=True), torch.randn(1, 256, 100, 168)
def step(*maps):
    sum(method(*({"p2": x} for x in maps)).values()).backward()
step(student[..., :8, :8], teacher[..., :8, :8])  # what the first call of anything costs
before = start_peak_memory(False)
step(student, teacher)
print((peak_memory(False) - before) / 2**30)
"""


@pytest.mark.slow
def test_a_step_at_real_resolution_is_small():
    """100 x 168 positions, C = 256, forward and backward: under 0.3 GiB more (the matrix alone is 1.05 GiB)."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.3


class Gradients(TorchDispatchMode):
    """Notes the layout of the gradients that attention kernels get."""

    def __init__(self):
        super().__init__()
        self.layouts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.endswith("attention_for_cpu_backward"):
            self.layouts.append((args[0].shape, args[0].stride()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["map", "parts"])
def test_kernels_get_gradients_of_one_layout(path, monkeypatch):
    """Torch's plans of cuDNN's backward do not know the layout of the gradient, which must not change therefore."""
    monkeypatch.setattr(kernels, "NARROW", 8)  # so that 32 channels are two parts
    fusion = CrossAttentionFusion(32)
    student, teacher, units = torch.randn(2, 32, 6, 7), torch.randn(2, 32, 6, 7), torch.randn(6, 32)
    fused, _ = fusion._positions(teacher.clone().requires_grad_(), student, units)
    if path == "map":
        fused = fused.transpose(1, 2).reshape(2, 32, 6, 7)
    with Gradients() as seen:
        (fused * torch.randn_like(fused)).sum().backward()
    assert seen.layouts and all(stride == (42 * shape[3], 42 * shape[3], shape[3], 1) for shape, stride in seen.layouts)
    assert len(seen.layouts) == len(kernels.widths(16, 32)[1])
