"""ACAM-KD as a whole: values and gradients against the formulas, its named forms, former names, its state."""

from __future__ import annotations

import logging

import pytest
import torch

import acam_kd
from acam_kd.core import FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.core.renamed import _warn_once
from acam_kd.methods import ACAMKD
from acam_kd.methods.acam import ChannelMasking, CrossAttentionFusion, SpatialMasking
from acam_kd.methods.parts.losses import mask_diversity_loss, masked_mse

LEVEL = {"p3": FeatureSpec(8, 8)}
LITERAL = {"mask_gradient": "full", "diversity": "ratio"}


@pytest.fixture
def filled(official):
    """Return a maker of methods whose parameters are the waves of the reference figures."""

    def make(**arguments):
        method = ACAMKD(LEVEL, LEVEL, **arguments)
        fusion, masking = method.fusion["p3"], {kind: levels["p3"] for kind, levels in method.masking.items()}
        with torch.no_grad():
            for i, conv in enumerate((fusion.query, fusion.key, fusion.value)):
                conv.weight.copy_(official.wave(conv.weight.shape, 0.31, 0.17 * i, 0.5))
            masking["channel"].units.copy_(official.wave((6, 1), 0.31, 0.51, 0.5))
            masking["spatial"].units.copy_(official.wave((6, 8), 0.31, 0.68, 0.5))
        return method

    return make


def test_the_parts_have_their_reference_figures(official, filled):
    """The figures were computed from the formulas alone; there is no official code."""
    method = filled()
    fused = method.fusion["p3"](official.student, official.teacher)
    assert fused.double().sum().item() == pytest.approx(0.28181276, rel=1e-4)
    assert fused.abs().sum().item() == pytest.approx(60.085239, rel=1e-6)
    assert fused[0, 0, 0, 0].item() == pytest.approx(0.011166335, rel=1e-5)
    spatial, channel = (method.masking[kind]["p3"](fused) for kind in ("spatial", "channel"))
    assert channel.mean().item() == pytest.approx(0.50003046, rel=1e-6)
    assert spatial.mean().item() == pytest.approx(0.50003088, rel=1e-6)
    assert spatial[0, :3, 0, 0].tolist() == pytest.approx([0.50090516, 0.50509602, 0.49105385], rel=1e-6)
    errors = masked_mse(official.student, official.teacher, {"spatial": spatial, "channel": channel})
    assert errors["channel"].item() == pytest.approx(0.83414721, rel=1e-6)
    assert errors["spatial"].item() == pytest.approx(0.83410567, rel=1e-6)
    ones = {"spatial": torch.ones_like(spatial), "channel": torch.ones_like(channel)}
    for error in masked_mse(official.student, official.teacher, ones).values():
        assert error.item() == pytest.approx(1.6679301, rel=1e-6)
    assert [mask_diversity_loss(m).item() for m in (channel, spatial)] == pytest.approx(
        [0.99999940, 0.99989504], rel=1e-6
    )
    ratios = [mask_diversity_loss(m, "ratio").item() for m in (channel, spatial)]
    assert ratios == pytest.approx([4.9999971, 4.9994755], rel=1e-6)


@pytest.mark.parametrize("gradient", ["detached", "full"])
@pytest.mark.parametrize(
    ("diversity", "overlap"), [("pairwise", 0.99999940 + 0.99989504), ("ratio", 4.9999971 + 4.9994755)]
)
def test_the_losses_have_their_reference_figures(official, filled, gradient, diversity, overlap):
    """The mask gradient changes no value."""
    method = filled(alpha=2.0, lambda_div=0.5, mask_gradient=gradient, diversity=diversity)
    losses = method({"p3": official.student}, {"p3": official.teacher})
    expected = {"channel": 2 * 0.83414721, "spatial": 2 * 0.83410567, "diversity": overlap / 2}
    assert {name.rpartition("_")[2]: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-6)
    dice = {kind: method.metrics()[f"p3/{kind}_dice"].item() for kind in ("channel", "spatial")}
    assert dice == pytest.approx({"channel": 0.99999940, "spatial": 0.99989504}, rel=1e-6)  # whatever the form


def dense(method, student, teacher):
    """Compute the three losses as they are written, with A and the (N, M, C, H, W) tensor; masks may be detached."""
    fusion, masking = method.fusion["p3"], {kind: levels["p3"] for kind, levels in method.masking.items()}
    aligned = method.align["p3"](student)
    seen = aligned if method.mask_gradient == "full" else aligned.detach()
    q, k, v = (w.weight[:, :, 0, 0] @ x.flatten(2) for w, x in
               ((fusion.query, teacher), (fusion.key, seen), (fusion.value, seen)))  # fmt: skip
    attention = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(2)
    fused = (attention @ v.transpose(1, 2)).transpose(1, 2)  # (N, C, HW)
    channel = (masking["channel"].units * fused.mean(2)[:, None]).sigmoid()
    spatial = (masking["spatial"].units @ fused).sigmoid()
    difference = (teacher - aligned).flatten(2)[:, None]  # (N, 1, C, HW)
    losses = []
    for masks, broadcast, averaged in ((channel, channel[..., None], spatial.shape[2]),
                                       (spatial, spatial[:, :, None], channel.shape[2])):  # fmt: skip
        if method.mask_gradient != "full":
            masks, broadcast = masks.detach(), broadcast.detach()
        sums = (broadcast * difference).square().sum((2, 3))
        losses.append((sums / (averaged * (masks.sum(2) + 1e-6))).mean())
    overlaps = []
    for masks in (channel, spatial):
        inner = torch.einsum("nip,njp->nij", masks, masks)
        norms = inner.diagonal(dim1=1, dim2=2)
        others = 1 - torch.eye(masks.shape[1], dtype=masks.dtype)
        if method.diversity == "ratio":
            overlaps.append((2 * (inner * others).sum((1, 2)) / (2 * norms.sum(1))).mean())
        else:
            dice = 2 * inner / (norms[:, :, None] + norms[:, None])
            overlaps.append(((dice * others).sum((1, 2)) / others.sum()).mean())
    return {"loss_acam_channel": losses[0], "loss_acam_spatial": losses[1], "loss_acam_diversity": sum(overlaps)}


@pytest.mark.parametrize("gradient", ["detached", "full"])
@pytest.mark.parametrize("diversity", ["pairwise", "ratio"])
def test_values_and_gradients_are_those_of_the_formulas(official, filled, gradient, diversity):
    """Of every loss, to the student and to every parameter."""
    method = filled(mask_gradient=gradient, diversity=diversity).double()
    with torch.no_grad():  # so that masks, and with them gradients, differ
        for levels in method.masking.values():
            levels["p3"].units.mul_(8)
    student, teacher = official.student.double().requires_grad_(), official.teacher.double()
    found, expected = method({"p3": student}, {"p3": teacher}), dense(method, student, teacher)
    torch.testing.assert_close(found, expected, check_dtype=False)
    inputs = [student, *method.parameters()]
    for name in expected:
        got, wanted = (
            torch.autograd.grad(x[name], inputs, retain_graph=True, allow_unused=True) for x in (found, expected)
        )
        for a, b in zip(got, wanted):
            if b is None:  # another loss's alone; the errors of both kinds are made together
                assert a is None or not a.any()
            else:
                torch.testing.assert_close(a, b)
                assert a.abs().sum() > 0


@pytest.mark.parametrize("diversity", ["pairwise", "ratio"])
def test_losses_at_the_start(diversity):
    """Masks start at one half: every error is half the mean squared error, the ratio M - 1 for each kind of masks."""
    method = ACAMKD(LEVEL, LEVEL, mask_gradient="full", diversity=diversity)
    student, teacher = torch.randn(2, 8, 6, 7), torch.randn(2, 8, 6, 7)
    losses = method({"p3": student}, {"p3": teacher})
    half = (student - teacher).square().mean().item() / 2
    assert losses["loss_acam_spatial"].item() == pytest.approx(half, rel=0.05)
    assert losses["loss_acam_channel"].item() == pytest.approx(half, rel=0.05)
    assert losses["loss_acam_diversity"].item() == pytest.approx(2 if diversity == "pairwise" else 2 * 5, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "title"),
    [
        ({}, "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)"),
        ({"alpha": 3.0}, "ACAM-KD, ours (mask_gradient=detached, diversity=pairwise)"),
        (LITERAL, "ACAM-KD, literal (mask_gradient=full, diversity=ratio)"),
        ({"mask_gradient": "full"}, "ACAM-KD, mask_gradient=full, diversity=pairwise"),
        ({"diversity": "ratio"}, "ACAM-KD, mask_gradient=detached, diversity=ratio"),
        ({**LITERAL, "query": "student"}, "ACAM-KD, mask_gradient=full, diversity=ratio, query=student"),
        ({"num_masks": 3}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, num_masks=3"),
        ({"channel_masking": ""}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, channel_masking=none"),
        ({"standardize_fused": True}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, standardize_fused=True"),
        ({"max_positions": 9}, "ACAM-KD, mask_gradient=detached, diversity=pairwise, max_positions=9"),
        (
            {"spatial_masking": "UniformMasking", "channel_masking": ""},
            "ACAM-KD, mask_gradient=detached, diversity=pairwise, spatial_masking=UniformMasking, channel_masking=none, "
            "fusion=TeacherFusion",
        ),
    ],
)
def test_the_form_that_runs_has_a_name(arguments, title):
    assert ACAMKD(LEVEL, LEVEL, **arguments).title() == title


def test_a_subclass_is_not_called_by_the_names_of_our_forms():
    assert type("Mine", (ACAMKD,), {})(LEVEL, LEVEL).title() == "Mine"


@pytest.mark.parametrize(("options", "name"), [({}, "ours"), (LITERAL, "literal")])
def test_the_log_says_which_form_is_built(options, name, caplog):
    nets = [torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 2, 1)) for _ in "ab"]
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        levels = {"c": "0"}
        acam_kd.distill(*nets, method="ACAMKD", student_levels=levels, teacher_levels=levels, **options)
    assert [text for text in caplog.messages if f"ACAM-KD, {name} (" in text]


def test_former_names_are_read(caplog):
    _warn_once.cache_clear()
    method = ACAMKD(LEVEL, LEVEL, standardize=True, mask_gradient="paper")
    assert method.standardize_fused is True and method.mask_gradient == "full" and method.diversity == "pairwise"
    assert len(caplog.messages) == 2
    assert "ACAMKD.standardize is called ACAMKD.standardize_fused now" in caplog.messages[0]
    assert "ACAMKD.mask_gradient: paper is called full now" in caplog.messages[1]
    with pytest.raises(ConfigError) as error:
        ACAMKD(LEVEL, LEVEL, standardize=True, standardize_fused=False)
    assert error.value.argument == "ACAMKD.standardize_fused" and "ACAMKD.standardize" in error.value.hint


def test_parameters_have_the_names_that_checkpoints_know():
    assert list(ACAMKD(LEVEL, LEVEL).state_dict()) == [
        "align.p3.weight", "align.p3.bias", "masking.spatial.p3.units", "masking.channel.p3.units",
        "fusion.p3.query.weight", "fusion.p3.key.weight", "fusion.p3.value.weight",
    ]  # fmt: skip


def test_the_parts_can_be_used_alone():
    fusion, spatial, channel = (
        CrossAttentionFusion(8, query="teacher"),
        SpatialMasking(8, num_masks=3),
        ChannelMasking(num_masks=3),
    )
    assert all(isinstance(conv, torch.nn.Conv2d) for conv in (fusion.query, fusion.key, fusion.value))
    assert spatial.units.shape == (3, 8) and channel.units.shape == (3, 1)
    student, teacher = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5)
    fused = fusion(student, teacher)
    losses = masked_mse(student, teacher, {"spatial": spatial(fused), "channel": channel(fused)})
    assert set(losses) == {"spatial", "channel"} and all(loss.shape == () for loss in losses.values())
