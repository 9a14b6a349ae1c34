"""Sentences and matches by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from acam_kd.report.results import Detections, Row, hits, metric_names, sentences


def row(name, value, role="student"):
    return Row(name, metrics={} if value is None else {"AP": value}, role=role)


def test_each_student_is_compared_with_those_above_it():
    rows = [row("big", 40.0, "teacher"), row("alone", 20.0, "alone"), row("mimic", 31.0), row("ours", 30.5)]
    assert sentences(rows) == [
        "mimic reaches 31.00 AP: 11.00 more than alone. It goes 55% of the way from alone to big.",
        "ours reaches 30.50 AP: 10.50 more than alone and 0.50 less than mimic. It does not beat mimic. "
        "It goes 52% of the way from alone to big.",
    ]


def test_a_student_that_distillation_hurts():
    rows = [row("big", 40.0, "teacher"), row("alone", 20.0, "alone"), row("a", 20.001), row("b", 12.0)]
    assert sentences(rows)[0].startswith("a reaches 20.00 AP: the same as alone. It does not beat alone.")
    assert (
        sentences(rows)[1]
        == "b reaches 12.00 AP: 8.00 less than alone and 8.00 less than a. It does not beat alone and a."
    )


def test_words_follow_the_two_printed_digits():
    """31.954 and 31.951 are printed alike, so they are the same."""
    said = sentences([row("a", 31.951), row("b", 31.954)])
    assert said[1] == "b reaches 31.95 AP: the same as a. It does not beat a."


def test_missing_values_are_said_and_not_compared():
    rows = [row("alone", math.nan, "alone"), row("a", None), row("b", 3.0), row("c", math.nan)]
    assert sentences(rows) == ["a has no AP.", "b reaches 3.00 AP.", "c has no AP."]
    assert sentences([row("a", None)]) == [] and sentences([]) == []


def test_any_metric_will_do():
    rows = [Row("alone", metrics={"mIoU": 60.0}, role="alone"), Row("ours", metrics={"mIoU": 62.5, "accuracy": 90.0})]
    assert metric_names(rows) == ["mIoU", "accuracy"]
    assert sentences(rows) == ["ours reaches 62.50 mIoU: 2.50 more than alone."]


def test_roles_are_checked():
    with pytest.raises(ValueError, match="role of row 'x' must be one of"):
        Row("x", role="control")


def found(boxes, labels, scores=None):
    return Detections(np.array(boxes, float).reshape(-1, 4), labels, None if scores is None else np.array(scores))


def test_a_hit_needs_class_overlap_and_a_free_object():
    truth = found([[0, 0, 10, 10], [20, 0, 30, 10]], ["cat", "dog"])
    boxes = [[0, 0, 10, 6], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 30, 10], [20, 0, 30, 4.9]]
    guesses = found(boxes, ["cat", "cat", "cat", "dog", "dog"], [0.5, 0.9, 0.8, 0.7, 0.6])
    assert hits(guesses, truth) == [False, True, False, True, False]
    assert hits(found([[0, 0, 10, 5]], ["cat"], [1.0]), truth) == [True]  # exactly one half
    assert hits(found([[0, 0, 10, 4.9]], ["cat"], [1.0]), truth) == [False]
    assert hits(found([], [], []), truth) == [] and hits(guesses, found([], [])) == [False] * 5
    assert hits(found([[5, 5, 5, 5]], ["cat"], [1.0]), found([[5, 5, 5, 5]], ["cat"])) == [False]
