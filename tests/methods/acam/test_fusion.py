"""Fusion: query source and key/value source, the projections, invariances, faults."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from acam_kd.core import FUSION_REGISTRY
from acam_kd.core.errors import ConfigError
from acam_kd.methods.acam import kernels
from acam_kd.methods.acam.attention import fused_attention, materialized_attention
from acam_kd.methods.acam.fusion import CrossAttentionFusion, TeacherFusion
from acam_kd.methods.acam.paths import attention_dtype, chosen_path


@pytest.mark.parametrize("query", ["teacher", "student"])
def test_the_query_source(query):
    fusion = CrossAttentionFusion(6, query=query).double()
    student, teacher = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 6, 4, 4).double()
    query_source, value_source = (teacher, student) if query == "teacher" else (student, teacher)
    expected = materialized_attention(fusion.query(query_source), fusion.key(value_source), fusion.value(value_source))
    torch.testing.assert_close(fusion(student, teacher), expected)


def test_projections_are_those_of_the_paper():
    fusion = CrossAttentionFusion(8)
    assert {name: tuple(p.shape) for name, p in fusion.named_parameters()} == {
        "query.weight": (4, 8, 1, 1),
        "key.weight": (4, 8, 1, 1),
        "value.weight": (8, 8, 1, 1),
    }


def test_order_of_the_key_positions_does_not_matter():
    fusion = CrossAttentionFusion(8)
    student, teacher = torch.randn(1, 8, 3, 4), torch.randn(1, 8, 3, 4)
    torch.testing.assert_close(fusion(student.flip(2, 3), teacher), fusion(student, teacher))
    torch.testing.assert_close(fusion(student, teacher.flip(2, 3)), fusion(student, teacher).flip(2, 3))


def test_fused_is_a_mean_where_keys_are_equal():
    """With no difference between keys attention is uniform: every position gets the mean of the values."""
    fusion = CrossAttentionFusion(4)
    torch.nn.init.zeros_(fusion.key.weight)
    student, teacher = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    mean = fusion.value(student).mean((2, 3), keepdim=True).expand(-1, -1, 3, 3)
    torch.testing.assert_close(fusion(student, teacher), mean)


def test_teacher_fusion_leaves_the_student_out():
    student, teacher = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(1, 4, 3, 3)
    assert TeacherFusion(4)(student, teacher) is teacher
    with pytest.raises(ConfigError) as error:
        TeacherFusion(4, query="student")
    assert error.value.argument == "query" and error.value.value == "student"
    assert "TeacherFusion" in error.value.allowed


def test_bad_names_are_named():
    with pytest.raises(ConfigError) as error:
        CrossAttentionFusion(4, query="both")
    assert error.value.argument == "query" and error.value.value == "both"
    assert error.value.allowed == "teacher or student"
    with pytest.raises(ConfigError) as error:
        FUSION_REGISTRY.get("Nothing")
    assert error.value.argument == "fusion" and error.value.value == "Nothing"
    assert error.value.allowed == "one of CrossAttentionFusion, TeacherFusion"


P2, P3 = 67_200**2, 16_800**2
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("device", "dtype", "channels", "pairs", "expected"),
    [
        ("cpu", SINGLE, 256, P2, "summary"),
        ("cpu", SINGLE, 64, P2, "summary"),
        ("cpu", SINGLE, 19, P2, "map"),  # the logits of Cityscapes
        ("cpu", HALF, 256, P2, "summary"),
        ("cuda", HALF, 256, P2, "parts"),
        ("cuda", torch.float16, 19, P3, "parts"),
        ("cuda", SINGLE, 256, P3, "summary"),
        ("cuda", SINGLE, 256, P2, "map"),  # the summary took twenty times the floor there
        ("cuda", SINGLE, 19, P3, "map"),
        ("cuda", DOUBLE, 256, P2, "summary"),
    ],
)
def test_the_table_of_paths(device, dtype, channels, pairs, expected):
    level = {"device": device, "dtype": dtype, "channels": channels, "pairs": pairs}
    assert chosen_path(**level, mean=True) == expected
    assert chosen_path(**level, mean=False) == ("summary" if device == "cuda" and dtype == DOUBLE else "columns")


def test_a_path_that_was_set_comes_before_the_table():
    maps, fusion = torch.randn(2, 1, 4, 3, 3), CrossAttentionFusion(4)
    for path, whole in {"map": True, "materialized": True, "parts": False, "summary": False}.items():
        fusion.path = path
        assert [fusion.summarizes(*maps, mean=mean) for mean in (True, False)] == [not whole] * 2


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    return SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)


def test_auto_is_half_precision_on_a_gpu_that_has_it(ampere, monkeypatch):
    assert attention_dtype("auto", ampere) == torch.bfloat16 and attention_dtype("float32", ampere) == torch.float32
    assert attention_dtype("auto", torch.zeros(1)) == torch.float32
    assert attention_dtype("bfloat16", torch.zeros(1)) == torch.bfloat16
    assert attention_dtype("bfloat16", torch.zeros(1).double()) == torch.float64
    with torch.autocast("cpu", torch.float16):
        assert attention_dtype("auto", torch.zeros(1)) == torch.float16
        assert attention_dtype("float32", torch.zeros(1)) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert attention_dtype("auto", ampere) == torch.float32


@pytest.mark.parametrize("path", ["map", "parts", "summary", "materialized"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_precision_of_the_attention(path, precision, autocast):
    """The result is that of float32, up to the rounding of the precision, whatever the type of the features."""
    torch.manual_seed(2)
    fusion, student, teacher = CrossAttentionFusion(16), torch.randn(2, 16, 4, 5), torch.randn(2, 16, 4, 5)
    units = torch.randn(3, 16)
    expected = fusion(student, teacher)
    projection = torch.einsum("mc,nchw->nmhw", units, expected)
    fusion.path, fusion.precision = path, precision
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        fused = fusion(student, teacher)
        found = fusion.summary(student, teacher, units, mean=True) if path not in ("map", "materialized") else None
    tolerance = 2e-5 if precision == "float32" else 0.02
    assert autocast or fused.dtype == torch.float32
    torch.testing.assert_close(fused.float(), expected, atol=tolerance, rtol=0)
    if found is not None and found.projection is not None and found.mean is not None:
        torch.testing.assert_close(found.projection.float(), projection, atol=3 * tolerance, rtol=0)
        torch.testing.assert_close(found.mean.float(), expected.mean((2, 3), keepdim=True), atol=tolerance, rtol=0)
    found_gradient, wanted = (
        torch.autograd.grad(x.float().square().sum(), fusion.key.weight)[0] for x in (fused, expected)
    )
    assert (found_gradient - wanted).norm() <= (1e-4 if precision == "float32" else 0.05) * wanted.norm()


def test_an_unknown_path_is_refused():
    with pytest.raises(ConfigError) as error:
        CrossAttentionFusion(4).path = "materialised"
    assert error.value.argument == "path" and error.value.value == "materialised"
    assert error.value.allowed == "one of auto, map, parts, summary, materialized"


def test_projections_of_the_map_are_attention_to_projected_values():
    """The identity m (A V) = A (V m) holds for the fused kernels too, which a GPU runs where no mean is wanted."""
    fusion = CrossAttentionFusion(6).double()
    student, teacher = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 4, 5).double()
    units = torch.randn(3, 6).double()
    columns = torch.einsum("mc,nchw->nmhw", units, fusion.value(student))
    expected = torch.einsum("mc,nchw->nmhw", units, fusion(student, teacher))
    torch.testing.assert_close(fused_attention(fusion.query(teacher), fusion.key(student), columns), expected)
    torch.testing.assert_close(fusion.summary(student, teacher, units, mean=False).projection, expected)


@pytest.mark.parametrize("channels", [5, 19, 150, 300])
def test_parts_at_every_width(channels):
    """Widths that are no multiple of 8, and values in one part or several; with units and without."""
    torch.manual_seed(2)
    fusion = CrossAttentionFusion(channels, query="student").double()
    student, teacher = torch.randn(2, channels, 3, 4).double(), torch.randn(2, channels, 2, 3).double()
    units, fused = torch.randn(19, channels).double(), fusion(student, teacher)
    fusion.path = "parts"
    found = fusion.summary(student, teacher, units, mean=True)
    torch.testing.assert_close(found.projection, torch.einsum("mc,nchw->nmhw", units, fused))
    torch.testing.assert_close(found.mean, fused.mean((2, 3), keepdim=True))
    alone = fusion.summary(student, teacher, None, mean=True)
    assert alone.projection is None
    torch.testing.assert_close(alone.mean, found.mean)


def test_the_map_of_the_parts_is_the_map(monkeypatch):
    """A GPU in half precision puts the map together from them."""
    monkeypatch.setattr(kernels, "NARROW", 8)
    fusion = CrossAttentionFusion(36)
    student, teacher = torch.randn(2, 36, 3, 4), torch.randn(2, 36, 3, 4)
    assert kernels.widths(18, 36) == (24, [24, 24])
    torch.testing.assert_close(fusion._map(teacher, student), fusion(student, teacher))


def test_columns_by_one_kernel():
    fusion = CrossAttentionFusion(24)
    student, teacher, units = torch.randn(2, 24, 3, 4), torch.randn(2, 24, 3, 4), torch.randn(6, 24)
    found = fusion._by_columns(teacher, student, units)
    torch.testing.assert_close(found.projection, torch.einsum("mc,nchw->nmhw", units, fusion(student, teacher)))
    assert found.mean is None
