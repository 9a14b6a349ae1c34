"""What a student may return beside its losses."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch

from acam_kd import ConfigError

from .conftest import Net, attach


def test_losses_are_added_to_a_dict_a_tuple_and_a_single_loss(x):
    Pair = namedtuple("Pair", "losses extra")
    model = attach()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    task = plain.train()(x)["loss_cls"]
    outputs = {
        "dict": lambda loss, logits: {"loss_cls": loss},
        "ordered": lambda loss, logits: OrderedDict(loss_cls=loss),
        "tuple": lambda loss, logits: ({"loss_cls": loss}, logits, []),
        "named tuple": lambda loss, logits: Pair({"loss_cls": loss}, logits),
        "loss": lambda loss, logits: loss,
    }
    for kind, output in outputs.items():
        model.output = output
        found = model(x)
        added = model.distillation.losses["loss_pkd_pearson"]
        assert not added.requires_grad
        if kind == "loss":
            torch.testing.assert_close(found, task + added)
            assert found.requires_grad
            continue
        if kind.endswith("tuple"):
            assert type(found) is (tuple if kind == "tuple" else Pair) and found[1].shape == (2, 3)
            found = found[0]
        assert type(found) is (OrderedDict if kind == "ordered" else dict)
        assert list(found) == ["loss_cls", "loss_pkd_pearson"] and found["loss_pkd_pearson"].requires_grad


@pytest.mark.parametrize("kind", ["logits", "mixed"])
def test_other_outputs_are_untouched_and_the_losses_wait(x, kind):
    model = attach()
    kinds = {"logits": lambda loss, logits: logits, "mixed": lambda loss, logits: {"loss": loss, "logits": logits}}
    model.output = kinds[kind]
    out = model(x)
    assert isinstance(out, dict if kind == "mixed" else torch.Tensor)
    with pytest.raises(ConfigError) as error:
        model(x)
    assert "sum(student.distillation.losses.values())" in error.value.hint
    for _ in range(2):  # said again whenever it happens
        model(x)
        (loss,) = model.distillation.losses.values()
    model(x)
    with pytest.raises(ConfigError):
        model(x)
    model.distillation.losses  # noqa: B018
    model(x)
    (loss,) = model.distillation.losses.values()
    loss.backward()
    assert model.body[0].weight.grad.abs().sum() > 0


def test_a_loss_of_the_students_name_is_an_error(x):
    model = attach()
    model.output = lambda loss, logits: {"loss_pkd_pearson": loss}
    with pytest.raises(ConfigError) as error:
        model(x)
    assert error.value.argument == "method"
