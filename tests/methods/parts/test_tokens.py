"""The Haar transform, the tokens of both methods, and the file that carries them from one stage to the next."""

from __future__ import annotations

import math
import os

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from acam_kd.core import LOGITS, FeatureSpec
from acam_kd.core.errors import ConfigError
from acam_kd.methods import FreeKD, MasKD
from acam_kd.methods.parts.token_files import build_tokens, load_tokens, save_tokens
from acam_kd.methods.parts.tokens import FrequencyPrompts, ReceptiveTokens, token_masks
from acam_kd.methods.parts.wavelets import haar, haar_levels, inverse_haar, inverse_haar_levels

# The wavelets


@pytest.fixture
def wide(official):
    """The maps of FreeKD's figures."""
    student = official.wave((2, 8, 16, 24), 0.37, 0.1)
    return student, official.wave((2, 8, 16, 24), 0.53, 0.7, 1.5, 0.2)


def energy(low, highs):
    return low.square().sum() + sum(high.square().sum() for high in highs)


def test_haar_of_one_block_by_hand():
    low, high = haar(torch.tensor([[[[1.0, 2.0], [3.0, 5.0]]]]))
    assert low.flatten().tolist() == [5.5] and high.flatten().tolist() == [-2.5, -1.5, 0.5]


def test_official_shapes_and_energy(wide):
    low, highs = haar_levels(wide[1], 3)
    assert low.shape == (2, 8, 2, 3)
    assert [h.shape for h in highs] == [(2, 8, 3, 8, 12), (2, 8, 3, 4, 6), (2, 8, 3, 2, 3)]
    torch.testing.assert_close(energy(low, highs), torch.tensor(7161.12), rtol=1e-4, atol=0)
    torch.testing.assert_close(energy(low, highs), wide[1].square().sum())


@pytest.mark.parametrize("size", [(16, 24), (7, 10), (1, 1), (13, 2)])
def test_the_inverse_gives_the_map_back_also_of_odd_sides(size):
    x = torch.randn(2, 3, *size)
    low, high = haar(x)
    assert low.shape[2:] == tuple(math.ceil(side / 2) for side in size)
    torch.testing.assert_close(inverse_haar(low, high, size), x)
    low, highs = haar_levels(x, 3)
    torch.testing.assert_close(inverse_haar_levels(low, highs, size), x)
    torch.testing.assert_close(energy(low, highs), x.square().sum())


# The tokens


def receptive(official, num_tokens, probability=True):
    module = ReceptiveTokens(8, num_tokens=num_tokens, probability=probability)
    official.fill(module.parameters(), 0.2)
    return module


def prompts(official):
    module = FrequencyPrompts(8, num_tokens=3)
    with torch.no_grad():
        module.tokens.copy_(official.wave((4, 3, 8), 0.31, 0, 0.2))
    return module


def test_official_probabilities_and_overlaps(official, wide):
    module = receptive(official, 3)
    expected = torch.tensor([0.3795623, 0.2677679, 0.3526699])
    torch.testing.assert_close(module.weights(official.teacher)[0], expected, rtol=official.rtol, atol=0)
    assert module.replace(official.teacher)[1].item() == pytest.approx(0.82159585, rel=official.rtol)
    on_logits = receptive(official, 4, probability=False)
    assert on_logits.replace(official.teacher)[1].item() == pytest.approx(0.84731323, rel=official.rtol)
    replaced, overlap = prompts(official).replace(wide[1])
    assert overlap.item() == pytest.approx(3.4702241, rel=official.rtol)
    assert replaced.mean().item() == pytest.approx(0.31325564, rel=official.rtol)


def test_masks_are_sigmoids_of_products():
    tokens, x = torch.randn(2, 3), torch.randn(1, 3, 2, 2)
    masks = token_masks(x, tokens)
    for t in range(2):
        for i in range(2):
            torch.testing.assert_close(masks[0, t, i, 1], (tokens[t] @ x[0, :, i, 1]).sigmoid())


def test_replaced_map_is_the_weighted_sum_of_masked_maps(official):
    module, x = receptive(official, 3), official.teacher
    masks, p = module(x), module.weights(x)
    assert masks.shape == (2, 3, 6, 10) and masks.min() > 0 and masks.max() < 1
    expected = sum(p[:, t, None, None, None] * masks[:, t, None] * x for t in range(3))
    torch.testing.assert_close(module.replace(x)[0], expected)
    plain = receptive(official, 3, probability=False)
    torch.testing.assert_close(plain.weights(x), torch.ones(2, 3))


def test_prompts_that_choose_nothing_give_the_map_times_half_their_number(wide):
    module = FrequencyPrompts(8, num_tokens=2)  # every mask is one half
    torch.nn.init.zeros_(module.tokens)
    for x in (wide[1], wide[1][:, :, :7, :5]):
        replaced, overlap = module.replace(x)
        torch.testing.assert_close(replaced, x)
        assert overlap.item() == pytest.approx(4)
    assert [m.shape for m in module(wide[1])] == [(2, 2, 2, 3), (2, 2, 8, 12), (2, 2, 4, 6), (2, 2, 2, 3)]


def test_masks_of_a_band_come_from_the_sum_over_orientations(official, wide):
    module = prompts(official)
    _, (_, middle, _) = haar_levels(wide[1], 3)
    torch.testing.assert_close(module(wide[1])[2], token_masks(middle.sum(2), module.tokens[2]))


def test_inits_are_the_papers():
    torch.manual_seed(0)
    module = ReceptiveTokens(64, num_tokens=6)
    three, one = module.probability[0], module.probability[2]
    assert module.tokens.std().item() == pytest.approx(0.01, rel=0.2)
    assert three.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.05)
    assert one.weight.std().item() == pytest.approx(math.sqrt(2 / 6), rel=0.2)
    assert not three.bias.any() and not one.bias.any()
    assert FrequencyPrompts(64, num_tokens=6).tokens.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("module", [ReceptiveTokens(8, num_tokens=3), FrequencyPrompts(8, num_tokens=3)])
@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 8, 3, 5)])
def test_any_batch_keeps_shape_type_and_graph(module, shape):
    x = torch.randn(shape, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        replaced, overlap = module.replace(x)
    assert replaced.shape == shape and replaced.dtype == torch.bfloat16 and overlap.dtype == torch.float32
    module.zero_grad()
    (replaced.float().square().sum() + overlap).backward()
    assert overlap.isfinite() and all(p.grad is not None for p in module.parameters())


def test_identical_tokens_overlap_fully(official):
    module = ReceptiveTokens(8, num_tokens=3)
    with torch.no_grad():
        module.tokens.copy_(module.tokens[:1].expand(3, 8))
    assert module.replace(official.teacher)[1].item() == pytest.approx(1)


# The file

TEACHER = {"p3": FeatureSpec(8, 8), "p4": FeatureSpec(8, 16), LOGITS: FeatureSpec(5, 8, logits=True)}


@pytest.fixture
def saved(tmp_path):
    """Learnt tokens of a teacher, and their file."""
    tokens = build_tokens("MasKD", TEACHER)
    path = str(tmp_path / "new" / "tokens.pth")
    save_tokens(path, "MasKD", tokens, TEACHER)
    return tokens, path


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_numbers_of_tokens_are_the_papers(saved):
    tokens, _ = saved
    assert [m.num_tokens for m in tokens.values()] == [6, 6, 8]
    assert tokens["p3"].probability is not None and tokens[LOGITS].probability is None
    assert build_tokens("FreeKD", TEACHER, 2)["p4"].tokens.shape == (4, 2, 8)


def test_tokens_are_found_by_stride_whatever_the_level_is_called(saved):
    tokens, path = saved
    levels = {"1": FeatureSpec(8, 16), "0": FeatureSpec(8, 8), LOGITS: FeatureSpec(5, 16, logits=True)}
    method = MasKD(levels, levels, tokens=path)
    for level, teacher_level in (("0", "p3"), ("1", "p4"), (LOGITS, LOGITS)):
        assert same(tokens[teacher_level], method.tokens[level])
    assert not any(p.requires_grad for p in method.tokens.parameters())
    assert method.warnings() == {}


def test_of_two_levels_of_one_stride_the_name_decides(tmp_path):
    twice = {"c5": FeatureSpec(8, 32), "p5": FeatureSpec(8, 32)}
    tokens, path = build_tokens("FreeKD", twice), str(tmp_path / "tokens.pth")
    save_tokens(path, "FreeKD", tokens, twice)
    method = FreeKD({"p5": twice["p5"]}, {"p5": twice["p5"]}, tokens=path)
    assert same(tokens["p5"], method.tokens["p5"])
    with pytest.raises(ConfigError) as error:
        FreeKD({"x": twice["p5"]}, {"x": twice["p5"]}, tokens=path)
    assert error.value.argument == "tokens" and path in error.value.value
    expected = (
        "none, or several, for x (stride 32, 8 channels): its tokens are for c5 (stride 32, 8 channels), p5 (stride"
    )
    assert expected in error.value.value


@pytest.mark.parametrize(
    ("spec", "arguments", "value", "allowed"),
    [
        (FeatureSpec(8, 32), {}, "none, or several, for p3 (stride 32, 8 channels): its tokens are for p3 (str", "one"),
        (FeatureSpec(4, 8), {}, "6 tokens of 8 channels for p3", "6 of 4 channels for p3"),
        (FeatureSpec(8, 8), {"num_tokens": 3}, "6 tokens of 8 channels for p3", "3 of 8 channels for p3"),
    ],
)
def test_tokens_of_another_teacher_are_refused(saved, spec, arguments, value, allowed):
    with pytest.raises(ConfigError) as error:
        MasKD({"p3": spec}, {"p3": spec}, tokens=saved[1], **arguments)
    assert error.value.argument == "tokens" and saved[1] in error.value.value
    assert value in error.value.value and allowed in error.value.allowed
    assert "{tokens}" in error.value.hint and ("{num_tokens}" in error.value.hint or spec.stride == 32)


def test_a_negative_number_of_tokens_is_refused(saved):
    level = {"p3": TEACHER["p3"]}
    with pytest.raises(ConfigError) as error:
        MasKD(level, level, tokens=saved[1], num_tokens=-1)
    assert (error.value.argument, error.value.value, error.value.allowed) == ("num_tokens", -1, ">= 0")
    with pytest.raises(ConfigError) as error:
        ReceptiveTokens(8, num_tokens=0)
    assert (error.value.argument, error.value.value, error.value.allowed) == ("num_tokens", 0, ">= 1")


def test_files_that_do_not_do_are_named(saved, tmp_path):
    level = {"p3": TEACHER["p3"]}
    with pytest.raises(ConfigError) as error:
        FreeKD(level, level, tokens=saved[1])
    assert error.value.argument == "tokens" and error.value.value == f"{saved[1]}, learnt for MasKD"
    assert error.value.allowed == "tokens learnt for FreeKD"
    with pytest.raises(ConfigError) as error:
        MasKD(level, level, tokens="nowhere.pth")
    assert error.value.argument == "tokens" and error.value.value == f"no file at {os.path.abspath('nowhere.pth')}"
    other = tmp_path / "other.pth"
    for content in ({"model": {}}, [1], {"method": "MasKD", "levels": {"p3": {}}}):
        torch.save(content, other)
        with pytest.raises(ConfigError) as error:
            MasKD(level, level, tokens=str(other))
        assert error.value.argument == "tokens" and error.value.value == f"{other}, which holds no learnt tokens"
    other.write_text("nonsense")
    with pytest.raises(ConfigError) as error:
        MasKD(level, level, tokens=str(other))
    assert error.value.argument == "tokens" and error.value.value == f"{other}, which holds no learnt tokens"
    with pytest.raises(ConfigError) as error:
        build_tokens("PKD", level)
    assert error.value.argument == "method" and error.value.value == "PKD" and "MasKD, FreeKD" in error.value.allowed


def test_tokens_without_their_network_do_not_fit(tmp_path):
    """A file that was changed by hand: the state is not the module's."""
    path, level = str(tmp_path / "t.pth"), {"p3": TEACHER["p3"]}
    tokens = {"p3": ReceptiveTokens(8, num_tokens=6, probability=False)}
    save_tokens(path, "MasKD", tokens, level)
    with pytest.raises(ConfigError) as error:
        load_tokens(path, "MasKD", build_tokens("MasKD", level), level)
    assert error.value.argument == "tokens" and path in error.value.value
    assert "for p3 that does not fit: Missing key" in error.value.value
    assert "probability.0.weight" in error.value.value and "\n" not in error.value.value


def test_a_file_is_read_without_running_code(saved):
    content = torch.load(saved[1], weights_only=True)
    assert content["method"] == "MasKD" and list(content["levels"]) == list(TEACHER)
    assert F.mse_loss(content["levels"]["p3"]["state"]["tokens"], saved[0]["p3"].tokens) == 0
