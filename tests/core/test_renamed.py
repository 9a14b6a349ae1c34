"""Former names of arguments, and of their values: where they are read, and the line about each."""

from __future__ import annotations

import pytest

from acam_kd.core import DISTILLER_REGISTRY
from acam_kd.core.distiller import Distiller, method_arguments
from acam_kd.core.errors import ConfigError
from acam_kd.core.methods import build_distiller
from acam_kd.core.options import read_request
from acam_kd.core.renamed import _warn_once

from ..contract import pyramid


class Younger(Distiller):
    """A method with a former argument and a former value."""

    renamed = {"strength": "weight"}
    renamed_values = {"form": {"old": "new"}}

    def __init__(self, student, teacher, *, weight=1.0, form="new"):
        super().__init__(student, teacher)
        self.weight, self.form = weight, form


class Youngest(Younger):
    """A subclass without a constructor of its own."""


@pytest.fixture
def forgetful():
    """Former names are reported once per process: forget that they were."""
    _warn_once.cache_clear()


@pytest.mark.parametrize("method", [Younger, Youngest])
def test_former_names_and_values_are_read_with_one_line(method, forgetful, caplog):
    for _ in "ab":
        built = method(pyramid(8), pyramid(8), strength=2.0, form="old")
        assert (built.weight, built.form) == (2.0, "new")
    assert caplog.messages == [
        "Younger.strength is called Younger.weight now; the former name is still read",
        "Younger.form: old is called new now; the former value is still read",
    ]
    assert method_arguments(method) == {"weight": 1.0, "form": "new"}  # what front ends make settings of


def test_current_names_need_no_line(forgetful, caplog):
    assert Younger(pyramid(8), pyramid(8), weight=2.0, form="new").weight == 2.0
    assert Younger(pyramid(8), pyramid(8)).weight == 1.0 and not caplog.messages


def test_both_names_may_be_given_if_they_agree():
    assert Younger(pyramid(8), pyramid(8), strength=2.0, weight=2.0).weight == 2.0
    with pytest.raises(ConfigError) as error:
        Younger(pyramid(8), pyramid(8), strength=2.0, weight=1.0)
    assert error.value.render(str) == (
        "Younger.weight: found 1.0 and 2.0, expected one value; leave Younger.strength out, its former name"
    )
    assert error.value.render(lambda argument: argument.upper()).endswith("leave YOUNGER.STRENGTH out, its former name")


def test_former_names_are_read_where_methods_are_built_by_name(forgetful, caplog, monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Younger", Younger)
    request = read_request("Younger", {"strength": 2.0, "form": "old"})
    built = build_distiller([request], [pyramid(8)], [pyramid(8)])
    assert (built.weight, built.form) == (2.0, "new") and len(caplog.messages) == 2
    with pytest.raises(ConfigError) as error:  # its type is checked under the name of today
        read_request("Younger", {"strength": "much"})
    assert (error.value.argument, error.value.allowed) == ("Younger.weight", "float, as 1.0")
