"""The state of a method: what it has learnt, for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .distiller import Distiller
from .errors import RunError

__all__ = ["load_state", "state_of"]


def _name(method: Distiller) -> str:
    return "+".join(type(part).__name__ for part in method.parts())


def state_of(method: Distiller, *, prefix: str = "", keep_vars: bool = False) -> Any:
    """Return what a method has learnt, with its name among the metadata."""
    state: Any = method.state_dict(prefix=prefix, keep_vars=keep_vars)
    state._metadata[prefix.removesuffix(".")]["method"] = _name(method)
    return state


def load_state(
    method: Distiller, state: Mapping[str, Any], *, saved_for: str = "", strict: bool = True, assign: bool = False
) -> Any:
    """Load what a method has learnt.

    Args:
        method: of this run.
        state: tensors by name.
        saved_for: the name of the method that it was saved for, if that is known.
        strict, assign: as of torch's ``load_state_dict``.

    Raises:
        RunError: it is the state of another method, or of other levels or channels.
    """
    if saved_for not in ("", _name(method)):
        raise RunError(
            f"the checkpoint is of {saved_for}, this run of {_name(method)}", "resuming",
            "resume with the same {method}, or start a new run from the student's weights",
        )  # fmt: skip
    try:
        return method.load_state_dict(state, strict=strict, assign=assign)
    except RuntimeError as error:
        known, given = method.state_dict().keys(), state.keys()
        odd = [*(f"{k} is missing" for k in known - given), *(f"{k} is unknown" for k in given - known)]
        reason = ", ".join(sorted(odd)[:2]) or " ".join(str(error).split())[:200]
        raise RunError(
            f"what the checkpoint's method has learnt does not fit {type(method).__name__} on "
            f"{', '.join(method.levels)}: {reason}", "resuming",
            "resume with the same {method}, options and {levels} (of a run of 0.1: {levels} all), or start a new run "
            "from the student's weights",
        ) from error  # fmt: skip
