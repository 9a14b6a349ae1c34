"""ACAM-KD as a whole: formulas, forms and their contract, gradients of the masks, figures and warnings, its state."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import FeatureSpec
from acam_kd.methods import ACAMKD, Mimic
from acam_kd.methods.acam import ChannelMasking, CrossAttentionFusion, SpatialMasking
from acam_kd.methods.parts.losses import mask_diversity_loss, masked_mse, mse

from ...contract import check_contract, features, fields, pyramid

LEVEL = {"p3": FeatureSpec(8, 8)}
LITERAL = {"mask_gradient": "full", "diversity": "ratio"}
VARIANTS = {
    "default": {},
    "full": {"mask_gradient": "full"},
    "standardised": {"standardize_fused": True},
    "spatial": {"channel_masking": ""},
    "channel": {"spatial_masking": ""},
    "channel standardised": {"spatial_masking": "", "standardize_fused": True},
    "uniform": {"spatial_masking": "UniformMasking", "channel_masking": ""},
    "teacher": {"fusion": "TeacherFusion"},
    "student query": {"query": "student"},
    "one mask": {"num_masks": 1},
    "literal": LITERAL,
    "detached, ratio": {"diversity": "ratio"},
    "decorrelated": {"diversity": "decorrelated"},
    "reversed": {"mask_gradient": "reversed"},
    "no diversity": {"lambda_div": 0.0},
    "frozen": {"mask_gradient": "frozen"},
    "keys pooled": {"max_positions": 20},
    "all pooled": {"max_positions": 20, "pooling": "all"},
}


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
    """Each loss is compared, and its gradients to the student and to every parameter."""
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
    """Masks start at one half: every error is half the mean squared error, the ratio M - 1 for each kind of masks.

    Both errors together are then as strong as plain mimicking. Everything is a sum over two levels.
    """
    method = ACAMKD(pyramid(8), pyramid(8), diversity=diversity)
    student, teacher = features(8), features(8)
    losses = method(student, teacher)
    half = sum(mse(student[level], teacher[level]) for level in student).item() / 2
    assert losses["loss_acam_spatial"].item() == pytest.approx(half, rel=0.05)
    assert losses["loss_acam_channel"].item() == pytest.approx(half, rel=0.05)
    assert losses["loss_acam_diversity"].item() == pytest.approx(4 if diversity == "pairwise" else 4 * 5, rel=0.01)


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_keep_the_contract(variant):
    check_contract(ACAMKD(pyramid(8), pyramid(12), **VARIANTS[variant]), features(8, grad=True), features(12))


@pytest.mark.parametrize(("chosen", "features", "logits"), [(0, 6, 19), (3, 3, 3)])
def test_there_are_as_many_masks_as_classes_on_logits(chosen, features, logits):
    levels = {"p3": FeatureSpec(8, 8), "logits": FeatureSpec(19, 8, logits=True)}
    method = ACAMKD(levels, levels, num_masks=chosen)
    maps = {"p3": torch.randn(1, 8, 2, 3), "logits": torch.randn(1, 19, 2, 3)}
    method(maps, maps)
    masks = method.masks()
    assert masks["p3"]["spatial"].shape == (1, features, 2, 3) and masks["p3"]["channel"].shape == (1, features, 8)
    assert masks["logits"]["spatial"].shape == (1, logits, 2, 3)
    assert masks["logits"]["channel"].shape == (1, logits, 19)


def test_uniform_masks_are_plain_mimicking():
    uniform = ACAMKD(pyramid(8), pyramid(8), alpha=3.0, **VARIANTS["uniform"])
    student, teacher = features(8), features(8)
    expected = Mimic(pyramid(8), pyramid(8), alpha=3.0)(student, teacher)["loss_mimic_mse"]
    torch.testing.assert_close(uniform(student, teacher), {"loss_acam_spatial": expected})


def test_detached_masks_are_trained_by_diversity_alone():
    method = ACAMKD(pyramid(8), pyramid(8))
    student = features(8, grad=True)
    losses = method(student, features(8))
    (losses["loss_acam_spatial"] + losses["loss_acam_channel"]).backward(retain_graph=True)
    mask_parameters = [p for n, p in method.named_parameters() if not n.startswith("align")]
    assert mask_parameters and all(p.grad is None for p in mask_parameters)
    before = [f.grad.clone() for f in student.values()]
    losses["loss_acam_diversity"].backward()
    assert all(p.grad is not None for p in mask_parameters)
    assert all(torch.equal(f.grad, g) for f, g in zip(student.values(), before))


def test_masks_with_the_full_gradient_are_trained_by_everything():
    method = ACAMKD(pyramid(8), pyramid(8), mask_gradient="full")
    losses = method(features(8), features(8))
    (losses["loss_acam_spatial"] + losses["loss_acam_channel"]).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_reversed_masks_are_trained_towards_large_errors():
    """The student gets the gradient of detached masks, the masks the negative of the error's."""
    student, teacher = features(8, grad=True), features(8)
    gradients = {}
    for form in ("detached", "full", "reversed"):
        torch.manual_seed(0)
        method = ACAMKD(pyramid(8), pyramid(8), mask_gradient=form, fusion="TeacherFusion")
        losses = method(student, teacher)
        units = [p for n, p in method.named_parameters() if n.startswith("masking")]
        gradients[form] = torch.autograd.grad(
            losses["loss_acam_spatial"] + losses["loss_acam_channel"], [*student.values(), *units], allow_unused=True
        )
    maps = len(student)
    torch.testing.assert_close(gradients["reversed"][:maps], gradients["detached"][:maps])
    torch.testing.assert_close(gradients["reversed"][maps:], tuple(-g for g in gradients["full"][maps:]))
    assert gradients["detached"][maps:] == (None,) * len(units) and all(g.any() for g in gradients["full"][maps:])
    assert method.auxiliary == ("loss_acam_diversity",)


def test_frozen_masks_are_trained_by_nothing():
    method = ACAMKD(pyramid(8), pyramid(8), mask_gradient="frozen")
    losses = method(features(8, grad=True), features(8))
    assert set(losses) == {"loss_acam_spatial", "loss_acam_channel"}
    assert {n.split(".")[0] for n, p in method.named_parameters() if p.requires_grad} == {"align"}


def test_standardised_masks_do_not_depend_on_the_scale_of_the_features():
    method = ACAMKD(pyramid(8), pyramid(8), standardize_fused=True, fusion="TeacherFusion")
    student, teacher = features(8), features(8)
    metrics = []
    for scale in (1.0, 50.0):
        method({k: v * scale for k, v in student.items()}, {k: v * scale for k, v in teacher.items()})
        metrics.append({k: v for k, v in method.metrics().items() if k.endswith(("mean", "std", "dice"))})
    torch.testing.assert_close(metrics[0], metrics[1], rtol=1e-4, atol=1e-5)
    assert metrics[0]["p3/spatial_std"] > 1e-3 and metrics[0]["p3/channel_std"] > 1e-4


def test_metrics_are_those_of_the_masks():
    method = ACAMKD(pyramid(8), pyramid(8), **{**VARIANTS["uniform"], "channel_masking": "ChannelMasking"})
    method(features(8), features(8))
    metrics = method.metrics()
    assert metrics["p3/spatial_mean"] == 1 and metrics["p3/spatial_std"] == 0
    assert metrics["p3/spatial_min_sum"] == 6 * 7 and metrics["p3/spatial_dice"].item() == pytest.approx(1)
    assert 0.45 < metrics["p4/channel_mean"] < 0.55 and metrics["p4/channel_min_sum"] < 8


def test_a_collapse_is_reported_with_level_and_argument():
    method = ACAMKD(pyramid(8), pyramid(8), fusion="TeacherFusion", mask_gradient="full", channel_masking="")
    student = features(8, size=20)
    teacher = {level: torch.rand_like(v) + 1 for level, v in student.items()}
    method(student, teacher)
    assert method.warnings() == {}
    with torch.no_grad():
        method.masking["spatial"]["p3"].units[:3].fill_(-2.0)  # sigmoid(-16) and less
        teacher["p3"][0, :, 0, 0] = -1  # one position of 840 that is selected does not make a mask
    method(student, teacher)
    ((place, warning),) = method.warnings().items()
    assert place == "p3/spatial" and "3 of 6 spatial masks of level p3" in warning
    assert "set {mask_gradient} to 'detached'" in warning
    method.mask_gradient = "detached"
    assert "set {standardize_fused} to True" in method.warnings()[place]
    method.standardize_fused = True
    assert "lower {lambda_div}" in method.warnings()[place] and fields(method.warnings()[place]) == {"lambda_div"}


def test_no_images_have_no_metrics():
    method = ACAMKD(pyramid(8), pyramid(8))
    losses = method(features(8, 0, grad=True), features(8, 0))
    assert sum(losses.values()) == 0 and method.metrics() == {}


def test_masks_of_another_size_are_refused():
    """A fusion from outside may give them; nothing is scaled that was not pooled."""
    method = ACAMKD(pyramid(8), pyramid(8))
    method.fusion["p3"] = torch.nn.Module()
    method.fusion["p3"].forward = lambda student, teacher: teacher[..., :3]
    with pytest.raises(ValueError, match="masks .* do not fit features"):
        method(features(8), features(8))
