"""Every row of the recipes against the numbers of its source, as they stood in the configs of 0.1."""

from __future__ import annotations

import pytest

from acam_kd.core import DISTILLER_REGISTRY, method_arguments
from acam_kd.core.distiller import ALL, FIRST_FOUR, LAST
from acam_kd.methods.recipes import RECIPES

ROWS = {
    ("AT", "semseg"): ({"alpha": 10000.0}, LAST, ("backbone",)),
    ("CWD", "retinanet"): ({"alpha": 10.0, "temperature": 1.0}, ALL, ()),
    ("CWD", "fcos"): ({"alpha": 10.0, "temperature": 1.0}, ALL, ()),
    ("CWD", "rcnn"): ({"alpha": 10.0, "temperature": 1.0}, ALL, ()),
    ("CWD", "semseg"): ({"alpha": 3.0, "temperature": 4.0}, ALL, ("logits",)),
    ("DKD", "retinanet"): ({"alpha": 1.0, "beta": 0.25, "temperature": 1.0}, ALL, ()),
    ("DKD", "fcos"): ({"alpha": 1.0, "beta": 0.25, "temperature": 1.0}, ALL, ()),
    ("DKD", "rcnn"): ({"alpha": 1.0, "beta": 0.25, "temperature": 1.0}, ALL, ()),
    ("DKD", "semseg"): ({"alpha": 1.0, "beta": 0.25, "temperature": 1.0}, ALL, ("logits",)),
    ("DMKD", "retinanet"): ({"alpha": 0.00002, "rho_s": 0.65, "rho_c": 0.15}, ALL, ()),
    ("DMKD", "fcos"): ({"alpha": 0.00002, "rho_s": 0.65, "rho_c": 0.15}, ALL, ()),
    ("DMKD", "rcnn"): ({"alpha": 0.0000005, "rho_s": 0.45, "rho_c": 0.15}, FIRST_FOUR, ()),
    ("FGD", "retinanet"): (
        {"alpha": 0.001, "beta": 0.0005, "gamma": 0.0005, "lambda_rel": 0.000005, "temperature": 0.5}, ALL, (),
    ),
    ("FGD", "fcos"): (
        {"alpha": 0.0016, "beta": 0.0008, "gamma": 0.0008, "lambda_rel": 0.000008, "temperature": 0.8}, ALL, (),
    ),
    ("FGD", "reppoints"): (
        {"alpha": 0.0016, "beta": 0.0008, "gamma": 0.0008, "lambda_rel": 0.000008, "temperature": 0.5}, ALL,
        ("neck_convs",),
    ),
    ("FGD", "rcnn"): (
        {"alpha": 0.00005, "beta": 0.000025, "gamma": 0.00005, "lambda_rel": 0.0000005, "temperature": 0.5},
        FIRST_FOUR, (),
    ),
    ("FreeKD", "retinanet"): ({"alpha": 1.0, "lambda_mse": 5.0}, ALL, ()),
    ("FreeKD", "fcos"): ({"alpha": 1.0, "lambda_mse": 5.0}, ALL, ()),
    ("FreeKD", "rcnn"): ({"alpha": 1.0, "lambda_mse": 2.0}, ALL, ()),
    ("KD", "retinanet"): ({"alpha": 1.0, "temperature": 1.0}, ALL, ()),
    ("KD", "fcos"): ({"alpha": 1.0, "temperature": 1.0}, ALL, ()),
    ("KD", "rcnn"): ({"alpha": 1.0, "temperature": 1.0}, ALL, ()),
    ("KD", "semseg"): ({"alpha": 1.0, "temperature": 1.0}, ALL, ("logits",)),
    ("MasKD", "retinanet"): ({"alpha": 7.0, "custom_mask_warmup": 7000}, ALL, ()),
    ("MasKD", "fcos"): ({"alpha": 10.0, "custom_mask_warmup": 5000}, ALL, ()),
    ("MasKD", "reppoints"): ({"alpha": 10.0, "custom_mask_warmup": 5000}, ALL, ()),
    ("MasKD", "rcnn"): ({"alpha": 1.0, "custom_mask_warmup": 7330}, ALL, ()),
    ("MasKD", "semseg"): ({"alpha": 1.0}, ALL, ("logits",)),
    ("MCMI", "classifier"): ({"lambda_cmi": 0.15}, ALL, ("classes",)),
    ("MGD", "retinanet"): ({"alpha": 0.00002, "lambda_mask": 0.65}, ALL, ()),
    ("MGD", "fcos"): ({"alpha": 0.00002, "lambda_mask": 0.65}, ALL, ()),
    ("MGD", "reppoints"): ({"alpha": 0.00002, "lambda_mask": 0.65}, ALL, ()),
    ("MGD", "rcnn"): ({"alpha": 0.0000005, "lambda_mask": 0.45}, FIRST_FOUR, ()),
    ("MGD", "semseg"): ({"alpha": 0.00002, "lambda_mask": 0.75}, LAST, ("backbone",)),
    ("NKD", "retinanet"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ()),
    ("NKD", "fcos"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ()),
    ("NKD", "rcnn"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ()),
    ("NKD", "semseg"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ("logits",)),
    **{
        (method, family): ({"features": "standardized"}, ALL, ())
        for method in ("ACAMKD", "Mimic")
        for family in ("retinanet", "fcos", "reppoints", "rcnn")
    },
    ("PKD", "retinanet"): ({"alpha": 10.0}, FIRST_FOUR, ()),
    ("PKD", "fcos"): ({"alpha": 10.0}, FIRST_FOUR, ()),
    ("PKD", "reppoints"): ({"alpha": 10.0}, FIRST_FOUR, ()),
    ("PKD", "rcnn"): ({"alpha": 6.0}, FIRST_FOUR, ()),
    **{
        ("SAMKD", family): (
            {"alpha": 0.00002, "rho_s": 0.65, "rho_c": 0.15, "beta": 1.0, "temperature": 1.0}, ALL,
            ("backbone", "classes"),
        )
        for family in ("retinanet", "fcos", "reppoints")
    },
    ("ScoreWeighted", "retinanet"): ({"alpha": 6.0}, ALL, ()),
    ("ScoreWeighted", "fcos"): ({"alpha": 6.0}, ALL, ()),
    ("PSKD", "classifier"): ({"alpha": 0.8}, ALL, ("classes",)),
    ("ScoreWeighted", "rcnn"): ({"alpha": 6.0}, ALL, ()),
    ("USKD", "classifier"): ({"alpha": 1.0, "beta": 0.1, "mu": 0.005}, (-2, -1), ("backbone", "classes")),
    ("AT", "classifier"): ({"alpha": 1000.0}, ALL, ()),
    ("AT", "small_classifier"): ({"alpha": 1000.0}, ALL, ()),
    ("DKD", "classifier"): ({"alpha": 1.0, "beta": 0.5, "temperature": 1.0}, ALL, ("classes",)),
    ("DKD", "small_classifier"): ({"alpha": 1.0, "beta": 2.0, "temperature": 4.0}, ALL, ("classes",)),
    ("KD", "classifier"): ({"alpha": 1.0, "temperature": 1.0}, ALL, ("classes",)),
    ("KD", "small_classifier"): ({"alpha": 9.0, "temperature": 4.0}, ALL, ("classes",)),
    ("MCMI", "small_classifier"): ({"lambda_cmi": 0.15}, ALL, ("classes",)),
    ("MGD", "classifier"): ({"alpha": 7e-5, "lambda_mask": 0.15, "dropped": "channels"}, LAST, ("backbone",)),
    ("MGD", "small_classifier"): ({"alpha": 7e-5, "lambda_mask": 0.15, "dropped": "channels"}, LAST, ("backbone",)),
    ("NKD", "classifier"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ("classes",)),
    ("NKD", "small_classifier"): ({"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}, ALL, ("classes",)),
    ("PSKD", "small_classifier"): ({"alpha": 0.8}, ALL, ("classes",)),
    ("USKD", "small_classifier"): ({"alpha": 0.1, "beta": 0.1, "mu": 0.1}, (-2, -1), ("backbone", "classes")),
}  # fmt: skip


def test_there_is_a_row_for_each():
    assert {(method, family) for method, rows in RECIPES.items() for family in rows} == set(ROWS)


@pytest.mark.parametrize(("method", "family"), ROWS)
def test_it_has_the_numbers_of_its_source(method, family):
    recipe = DISTILLER_REGISTRY.get(method).recipes[family]
    assert (recipe.arguments, recipe.levels, recipe.taps) == ROWS[method, family]
    assert len(recipe.source) > 10 and set(recipe.taps) <= set(DISTILLER_REGISTRY.get(method).reads)
    known = method_arguments(DISTILLER_REGISTRY.get(method))
    assert all(type(value) is type(known[argument]) for argument, value in recipe.arguments.items())
