"""The learning of tokens: the parts that are trained, those that stay as they are, and the trace that is left: none."""

from __future__ import annotations

import copy
import logging
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import acam_kd
from acam_kd.core import LOGITS, FeatureSpec
from acam_kd.core.errors import ConfigError, RunError
from acam_kd.methods.parts.token_files import build_tokens, save_tokens
from acam_kd.methods.parts.token_learning import TokenLearning, learn_tokens
from acam_kd.methods.parts.token_runs import TokenFile, ensure_tokens

LEVELS = {"p3": FeatureSpec(8, 2), "p4": FeatureSpec(8, 4)}


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.next = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.SyncBatchNorm(8), nn.InstanceNorm2d(8))

    def forward(self, x):
        p3 = self.stem(x)
        return OrderedDict(p3=p3, p4=self.next(p3))


class Detector(nn.Module):
    """Returns losses in training only, as real ones."""

    def __init__(self):
        super().__init__()
        self.backbone = Backbone()
        self.head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Dropout2d(0.3))
        self.predictor = nn.Conv2d(4, 5, 1)

    def forward(self, x):
        maps = [self.predictor(self.head(f)) for f in self.backbone(x).values()]
        if not self.training:
            return maps
        return {"loss_a": maps[0].square().mean(), "loss_b": maps[1].square().mean()}


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Detector()


@pytest.fixture
def batch():
    return torch.randn(2, 3, 14, 18, generator=torch.Generator().manual_seed(3))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.mark.parametrize("method", ["MasKD", "FreeKD"])
def test_only_tokens_learn_and_the_teacher_stays_bit_for_bit(method, detector, batch):
    before, out = copy.deepcopy(detector.state_dict()), detector.eval()(batch)
    learning = TokenLearning(detector, build_tokens(method, LEVELS))
    start = copy.deepcopy(learning.state_dict())
    learn_tokens(learning, [(batch,)] * 3, iterations=3)
    assert equal(detector.state_dict(), before)
    assert all(p.grad is None for p in detector.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in learning.named_parameters() if "bias" not in n)
    assert start.keys() == learning.state_dict().keys() and all(
        not torch.equal(v, start[k]) for k, v in learning.state_dict().items()
    )
    after = detector.eval()(batch)  # no hook is left on it
    assert all(torch.equal(a, b) for a, b in zip(out, after))


def test_the_teacher_is_in_no_parameters_and_no_state_and_moves_along(detector):
    learning = TokenLearning(detector, build_tokens("MasKD", LEVELS))
    assert all(name.startswith("tokens.p") for name in learning.state_dict())
    assert all(name.startswith("tokens.p") for name, _ in learning.named_parameters())
    learning.double()
    assert next(detector.parameters()).dtype == torch.float64


def test_everything_trains_but_normalisation_and_dropout(detector, batch):
    learning = TokenLearning(detector.eval(), build_tokens("MasKD", LEVELS))
    still = {type(m).__name__ for m in detector.modules() if not m.training}
    assert still == {"BatchNorm2d", "SyncBatchNorm", "InstanceNorm2d", "Dropout", "Dropout2d"}
    assert detector.training and detector.backbone.training
    first, second = learning(batch), learning(batch)  # nothing is drawn
    assert equal(first, second)
    assert not learning.eval().teacher.training


def test_the_rest_of_the_teacher_sees_what_the_tokens_select(detector, batch):
    tokens = build_tokens("MasKD", LEVELS)
    learning = TokenLearning(detector, tokens)
    losses = learning(batch)
    maps = detector.backbone(batch)
    replaced, overlaps = zip(*(tokens[k].replace(v) for k, v in maps.items()))
    expected = [detector.predictor(detector.head(x)).square().mean() for x in replaced]
    torch.testing.assert_close([losses["loss_a"], losses["loss_b"]], expected)
    torch.testing.assert_close(losses["loss_tokens_diversity"], overlaps[0] + overlaps[1])


def test_levels_without_tokens_stay(detector, batch):
    losses = TokenLearning(detector, build_tokens("MasKD", {"p4": LEVELS["p4"]}))(batch)
    expected = detector.predictor(detector.head(detector.backbone(batch)["p3"])).square().mean()
    torch.testing.assert_close(losses["loss_a"], expected)


def test_logits_are_replaced_where_they_are_made(detector, batch):
    tokens = build_tokens("MasKD", {LOGITS: FeatureSpec(5, 2, logits=True)})
    detector.backbone.forward = lambda x: OrderedDict(p3=detector.backbone.stem(x), p4=detector.backbone.stem(x))
    learning = TokenLearning(detector, tokens, logits=detector.predictor)
    losses = learning(batch)
    logits = detector.predictor(detector.head(detector.backbone.stem(batch)))
    torch.testing.assert_close(losses["loss_a"], tokens[LOGITS].replace(logits)[0].square().mean())
    sum(losses.values()).backward()
    assert tokens[LOGITS].tokens.grad.abs().sum() > 0 and tokens[LOGITS].probability is None


def test_diversity_falls(detector, batch, caplog):
    learning = TokenLearning(detector, build_tokens("MasKD", LEVELS))
    with caplog.at_level(logging.INFO, logger="acam_kd"):
        logged = learn_tokens(learning, [(batch,)] * 120, iterations=120, learning_rate=0.05)
    found = [entry["loss_tokens_diversity"] for entry in logged]
    assert len(found) == 6 and found[-1] < 0.9 * found[0]
    assert "step 20/120  loss" in caplog.text and "diversity" in caplog.text


def test_faults_are_named(detector, batch):
    with pytest.raises(ConfigError) as error:
        TokenLearning(nn.Conv2d(1, 1, 1), {})
    assert error.value.argument == "teacher"
    assert error.value.value == "Conv2d, which has no module called `backbone`"
    with pytest.raises(ValueError, match="tokens for a logit map need the module"):
        TokenLearning(detector, build_tokens("MasKD", {LOGITS: FeatureSpec(5, 2, logits=True)}))
    with pytest.raises(RunError) as stopped:
        TokenLearning(detector, build_tokens("MasKD", {"p9": LEVELS["p3"]}))(batch)
    assert "no map for p9" in stopped.value.what
    with pytest.raises(ConfigError) as error:
        learn_tokens(TokenLearning(detector, build_tokens("MasKD", LEVELS)), [(batch,)], learning_rate=0.0)
    assert error.value.argument == "learning_rate" and error.value.value == 0
    assert error.value.allowed == "> 0 and finite"
    with pytest.raises(RunError) as stopped:
        learn_tokens(TokenLearning(detector, build_tokens("MasKD", LEVELS)), [(batch * float("nan"),)], iterations=1)
    assert (
        stopped.value.where == "iteration 1 of learning tokens"
        and "loss is not finite: loss_a = nan" in stopped.value.what
    )
    assert stopped.value.remedy.startswith("check the teacher and its data")


# The file, and the run that needs it


def draws():
    return random.random(), np.random.rand(), torch.rand(2).tolist()


def test_a_file_is_learnt_from_fixed_seeds_and_leaves_no_trace(detector, batch, tmp_path):
    detector.predictor.requires_grad_(False)
    detector.eval().head.train()
    flags = [p.requires_grad for p in detector.parameters()], [m.training for m in detector.modules()]
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draws()
    for seed, name in ((5, "a"), (6, "b")):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        acam_kd.learn_tokens(detector, [(batch,)] * 2, str(tmp_path / name), iterations=2, num_tokens=3)
        assert seed != 5 or draws() == expected
    assert flags == ([p.requires_grad for p in detector.parameters()], [m.training for m in detector.modules()])
    a, b = (torch.load(tmp_path / name, weights_only=True)["levels"] for name in "ab")
    assert list(a) == ["p3", "p4"] and all(equal(a[level]["state"], b[level]["state"]) for level in a)
    with pytest.raises(RunError) as error:
        acam_kd.learn_tokens(detector, [(batch,)], str(tmp_path / "a" / "x"), iterations=1)
    assert error.value.what.startswith("the learnt tokens cannot be written (")


@pytest.fixture
def ensure(tmp_path):
    """Ask for the tokens of methods; return the files, what was learnt, and the number of random draws that moved."""

    def ask(methods, *, teacher="t", first=True):
        learnt = []

        def learn(wanted):
            torch.rand(3)
            learnt.append(wanted)
            save_tokens(wanted.path, wanted.method, build_tokens(wanted.method, LEVELS), LEVELS, teacher=wanted.teacher)

        log = logging.getLogger("acam_kd")
        return ensure_tokens(methods, tmp_path, learn, teacher=lambda: teacher, first=first, log=log), learnt

    return ask


def test_a_run_learns_what_has_no_file(ensure, tmp_path):
    other = str(tmp_path / "new" / "other.pth")
    methods = {"PKD": {}, "MasKD": {"num_tokens": 4, "tokens": ""}, "FreeKD": {"tokens": other, "token_iterations": 7}}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    files, learnt = ensure(methods)
    assert torch.equal(torch.rand(2), expected)
    own = str(tmp_path / "tokens_maskd.pth")
    assert files == {"MasKD": own, "FreeKD": other}
    assert learnt == [TokenFile(own, "MasKD", 4, 2000, teacher="t"), TokenFile(other, "FreeKD", 0, 7, teacher="t")]
    assert ensure(methods, first=False) == (files, [])
    assert ensure({"PKD": {}}) == ({}, [])


def test_files_of_another_teacher_or_method_are_refused(ensure, tmp_path):
    files, _ = ensure({"MasKD": {}})
    for method, teacher, value in (
        ("MasKD", "other", "learnt on a teacher with other weights"),
        ("FreeKD", "t", "MasKD"),
    ):
        with pytest.raises(ConfigError) as error:
            ensure({method: {"tokens": files["MasKD"]}}, teacher=teacher)
        assert error.value.argument == f"{method}.tokens" and value in error.value.value
    assert ensure({"MasKD": {}}, teacher="")[1] == []  # an unknown teacher is refused where it is loaded
    save_tokens(files["MasKD"], "MasKD", build_tokens("MasKD", LEVELS), LEVELS)  # as a file of version 0.1
    assert ensure({"MasKD": {}})[1] == []
    with pytest.raises(ConfigError) as error:
        ensure({"MasKD": {"token_iterations": 0}})
    assert str(error.value) == "MasKD.token_iterations: found 0, expected >= 1"
