"""From the levels of a pyramid to their learnt tokens, and the file between learning them and distilling with them."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_atomically
from .features import FeatureSpec, Pyramid, describe
from .tokens import FrequencyPrompts, ReceptiveTokens, TokenModule

__all__ = [
    "TOKEN_METHODS",
    "build_tokens",
    "frozen_tokens",
    "load_tokens",
    "save_tokens",
    "untrained_tokens",
]

TOKEN_METHODS = ("MasKD", "FreeKD")
"""The methods whose tokens are learnt first."""
KEY = "(key: TOKENS)"


def build_tokens(method: str, pyramid: Pyramid, num_tokens: int = 0) -> dict[str, TokenModule]:
    """Untrained tokens for each level.

    Args:
        method: one of ``TOKEN_METHODS``.
        pyramid: the teacher's levels.
        num_tokens: T; 0 for the papers': 6, and 8 on a logit map.

    Raises:
        ValueError: no such method, or a negative number.
    """
    if method not in TOKEN_METHODS:
        raise ValueError(f"{method} has no tokens to learn; one of {' and '.join(TOKEN_METHODS)} is needed")
    if num_tokens < 0:
        raise ValueError(f"num_tokens must not be negative, found {num_tokens} (key: NUM_TOKENS)")
    built: dict[str, TokenModule] = {}
    for level, spec in pyramid.items():
        number = num_tokens or (8 if spec.logits else 6)
        if method == "MasKD":
            built[level] = ReceptiveTokens(spec.channels, num_tokens=number, probability=not spec.logits)
        else:
            built[level] = FrequencyPrompts(spec.channels, num_tokens=number)
    return built


def frozen_tokens(method: str, pyramid: Pyramid, num_tokens: int, path: str) -> nn.ModuleDict:
    """The tokens that a distillation looks through: from a file, or untrained if ``path`` is empty; constants.

    Raises:
        FileNotFoundError, ValueError: see ``build_tokens`` and ``load_tokens``.
    """
    tokens = build_tokens(method, pyramid, num_tokens)
    if path:
        load_tokens(path, method, tokens, pyramid)
    return nn.ModuleDict(tokens).requires_grad_(False)


def untrained_tokens(path: str) -> dict[str, str]:
    """What a method's ``warnings`` say of tokens that come from no file."""
    if path:
        return {}
    return {
        "tokens": "the tokens are untrained: their masks are close to one half everywhere and select nothing; learn "
        "them on the teacher first (tools/learn_tokens.py, or acam-kd tokens) and set TOKENS to the file"
    }


def save_tokens(path: str, method: str, tokens: Mapping[str, TokenModule], pyramid: Pyramid) -> None:
    """Write learnt tokens, with what it takes to find the right ones again.

    Args:
        path: of the file.
        method: one of ``TOKEN_METHODS``.
        tokens: level of the teacher -> its tokens.
        pyramid: the teacher's, with at least these levels.
    """
    levels = {
        level: {
            "stride": pyramid[level].stride,
            "logits": pyramid[level].logits,
            "state": {name: value.detach().cpu() for name, value in module.state_dict().items()},
        }
        for level, module in tokens.items()
    }
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    buffer = io.BytesIO()
    torch.save({"method": method, "levels": levels}, buffer)
    write_atomically(path, buffer.getvalue())


def load_tokens(path: str, method: str, tokens: Mapping[str, TokenModule], pyramid: Pyramid) -> None:
    """Read a file of ``save_tokens`` into the tokens of a distillation.

    A distillation has the student's names for its levels, the file the teacher's, so a level's tokens are those of its
    stride, and, if the file has several of that stride, those of its name; a logit map's are those of the logit map.

    Args:
        path: the file.
        method: whose tokens are needed.
        tokens: level -> the module to fill.
        pyramid: the same levels, as the teacher has them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or its tokens are another method's, or those of other levels, channels or numbers.
    """
    levels = _read(path, method)
    found = describe({name: _spec(entry) for name, entry in levels.items()})
    for level, module in tokens.items():
        name = _name_of(level, pyramid[level], levels)
        if name is None:
            raise ValueError(
                f"the tokens in {path} have none, or several, for {describe({level: pyramid[level]})}; they are for "
                f"{found} {KEY}"
            )
        state: dict[str, Tensor] = levels[name]["state"]
        shape, needed = tuple(state["tokens"].shape), tuple(module.state_dict()["tokens"].shape)
        if shape != needed:
            raise ValueError(
                f"the tokens in {path} for {name} are {shape[-2]} of {shape[-1]} channels, those needed for {level} "
                f"{needed[-2]} of {needed[-1]} channels: they were learnt on another teacher, or with another number "
                "of tokens (keys: TOKENS, NUM_TOKENS)"
            )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise ValueError(f"the tokens in {path} for {name} do not fit: {reason} {KEY}") from error


def _read(path: str, method: str) -> dict[str, Any]:
    """The levels of a file, of the right kind."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there are no tokens: tried {os.path.abspath(path)} {KEY}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        levels = dict(content["levels"])
        found = str(content["method"])
        for entry in levels.values():
            _spec(entry)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no file of learnt tokens {KEY}") from error
    if found != method:
        raise ValueError(f"the tokens in {path} were learnt for {found}, and {method} needs its own {KEY}")
    return levels


def _spec(entry: Mapping[str, Any]) -> FeatureSpec:
    return FeatureSpec(entry["state"]["tokens"].shape[-1], entry["stride"], entry["logits"])


def _name_of(level: str, spec: FeatureSpec, levels: Mapping[str, Any]) -> str | None:
    """The level of a file that belongs to one of a distillation."""
    same = [
        name
        for name, entry in levels.items()
        if entry["logits"] == spec.logits and (spec.logits or entry["stride"] == spec.stride)
    ]
    if level in same:
        return level
    return same[0] if len(same) == 1 else None
