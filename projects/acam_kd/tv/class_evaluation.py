"""Evaluation of classifiers: accuracies, and the calibration of the probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["BINS", "ClassificationEvaluator", "calibration_error", "confusion"]

BINS = 15
"""The bins of the calibration error, as in Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""
MOST = 100
"""The largest number of classes whose single accuracies are among the metrics."""


def calibration_error(scores: Iterable[float], hits: Iterable[bool], bins: int = BINS) -> float:
    r"""Compute the expected calibration error, between 0 and 1.

    .. math:: ECE = \sum_b \frac{|B_b|}{n} \, | \mathrm{accuracy}(B_b) - \mathrm{confidence}(B_b) |

    Args:
        scores: the largest probability of each image.
        hits: whether its class is the right one.
        bins: their number, of equal width.

    Example:
        >>> round(calibration_error([0.9, 0.9, 0.6], [True, True, False]), 6)
        0.266667
    """
    score, hit = np.asarray([*scores], float), np.asarray([*hits], float)
    number = np.clip(np.ceil(score * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(number, weights=hit - score, minlength=bins)
    return float(np.abs(gaps).sum() / max(len(score), 1))


def confusion(results: Iterable[Mapping[str, Any]], classes: int) -> np.ndarray[Any, Any]:
    """Count (K, K): rows are the true classes, columns the predicted ones."""
    counts = np.zeros((classes, classes), int)
    for result in results:
        counts[result["label"], result["predicted"]] += 1
    return counts


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy, the calibration error, and the accuracy of each class.

    A result has ``image_id``, ``label``, ``predicted``, ``score``, the probability of the predicted class, and
    ``rank``: the number of classes that are more probable than the true one, where a tie counts against it.

    Args:
        categories: label -> name.
    """

    def __init__(self, categories: Mapping[int, str]) -> None:
        self.categories = dict(categories)
        self.results: list[dict[str, Any]] = []

    def add(self, outputs: Iterable[dict[str, Tensor]], targets: Iterable[dict[str, Any]]) -> None:
        """Take a batch of ``{"scores": (K,)}``."""
        for output, target in zip(outputs, targets):
            scores, label = output["scores"].float().cpu(), int(target["label"])
            others = torch.cat([scores[:label], scores[label + 1 :]])
            self.results.append(
                {
                    "image_id": target["image_id"],
                    "label": label,
                    "predicted": int(scores.argmax()),
                    "score": float(scores.max()),
                    "rank": int((others >= scores[label]).sum()),
                }
            )

    def confusion(self) -> np.ndarray[Any, Any]:
        """Count the results by true and predicted class; see ``confusion``."""
        return confusion(self.results, len(self.categories))

    def metrics(self) -> dict[str, float]:
        """Compute ``top1``, ``top5``, ``ECE`` and ``top1/<class>`` in percent.

        ``top5`` is left out where there are five classes or fewer, and single classes where there are more than 100.
        """
        results = self.results
        hits = [result["rank"] == 0 for result in results]
        metrics = {"top1": 100 * float(np.mean(hits))}
        if len(self.categories) > 5:
            metrics["top5"] = 100 * float(np.mean([result["rank"] < 5 for result in results]))
        correct = [result["predicted"] == result["label"] for result in results]
        metrics["ECE"] = 100 * calibration_error([result["score"] for result in results], correct)
        for label, name in self.categories.items() if len(self.categories) <= MOST else ():
            mine = [hit for hit, result in zip(hits, results) if result["label"] == label]
            metrics[f"top1/{name}"] = 100 * float(np.mean(mine)) if mine else float("nan")
        return metrics
