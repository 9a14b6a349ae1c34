"""A trunk out of a classifier's file: by name, by order and shape, turned channels, and what does not fit."""

from __future__ import annotations

import os
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from acam_kd.core import ConfigError
from acam_kd.core.trunk_weights import load_trunk


def part(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 1))


class Classifier(nn.Module):
    """A trunk and a head."""

    def __init__(self):
        super().__init__()
        self.features, self.classifier = part(), nn.Linear(5, 9)


@pytest.fixture
def state():
    model = Classifier()
    model.features[1].running_mean.normal_()
    return model.state_dict()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "trunk.pth")


def loaded(path, state, **more):
    """Load a file, and see that the trunk has the classifier's values."""
    trunk = part()
    found = load_trunk(trunk, path, argument="weights", **more)
    assert all(torch.equal(value, state[f"features.{name}"]) for name, value in trunk.state_dict().items())
    return found


def renamed(state):
    """The same tensors in their order, under names of another library's."""
    return OrderedDict((f"n{place}.x", value) for place, value in enumerate(state.values()))


def refused(path, *values, hint=""):
    trunk = part()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        load_trunk(trunk, path, argument="weights")
    assert all(value in error.value.value for value in values), error.value
    assert error.value.argument == "weights" and hint in error.value.hint and "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("wrapper", ["", "model", "state_dict", "state_dict model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model."])
def test_by_name_under_wrappers_and_prefixes(state, path, wrapper, prefix):
    content = {f"{prefix}{name}": value for name, value in state.items()}
    for key in wrapper.split():
        content = {key: content, "epoch": 3}
    torch.save(content, path)
    found = loaded(path, state)
    assert (found.loaded, found.unused, found.prefix, found.by_name) == (8, 2, f"{prefix}features.", True)
    assert str(found) == f"all 8 tensors by name under '{prefix}features.', 2 others unused"


def test_safetensors_by_name(state, path):
    safetensors.torch.save_file(state, path)
    assert loaded(path, state).by_name


def test_by_order_and_shape(state, path):
    torch.save({"state_dict": OrderedDict((f"n{place}.x", value) for place, value in enumerate(state.values())
                                          if value.dim())}, path)  # fmt: skip
    found = loaded_but_counters(path, state)
    assert not found.by_name and (found.loaded, found.unused, found.prefix) == (8, 2, "")


def loaded_but_counters(path, state):
    trunk = part()
    found = load_trunk(trunk, path, argument="weights")
    values = trunk.state_dict()
    assert all(torch.equal(x, state[f"features.{n}"]) for n, x in values.items() if "num_batches" not in n)
    return found


def test_by_order_with_counters_of_another_name(state, path):
    content = OrderedDict(
        (f"blocks.{place}.{name.rpartition('.')[2]}", value) for place, (name, value) in enumerate(state.items())
    )
    torch.save(content, path)
    assert not loaded_but_counters(path, state).by_name


def test_an_order_of_other_shapes_is_refused_with_the_place(state, path):
    content = renamed({name: value for name, value in state.items() if value.dim()})
    names = list(content)
    content[names[6]] = torch.zeros(7, 4, 1, 1)
    torch.save(content, path)
    refused(
        path,
        "by name with 0 of the model's 8 tensors (missing in the file: 0.weight, 0.bias, 1.weight and 5 more)",
        "by order it has n6.x (7, 4, 1, 1), and the trunk 3.weight (5, 4, 1, 1) at place 7 of 8",
    )
    torch.save(OrderedDict((name, content[name]) for name in names[:5]), path)
    refused(path, "by order it ends before 1.running_var, after 5 of 8 tensors")


def test_a_tensor_of_another_shape_is_not_taken_from_elsewhere(state, path):
    state["features.3.weight"] = torch.zeros(5, 6, 1, 1)
    torch.save(state, path)
    refused(path, "with 7 of the model's 8 tensors under the prefix 'features.'", "3.weight (5, 6, 1, 1) in the file")


def test_the_order_of_safetensors_is_lost(state, path):
    content = dict(zip("abcdefghij", (v for v in state.values() if v.dim())))
    safetensors.torch.save_file({**content, "a": content["b"], "b": content["a"]}, path)
    refused(path, "by order it has", hint="save the file by torch.save")


def test_a_trunk_trained_on_bgr_sees_the_same_in_rgb(state, path):
    torch.save(state, path)
    turned, kept, images = part().eval(), part().eval(), torch.rand(2, 3, 6, 6)
    load_trunk(kept, path, argument="weights")
    load_trunk(turned, path, argument="weights", order="BGR")
    torch.testing.assert_close(turned(images.flip(1)), kept(images))
    assert not torch.equal(turned[0].weight, kept[0].weight) and torch.equal(turned[3].weight, kept[3].weight)


def test_names_that_differ_by_a_rule(state, path):
    rule = {name: name.replace("0.", "conv_stem.") for name in part().state_dict() if name.startswith("0.")}
    theirs = {f"module.{rule.get(name.removeprefix('features.'), name)}": x for name, x in state.items()}
    theirs = {name.replace("features.", ""): x for name, x in theirs.items()}
    assert "module.conv_stem.weight" in theirs
    torch.save(theirs, path)
    trunk = part()
    found = load_trunk(trunk, path, argument="weights", renamed=rule)
    assert torch.equal(trunk[0].weight, state["features.0.weight"]) and found.loaded == 8


def test_two_trunks_and_numbers_that_are_not_finite(state, path):
    torch.save({**state, **{f"ema.{name}": value for name, value in state.items()}}, path)
    refused(path, "with the whole model under each of the prefixes", hint="save the one")
    state["classifier.weight"][0, 0] = float("nan")  # of no interest
    torch.save(state, path)
    loaded(path, state)
    state["features.1.running_var"][0] = float("inf")
    torch.save(state, path)
    refused(path, "NaN or infinity in 1.running_var")


class Opens:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickled_objects_are_refused_and_not_run(path, tmp_path, state):
    torch.save({"state_dict": state, "hook": Opens(tmp_path / "mark")}, path)
    refused(path, "which holds Python objects (posix.mkdir), not only tensors")
    torch.save(Classifier(), path)
    refused(path, "which holds Python objects", hint="save model.state_dict()")
    assert not (tmp_path / "mark").exists()
