"""Fusion: query source and key/value source, the projections, invariances, faults."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from acam_kd.core import FUSION_REGISTRY
from acam_kd.core.errors import ConfigError
from acam_kd.methods.acam.attention import fused_attention, materialized_attention
from acam_kd.methods.acam.fusion import CrossAttentionFusion, TeacherFusion


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


def stand_in(channels, device="cpu", dtype=torch.float32):
    """Make a stand-in for features on a device that need not be there."""
    device = torch.device(device)
    return SimpleNamespace(shape=(1, channels, 4, 4), device=device, dtype=dtype, is_cuda=device.type == "cuda")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (stand_in(256), True),
        (stand_in(64), True),
        (stand_in(19), False),  # the logits of Cityscapes
        (stand_in(256, dtype=torch.bfloat16), True),
        (stand_in(256, "cuda"), True),
        (stand_in(19, "cuda"), False),
        (stand_in(256, "cuda", torch.float16), False),
    ],
)
def test_where_the_summary_is_preferred(features, expected):
    """Without the mean it is preferred everywhere; with the mean in wide maps, but not in half precision on a GPU."""
    fusion = CrossAttentionFusion(4)
    assert fusion.summarizes(features, mean=True) == expected and fusion.summarizes(features, mean=False)
    fusion.path = "map"
    assert not fusion.summarizes(features, mean=True) and not fusion.summarizes(features, mean=False)


def test_an_unknown_path_is_refused():
    with pytest.raises(ConfigError) as error:
        CrossAttentionFusion(4).path = "materialised"
    assert error.value.argument == "path" and error.value.value == "materialised"
    assert error.value.allowed == "one of auto, map, summary, materialized"


def test_autocast_counts_as_half_precision(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cuda")
    assert not CrossAttentionFusion(4).summarizes(stand_in(256, "cuda"), mean=True)
    assert CrossAttentionFusion(4).summarizes(stand_in(256), mean=True)


def test_projections_of_the_map_are_attention_to_projected_values():
    """The identity m (A V) = A (V m) holds for the fused kernels too, which a GPU runs where no mean is wanted."""
    fusion = CrossAttentionFusion(6).double()
    student, teacher = torch.randn(2, 6, 4, 5).double(), torch.randn(2, 6, 4, 5).double()
    units = torch.randn(3, 6).double()
    columns = torch.einsum("mc,nchw->nmhw", units, fusion.value(student))
    expected = torch.einsum("mc,nchw->nmhw", units, fusion(student, teacher))
    torch.testing.assert_close(fused_attention(fusion.query(teacher), fusion.key(student), columns), expected)
    torch.testing.assert_close(fusion.summary(student, teacher, units, mean=False).projection, expected)
