"""The common parts of KD, DKD and NKD: the shapes of maps and heads, labels, faults, memory."""

from __future__ import annotations

import pytest
import torch

from acam_kd.core import DISTILLER_REGISTRY, IGNORED, FeatureSpec, Targets
from acam_kd.core.errors import ConfigError
from acam_kd.methods.parts.logits import kl_divergence, labelled_positions, softened, without_target

NAMES = ["KD", "DKD", "NKD"]
K = 5
SPECS = {
    "map": ("logits", FeatureSpec(K, 8, logits=True), (2, K, 5, 7), K),
    "odd map": ("logits", FeatureSpec(K, 4, logits=True), (1, K, 1, 3), K),
    "regions": ("classes", FeatureSpec(K, 0, logits=True), (9, K, 1, 1), K),
    "anchors": ("classes", FeatureSpec(K, 0, logits=True, sigmoid=True), (2, K, 31, 1), K + 1),
    "no images": ("logits", FeatureSpec(K, 8, logits=True), (0, K, 5, 7), K),
    "no regions": ("classes", FeatureSpec(K, 0, logits=True), (0, K, 1, 1), K),
    "no anchors": ("classes", FeatureSpec(K, 0, logits=True, sigmoid=True), (0, K, 31, 1), K + 1),
}
EMPTY = [kind for kind in SPECS if kind.startswith("no ")]


def batch(kind, dtype=torch.float32):
    """Return the method's pyramid, a student with a graph, a teacher, targets; some positions are ignored."""
    level, spec, shape, values = SPECS[kind]
    draw = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(shape, generator=draw) for _ in range(2))
    labels = torch.randint(IGNORED, values, (shape[0], *shape[2:]), generator=draw)
    student = student.to(dtype).requires_grad_()
    return {level: spec}, {level: student}, {level: teacher.to(dtype)}, Targets(labels={level: labels})


def build(name, pyramid, **arguments):
    return DISTILLER_REGISTRY.get(name)(pyramid, pyramid, **arguments)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", SPECS)
def test_contract(name, kind):
    pyramid, student, teacher, targets = batch(kind)
    (level,) = pyramid
    teacher[level].requires_grad_()
    method = build(name, pyramid)
    losses = method(student, teacher, targets)
    assert all(key.startswith(f"loss_{name.lower()}_") for key in losses)
    assert all(x.shape == () and x.dtype == torch.float32 and x.isfinite() and x >= 0 for x in losses.values())
    sum(losses.values()).backward()
    assert teacher[level].grad is None
    assert student[level].grad.isfinite().all()
    if kind in EMPTY:
        assert sum(losses.values()) == 0
    else:
        assert student[level].grad.abs().sum() > 0
    metrics = method.metrics()
    assert (f"{level}/agreement" in metrics) == (kind not in EMPTY)
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["map", "regions", "anchors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, kind, dtype):
    pyramid, student, teacher, targets = batch(kind, dtype)
    method = build(name, pyramid, temperature=2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = method(student, teacher, targets)
    assert all(x.dtype == torch.float32 for x in losses.values())
    expected = method(*({k: v.detach().float() for k, v in x.items()} for x in (student, teacher)), targets)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_two_levels_are_added(name):
    one, student, teacher, targets = batch("map")
    method = build(name, {"logits": one["logits"], "aux": one["logits"]})

    def twice(x):
        return {"logits": x["logits"], "aux": x["logits"]}

    both = method(twice(student), twice(teacher), Targets(labels=twice(targets.labels)))
    alone = build(name, one)(student, teacher, targets)
    torch.testing.assert_close(both, {key: 2 * value for key, value in alone.items()})
    assert {"logits/agreement", "aux/agreement"} <= method.metrics().keys()


@pytest.mark.parametrize("name", ["DKD", "NKD"])
@pytest.mark.parametrize("kind", ["map", "regions", "anchors"])
def test_only_positions_with_a_class_count(name, kind):
    """Ignored ones and the background of a sigmoid head change nothing, and get no gradient."""
    pyramid, student, teacher, targets = batch(kind)
    (level,) = pyramid
    method = build(name, pyramid)
    losses = method(student, teacher, targets)
    sum(losses.values()).backward()
    labels = targets.labels[level]
    out = ((labels == IGNORED) | (labels == K)).unsqueeze(1)
    assert out.any() and not out.all()
    changed = method({level: torch.where(out, 50.0, student[level].detach())}, teacher, targets)
    torch.testing.assert_close(changed, losses)
    assert (student[level].grad.abs().sum(1, keepdim=True) == 0).equal(out)
    assert method.metrics()[f"{level}/positions"] == (~out).sum()


@pytest.mark.parametrize("name", ["DKD", "NKD"])
@pytest.mark.parametrize(("kind", "label"), [("map", IGNORED), ("anchors", IGNORED), ("anchors", K)])
def test_without_a_labelled_position_the_loss_is_zero_with_a_graph(name, kind, label):
    pyramid, student, teacher, targets = batch(kind)
    (level,) = pyramid
    nothing = Targets(labels={level: torch.full_like(targets.labels[level], label)})
    method = build(name, pyramid)
    loss = sum(method(student, teacher, nothing).values())
    loss.backward()
    assert loss == 0 and torch.equal(student[level].grad, torch.zeros_like(student[level]))
    assert method.metrics() == {f"{level}/positions": 0}


@pytest.mark.parametrize("name", ["DKD", "NKD"])
def test_the_background_of_regions_is_a_class(name):
    pyramid, student, teacher, _ = batch("regions")
    background = Targets(labels={"classes": torch.full((9, 1, 1), K - 1)})
    assert sum(build(name, pyramid)(student, teacher, background).values()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_agreement(name):
    level, spec = "logits", FeatureSpec(2, 8, logits=True)
    teacher = torch.tensor([[[[3.0, 3.0, -3.0, -3.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    student = torch.tensor([[[[1.0, -1.0, -1.0, -1.0]], [[0.0, 0.0, 0.0, 0.0]]]])
    method = build(name, {level: spec})
    method({level: student}, {level: teacher}, Targets(labels={level: torch.zeros(1, 1, 4).long()}))
    assert method.metrics()[f"{level}/agreement"] == 0.75


def test_kd_agreement_on_anchors_is_weighted_by_the_teacher():
    level, spec = "classes", FeatureSpec(2, 0, logits=True, sigmoid=True)
    teacher = torch.tensor([[[[2.0], [-20.0], [-20.0]], [[-2.0], [-30.0], [-30.0]]]])
    student = torch.tensor([[[[2.0], [-9.0], [-9.0]], [[-2.0], [-8.0], [-8.0]]]])
    method = build("KD", {level: spec})
    method({level: student}, {level: teacher})
    assert method.metrics()[f"{level}/agreement"].item() == pytest.approx(1, abs=1e-6)
    method({level: student.flip(1)}, {level: teacher})
    assert method.metrics()[f"{level}/agreement"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", ["DKD", "NKD"])
def test_missing_labels_are_named(name):
    pyramid, student, teacher, targets = batch("map")
    other = Targets(labels={"classes": targets.labels["logits"]})
    for known, value in ((Targets(), "labels for no level"), (other, "labels for classes")):
        with pytest.raises(ConfigError) as error:
            build(name, pyramid)(student, teacher, known)
        assert error.value.argument == "targets" and error.value.value == value
        assert error.value.allowed == "the label of every position of logits"
        assert name in error.value.hint and "{targets}" in error.value.hint


@pytest.mark.parametrize("name", ["DKD", "NKD"])
def test_labels_that_do_not_fit_are_named(name):
    pyramid, student, teacher, targets = batch("map")
    wrong = Targets(labels={"logits": targets.labels["logits"][:, :-1]})
    with pytest.raises(ConfigError) as error:
        build(name, pyramid)(student, teacher, wrong)
    assert error.value.argument == "targets" and error.value.value == "labels (2, 4, 7) for logits"
    assert error.value.allowed.startswith("(2, 5, 7)")


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_do_not_fit_are_named(name):
    pyramid, student, teacher, targets = batch("map")
    with pytest.raises(ValueError, match=r"teacher \(2, 5, 5, 6\)"):
        build(name, pyramid)(student, {"logits": teacher["logits"][..., :-1]}, targets)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_bad_temperatures_are_named(name, temperature):
    with pytest.raises(ConfigError) as error:
        build(name, batch("map")[0], temperature=temperature)
    assert error.value.argument == "temperature" and error.value.value is temperature
    assert error.value.allowed == "> 0 and finite"


@pytest.mark.parametrize(("name", "argument"), [("KD", "alpha"), ("DKD", "alpha"), ("DKD", "beta"), ("NKD", "gamma")])
def test_bad_weights_are_named(name, argument):
    with pytest.raises(ConfigError) as error:
        build(name, batch("map")[0], **{argument: -1.0})
    assert (error.value.argument, error.value.value, error.value.allowed) == (argument, -1, ">= 0 and finite")


@pytest.mark.parametrize("name", ["DKD", "NKD"])
def test_one_class_is_refused_where_a_softmax_needs_several(name):
    one = {"classes": FeatureSpec(1, 0, logits=True, sigmoid=True)}
    with pytest.raises(ConfigError) as error:
        build(name, one)
    assert error.value.argument == "levels" and error.value.value == "classes with 1 class"
    assert f"{name} tells a class from the others; set {{method}} to KD, which works" in error.value.hint


def test_without_target_keeps_the_others():
    logits = torch.arange(12.0).reshape(3, 4).requires_grad_()
    others = without_target(logits, torch.tensor([0, 2, 3]))
    assert [sorted(row) for row in others.tolist()] == [[1, 2, 3], [4, 5, 7], [8, 9, 10]]
    others.sum().backward()
    assert logits.grad.tolist() == [[0, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]


def test_kl_divergence_by_hand():
    teacher = torch.tensor([[0.75, 0.25]]).log()
    student = torch.tensor([[0.5, 0.5]]).log()
    expected = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    torch.testing.assert_close(kl_divergence(student + 3, teacher - 100), expected[None], rtol=1e-4, atol=0)


def test_labelled_positions_keep_rows_together():
    pyramid, student, teacher, targets = batch("map")
    selected = labelled_positions(student, teacher, targets, method="DKD")["logits"]
    n, h, w = (targets.labels["logits"] >= 0).nonzero()[3].tolist()
    assert torch.equal(selected[0][3], student["logits"][n, :, h, w])
    assert torch.equal(selected[1][3], teacher["logits"][n, :, h, w])
    assert selected[2][3] == targets.labels["logits"][n, h, w]


def test_no_copy_at_temperature_one():
    x = torch.randn(2, 3)
    assert softened(x, 1.0) is x
    torch.testing.assert_close(softened(x, 2.0), x / 2)


@pytest.mark.parametrize(("name", "maps"), [("KD", 2), ("DKD", 4), ("NKD", 3)])
def test_memory_kept_for_the_backward_pass(name, maps):
    """The unit is a map of logits; the classes of a position are never compared pairwise."""
    k, h, w = 19, 32, 64
    spec = {"logits": FeatureSpec(k, 8, logits=True)}
    student, teacher = torch.randn(1, k, h, w, requires_grad=True), torch.randn(1, k, h, w)
    labels = Targets(labels={"logits": torch.randint(0, k, (1, h, w))})
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses = build(name, spec)({"logits": student}, {"logits": teacher}, labels)
    kept.pop(student.untyped_storage().data_ptr(), None)
    size = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert losses and size <= (maps + 0.5) * 4 * k * h * w
