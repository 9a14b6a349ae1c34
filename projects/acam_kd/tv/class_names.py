"""Names of the classes of torchvision's models: label 0 is the background, and labels may have gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchvision.models import get_model_weights

from ..core.class_names import BACKGROUND, UNUSED
from .models import is_classifier, is_segmentation

__all__ = ["names_of_labels", "names_of_weights", "with_background"]


def names_of_labels(categories: Mapping[int, str], num_classes: int) -> list[str]:
    """Return a name for each label.

    Args:
        categories: label -> name.
        num_classes: the number of labels.

    Example:
        >>> names_of_labels({1: "cat", 3: "dog"}, 4)
        ['__background__', 'cat', 'N/A', 'dog']
    """
    if not categories:
        return []
    return [categories.get(label, UNUSED if label else BACKGROUND) for label in range(num_classes)]


def names_of_weights(model: str, weights: str) -> list[str]:
    """Return the names of the classes of torchvision's own weights; none for weights that it does not know.

    Args:
        model: its name.
        weights: their name, as ``DEFAULT``.
    """
    try:
        return list(getattr(get_model_weights(model), weights).meta["categories"])
    except (ValueError, AttributeError, KeyError):
        return []


def with_background(names: Sequence[str], model: str) -> list[str]:
    """Return the names that a user gives, with the background first; segmentation models and classifiers need none.

    Args:
        names: of the classes.
        model: the model's name.
    """
    if not names or names[0] == BACKGROUND or is_segmentation(model) or is_classifier(model):
        return list(names)
    return [BACKGROUND, *names]
