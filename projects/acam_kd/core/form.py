"""The form of a nested state: which of its values are of another kind than those of a model that is at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["odd_optimizer", "odd_part"]


def odd_part(found: Any, like: Any, name: str = "") -> str:
    """Return the name of the first value that cannot stand for the one of a reference; empty if there is none.

    Numbers have to be numbers, and not NaN. Tensors have to have the shape of the reference's, lists and mappings its
    form. Parts that only one of the two has are left out, and so are parts that the reference has as None.

    Args:
        found: a state that was read from a file.
        like: the state of the object that is to take it.
        name: of the state, for the beginning of the result.

    Example:
        >>> odd_part({"lr": "x", "steps": [1]}, {"lr": 0.1, "steps": [2]}, "optimizer")
        'optimizer.lr'
    """
    if isinstance(like, Mapping):
        if not isinstance(found, Mapping):
            return name
        odd = (odd_part(found[key], like[key], f"{name}.{key}") for key in like if key in found)
        return next(filter(None, odd), "")
    if isinstance(like, (list, tuple)):
        if not isinstance(found, (list, tuple)):
            return name
        odd = (odd_part(*pair, f"{name}[{i}]") for i, pair in enumerate(zip(found, like)))
        return next(filter(None, odd), "")
    if isinstance(like, Tensor):
        same = isinstance(found, Tensor) and found.shape == like.shape and found.is_complex() == like.is_complex()
        return "" if same else name
    if isinstance(like, (bool, str)):
        return "" if isinstance(found, type(like)) else name
    if isinstance(like, (int, float)):
        number = isinstance(found, (int, float)) and not isinstance(found, bool) and not math.isnan(found)
        return "" if number else name
    return ""


def odd_optimizer(state: Any, like: Mapping[str, Any], parameters: list[Tensor], name: str = "optimizer") -> str:
    """Return the first odd part of an optimizer's state, its moments included, which a new optimizer has not.

    Args:
        state: from a file.
        like: the state of the optimizer that is to take it.
        parameters: of that optimizer, in its order.
        name: see ``odd_part``.
    """
    if odd := odd_part(state, like, name):
        return odd
    if not isinstance(state, Mapping):
        return name
    for index, moments in state.get("state", {}).items():
        place = f"{name}.state.{index}"
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(moments, Mapping):
            return place
        for key, value in moments.items():
            if isinstance(value, Tensor):
                fits = value.shape in (parameters[index].shape, ())
            else:
                fits = value is None or isinstance(value, (int, float))
            if not fits:
                return f"{place}.{key}"
    groups = state.get("param_groups", [])
    if [list(group.get("params", ())) for group in groups] != [list(group["params"]) for group in like["param_groups"]]:
        return f"{name}.param_groups"
    return ""
