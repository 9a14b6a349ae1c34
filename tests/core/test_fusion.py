"""Cross-attention fusion against a reference that materialises the attention, and its memory."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from acam_kd.core import FUSION_REGISTRY
from acam_kd.core.fusion import CrossAttentionFusion, TeacherFusion, cross_attention


def attend(q, k, v):
    """softmax(Q^T K / sqrt(E)) V with the matrix written out."""
    rows = torch.einsum("neq,nek->nqk", q.flatten(2), k.flatten(2)) / q.shape[1] ** 0.5
    return torch.einsum("nqk,nck->ncq", rows.softmax(2), v.flatten(2)).unflatten(2, q.shape[2:])


@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (5, 5), (1, 3)])
@pytest.mark.parametrize("sizes", [((3, 5), (3, 5)), ((2, 2), (4, 3)), ((1, 1), (1, 1))])
def test_equals_the_materialised_attention(widths, sizes):
    (e, c), (hq, hk) = widths, sizes
    q, k, v = torch.randn(2, e, *hq), torch.randn(2, e, *hk), torch.randn(2, c, *hk)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    out, expected = cross_attention(q, k, v), attend(q, k, v)
    assert out.shape == (2, c, *hq)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), weight), torch.autograd.grad(expected, (q, k, v), weight)):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("query", ["teacher", "student"])
def test_who_asks(query):
    fusion = CrossAttentionFusion(6, query=query).double()
    student, teacher = torch.randn(2, 6, 4, 4).double(), torch.randn(2, 6, 4, 4).double()
    asks, answers = (teacher, student) if query == "teacher" else (student, teacher)
    expected = attend(fusion.query(asks), fusion.key(answers), fusion.value(answers))
    torch.testing.assert_close(fusion(student, teacher), expected)


def test_projections_are_those_of_the_paper():
    fusion = CrossAttentionFusion(8)
    assert {name: tuple(p.shape) for name, p in fusion.named_parameters()} == {
        "query.weight": (4, 8, 1, 1),
        "key.weight": (4, 8, 1, 1),
        "value.weight": (8, 8, 1, 1),
    }


def test_order_of_the_answering_positions_does_not_matter():
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
    with pytest.raises(ValueError, match="TeacherFusion"):
        TeacherFusion(4, query="student")


def test_bad_names_are_named():
    with pytest.raises(ValueError, match="'teacher' or 'student', not 'both'"):
        CrossAttentionFusion(4, query="both")
    with pytest.raises(KeyError, match="Nothing.*CrossAttentionFusion, TeacherFusion"):
        FUSION_REGISTRY.get("Nothing")


MEMORY = """
import resource, torch
from acam_kd.core.fusion import CrossAttentionFusion
torch.manual_seed(0)
fusion = CrossAttentionFusion(256)
student, teacher = torch.randn(1, 256, 100, 168, requires_grad=True), torch.randn(1, 256, 100, 168)
fusion(student[..., :8, :8], teacher[..., :8, :8]).sum().backward()  # what the first call of anything costs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fusion(student, teacher).square().mean().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""


@pytest.mark.slow
def test_attention_at_real_resolution_is_not_materialised():
    """100 x 168 positions, C = 256, forward and backward: under 0.6 GiB more (the matrix alone is 1.05 GiB)."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.6


def test_attention_allocates_no_positions_squared(sizes):
    """The same at a small size, by the sizes of all tensors that operators return, forward and backward."""
    positions = 24 * 24
    fusion = CrossAttentionFusion(16)
    student, teacher = torch.randn(1, 16, 24, 24, requires_grad=True), torch.randn(1, 16, 24, 24)

    with sizes:
        fusion(student, teacher).sum().backward()
    assert sizes.seen and max(sizes.seen) < positions**2 / 10
