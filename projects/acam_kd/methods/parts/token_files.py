"""The learnt tokens of a pyramid's levels, and the file that carries them from learning to distillation."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...core.errors import ConfigError
from ...core.features import FeatureSpec, Pyramid, describe
from ...files import write_atomically
from .tokens import FrequencyPrompts, ReceptiveTokens, TokenModule

__all__ = [
    "TOKEN_METHODS",
    "build_tokens",
    "check_teacher",
    "frozen_tokens",
    "load_tokens",
    "save_tokens",
    "untrained_tokens",
]

TOKEN_METHODS = ("MasKD", "FreeKD")
"""The methods whose tokens are learnt on the teacher, before the distillation."""


def build_tokens(method: str, pyramid: Pyramid, num_tokens: int = 0) -> dict[str, TokenModule]:
    """Build untrained tokens for each level.

    Args:
        method: one of ``TOKEN_METHODS``.
        pyramid: the teacher's levels.
        num_tokens: T; 0 for the papers' number: 6, and 8 on a logit map.

    Raises:
        ConfigError: a method without tokens, or a negative number.
    """
    if method not in TOKEN_METHODS:
        raise ConfigError("method", method, f"one of {', '.join(TOKEN_METHODS)}: the methods with tokens to learn")
    if num_tokens < 0:
        raise ConfigError("num_tokens", num_tokens, ">= 0", hint="0 stands for the paper's number")
    built: dict[str, TokenModule] = {}
    for level, spec in pyramid.items():
        number = num_tokens or (8 if spec.logits else 6)
        if method == "MasKD":
            built[level] = ReceptiveTokens(spec.channels, num_tokens=number, probability=not spec.logits)
        else:
            built[level] = FrequencyPrompts(spec.channels, num_tokens=number)
    return built


def frozen_tokens(method: str, pyramid: Pyramid, num_tokens: int, path: str) -> nn.ModuleDict:
    """Build the constant tokens of a distillation: from a file, or untrained if ``path`` is empty.

    Raises:
        ConfigError: see ``build_tokens`` and ``load_tokens``.
    """
    tokens = build_tokens(method, pyramid, num_tokens)
    if path:
        load_tokens(path, method, tokens, pyramid)
    return nn.ModuleDict(tokens).requires_grad_(False)


def untrained_tokens(path: str) -> dict[str, str]:
    """Return the warning about tokens that come from no file, for a method's ``warnings``."""
    if path:
        return {}
    return {
        "tokens": "the tokens are untrained: their masks are close to one half everywhere and select nothing; learn "
        "them with acam_kd.learn_tokens(teacher, batches, FILE) and set {tokens} to the file"
    }


def save_tokens(
    path: str, method: str, tokens: Mapping[str, TokenModule], pyramid: Pyramid, *, teacher: str = ""
) -> None:
    """Write learnt tokens to a file, with the method, and the stride and kind of each level.

    Args:
        path: of the file.
        method: one of ``TOKEN_METHODS``.
        tokens: level of the teacher -> its tokens.
        pyramid: the teacher's pyramid, with at least these levels.
        teacher: identifies the teacher, for ``check_teacher``; empty if unknown.
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
    torch.save({"method": method, "teacher": teacher, "levels": levels}, buffer)
    write_atomically(path, buffer.getvalue())


def load_tokens(path: str, method: str, tokens: Mapping[str, TokenModule], pyramid: Pyramid) -> None:
    """Read a file of ``save_tokens`` into the tokens of a distillation.

    A distillation has the student's level names, the file the teacher's, so a level gets the tokens of its stride. If
    the file has several levels of that stride, the name decides. A logit map gets the tokens of the logit map.

    Args:
        path: the file.
        method: the method that needs the tokens.
        tokens: level -> the module to fill.
        pyramid: the same levels, as the teacher has them.

    Raises:
        ConfigError: there is no such file, or it is of another kind. Or its tokens are those of another method, or of
            other levels, channels or numbers.
    """
    levels, _ = _read(path, method)
    known = describe({name: _spec(entry) for name, entry in levels.items()})
    for level, module in tokens.items():
        name = _name_of(level, pyramid[level], levels)
        if name is None:
            raise ConfigError(
                "tokens",
                f"{path} with none, or several, for {describe({level: pyramid[level]})}: its tokens are for {known}",
                "tokens for exactly one such level",
                hint="learn tokens on this teacher and set {tokens} to their file",
            )
        state: dict[str, Tensor] = levels[name]["state"]
        shape, needed = tuple(state["tokens"].shape), tuple(module.state_dict()["tokens"].shape)
        if shape != needed:
            raise ConfigError(
                "tokens",
                f"{path} with {shape[-2]} tokens of {shape[-1]} channels for {name}",
                f"{needed[-2]} of {needed[-1]} channels for {level}",
                hint="they were learnt on another teacher, or with another number of tokens: give others in {tokens} "
                "or change {num_tokens}",
            )
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[1:])
            raise ConfigError(
                "tokens",
                f"{path} with a state for {name} that does not fit: {reason}",
                f"a file of tokens learnt for {method}",
            ) from error


def check_teacher(path: str, method: str, teacher: str) -> None:
    """Raise ConfigError for a file whose tokens were learnt on another teacher, as far as both are known.

    Args:
        path: the file.
        method: the method that needs the tokens.
        teacher: identifies the teacher, as in ``save_tokens``; empty if unknown.
    """
    _, learnt_on = _read(path, method)
    if learnt_on and teacher and learnt_on != teacher:
        raise ConfigError(
            "tokens",
            f"{path}, learnt on a teacher with other weights",
            "tokens of this teacher",
            hint="delete the file, or set {tokens} to another one",
        )


def _read(path: str, method: str) -> tuple[dict[str, Any], str]:
    """Read the levels and the teacher's identity from a file of learnt tokens, and check its kind and method."""
    if not os.path.isfile(path):
        raise ConfigError("tokens", f"no file at {os.path.abspath(path)}", "a file of learnt tokens")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        levels = dict(content["levels"])
        learnt_for, learnt_on = str(content["method"]), str(content.get("teacher", ""))
        for name, entry in levels.items():
            _check_entry(name, entry)
    except Exception as error:  # whatever torch makes of a damaged file, and of other contents
        raise ConfigError("tokens", f"{path}, which holds no learnt tokens", "a file of learnt tokens") from error
    if learnt_for != method:
        raise ConfigError("tokens", f"{path}, learnt for {learnt_for}", f"tokens learnt for {method}")
    return levels, learnt_on


def _check_entry(name: Any, entry: Mapping[str, Any]) -> None:
    """Raise TypeError for a level of another form than ``save_tokens`` writes."""
    numbers = isinstance(entry["stride"], int) and isinstance(entry["logits"], bool)
    state = entry["state"]
    tensors = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not (isinstance(name, str) and numbers and tensors and state["tokens"].dim() >= 2):
        raise TypeError(f"level {name}")


def _spec(entry: Mapping[str, Any]) -> FeatureSpec:
    return FeatureSpec(entry["state"]["tokens"].shape[-1], entry["stride"], entry["logits"])


def _name_of(level: str, spec: FeatureSpec, levels: Mapping[str, Any]) -> str | None:
    """Return the level in the file that belongs to a level of the distillation, or None."""
    same = [
        name
        for name, entry in levels.items()
        if entry["logits"] == spec.logits and (spec.logits or entry["stride"] == spec.stride)
    ]
    if level in same:
        return level
    return same[0] if len(same) == 1 else None
