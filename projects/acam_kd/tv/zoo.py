"""Models and weights that torchvision has by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchvision.models import get_model, get_model_weights

from ..core.errors import ConfigError, RunError

__all__ = ["check_weights", "downloading", "get"]


def check_weights(name: str, weights: str | None, argument: str = "weights") -> None:
    """Raise ConfigError for weights that torchvision does not have of a model.

    Args:
        name: of the model.
        weights: their name; None and an empty one are no weights.
        argument: the name of the argument that they were given as, for messages.
    """
    known = ["DEFAULT", *(entry.name for entry in get_model_weights(name))]
    if weights and weights not in known:
        raise ConfigError(argument, f"{weights} for {name}", allowed=f"one of {', '.join(known)}, or a file")


def get(name: str, **arguments: Any) -> Any:
    """Build torchvision's model of a name.

    Raises:
        RunError: its weights cannot be downloaded.
    """
    with downloading(name):
        return get_model(name, **arguments)


@contextmanager
def downloading(name: str) -> Iterator[None]:
    """Raise RunError, which names the model, for weights that cannot be downloaded."""
    try:
        yield
    except OSError as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"the weights cannot be downloaded ({reason})", where=name, remedy="check the network, or give a file"
        ) from error
