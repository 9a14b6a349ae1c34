"""The settings of methods: given, given for all, the recipe's, the default."""

from __future__ import annotations

import pytest
import torch

import acam_kd
from acam_kd.core import DISTILLER_REGISTRY, ModuleAdapter, Plan, Recipe, assemble, read_request
from acam_kd.core.options import all_arguments, note_own
from acam_kd.methods import Mimic

from .detectors import Backbone, Detector, refused


class Tuned(Mimic):
    """Mimics, and has a recipe."""

    recipes = {"toy": Recipe("a table of ours", {"alpha": 7.0}, (-1, None), ("backbone",))}

    def __init__(self, student_channels, teacher_channels, *, alpha: float = 2.0, gain: float = 3.0) -> None:
        super().__init__(student_channels, teacher_channels, alpha=alpha)
        self.gain = gain


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Tuned", Tuned)


def test_all_settings_of_a_method_are_its_arguments_levels_and_taps():
    assert all_arguments("Tuned") == {"alpha": 2.0, "gain": 3.0, "levels": (), "taps": ()}


def test_what_is_given_wins_then_the_recipe_then_the_default():
    request = read_request("Tuned", {"gain": None}, family="toy")
    assert request.arguments == {"alpha": 7.0, "gain": 3.0} and request.taps == ("backbone",) and request.levels == ()
    assert request.origins == {"alpha": "recipe", "gain": "default", "levels": "recipe", "taps": "recipe"}
    request = read_request("Tuned", {"alpha": 5, "levels": ["p3"]}, family="toy", levels=["p4"], taps=["classes"])
    assert request.arguments == {"alpha": 5.0, "gain": 3.0}
    assert (request.levels, request.taps) == (("p3",), ("classes",))
    assert request.origins == {"alpha": "given", "gain": "default", "levels": "given", "taps": "given for all"}
    assert read_request("Tuned", {}, family="other").arguments == {"alpha": 2.0, "gain": 3.0}


def test_values_have_the_type_of_the_default():
    request = read_request("ACAMKD", {"alpha": "1e-3", "num_masks": 3, "levels": "[p3, p4]", "taps": ("backbone",)})
    assert request.arguments["alpha"] == 0.001 and request.levels == ("p3", "p4") and request.taps == ("backbone",)
    for argument, value, allowed in (
        ("alpha", "much", "float, as 1.0"), ("alpha", True, "float, as 1.0"), ("num_masks", 2.5, "int, as 0"),
        ("standardize_fused", 1, "bool, as False"), ("query", 3, "str, as 'teacher'"), ("levels", 3, "a list of names"),
    ):  # fmt: skip
        with refused(f"ACAMKD.{argument}", repr(value), allowed):
            read_request("ACAMKD", {argument: value})
    with refused("Mimic.beta", "2", "one of alpha=1.0, features='raw', levels=(), taps=()"):
        read_request("Mimic", {"beta": 2})


class Toy(ModuleAdapter):
    family = "toy"


class Two(Backbone):
    """Two levels."""


def attached(caplog, plan):
    student, teacher = Detector(), Detector()
    with caplog.at_level("INFO", logger="acam_kd"):
        built = assemble(Toy(student), ModuleAdapter(teacher, role="teacher"), plan)
    return built, caplog.text


def test_the_log_says_every_value_and_where_it_comes_from(caplog):
    built, text = attached(caplog, Plan(methods={"Tuned": {"gain": 4.0}}))
    assert built.method.alpha == 7.0 and built.method.gain == 4.0
    assert (
        "Tuned: alpha=7.0 (recipe), gain=4.0 (given), levels p3 (recipe), taps backbone (recipe); "
        "the recipe for toy: a table of ours" in text
    )


def test_a_value_that_the_run_filled_in_is_not_called_given():
    note_own("FreeKD", "tokens", "here/tokens_freekd.pth")
    for path, origin in (("here/tokens_freekd.pth", "the run's own"), ("there.pth", "given")):
        request = read_request("FreeKD", {"tokens": path})
        assert request.origins["tokens"] == origin and request.arguments["tokens"] == path


def test_a_method_alone_takes_channels():
    for name in ("PKD", "Mimic", "CWD", "ACAMKD"):
        method = DISTILLER_REGISTRY.get(name)(student_channels={"p3": 4}, teacher_channels={"p3": 4}, alpha=6.0)
        maps = {"p3": torch.randn(2, 4, 5, 6)}
        assert all(torch.isfinite(loss) for loss in method(maps, {"p3": torch.randn(2, 4, 5, 6)}).values())


def test_levels_of_methods_in_python():
    """Own levels in ``options``; those that no method has are named."""
    levels = {"a": "0", "b": "2"}
    make = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3, 2), torch.nn.ReLU()
    )
    options = {"Mimic": {"levels": ["a"]}, "PKD": {"levels": ["b"]}}
    student = acam_kd.distill(
        make(), make(), method="Mimic+PKD", student_levels=levels, teacher_levels=levels, options=options
    )
    mimic, pkd = student.distillation.method.parts()
    assert (mimic.levels, pkd.levels) == (["a"], ["b"]) and student.distillation.levels == {"a": "a", "b": "b"}
    options["PKD"]["levels"] = ["c"]
    with refused("PKD.levels", "c", "levels of the student: a, b"):
        acam_kd.distill(
            make(), make(), method="Mimic+PKD", student_levels=levels, teacher_levels=levels, options=options
        )


def test_levels_given_for_all_leave_out_those_of_other_methods(caplog):
    """Maps for one, predictions for the other, in either direction."""
    levels = {"a": "0", "logits": "2"}
    make = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Conv2d(3, 4, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 1), torch.nn.Identity()
    )
    for asked in (["logits"], ["a"]):
        plan = Plan(methods={"PKD": {}, "KD": {}}, levels=asked)
        with caplog.at_level("INFO", logger="acam_kd"):
            built = assemble(ModuleAdapter(make(), levels), ModuleAdapter(make(), levels, role="teacher"), plan)
        assert [part.levels for part in built.method.parts()] == [["a"], ["logits"]]
        assert ("levels a (default)" in caplog.text) == (asked == ["logits"])
        caplog.clear()


def test_all_stands_alone_and_none_is_open():
    levels = {"p3": "head"}
    with refused("Mimic.levels", "all, p3", "'all' alone, or names of levels"):
        acam_kd.distill(Detector(), Detector(), student_levels=levels, teacher_levels=levels, method="Mimic+PKD",
                        options={"Mimic": {"levels": ["all", "p3"]}})  # fmt: skip
    with refused("options", "PKD: 6.0", "method -> {hyper-parameter: value}"):
        acam_kd.distill(Detector(), Detector(), method="Mimic+PKD", options={"PKD": 6.0})


class Clash(Mimic):
    def __init__(self, student_channels, teacher_channels, *, levels: int = 3) -> None:
        super().__init__(student_channels, teacher_channels)


def test_an_argument_that_every_method_has_is_refused(monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Clash", Clash)
    with refused("method", "Clash with an argument levels", "another name for it"):
        all_arguments("Clash")


class Open(Mimic):
    def __init__(self, student_channels, teacher_channels, *, weight=None, sizes=(1.0, 2.0)) -> None:
        super().__init__(student_channels, teacher_channels)


def test_other_defaults_of_methods_of_ones_own(monkeypatch):
    monkeypatch.setitem(DISTILLER_REGISTRY._obj_map, "Open", Open)
    found = read_request("Open", {"weight": 2.0, "sizes": (3.0,)}).arguments
    assert found == {"weight": 2.0, "sizes": (3.0,)}
