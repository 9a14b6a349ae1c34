"""The registries of the classes that a user may name: methods, fusions and maskings.

A module registers its class where it is defined, with the decorator ``@X_REGISTRY.register()``. A class that your own
project registers is found in the same way, under its class name. The contracts: ``core/distiller.py`` for a method,
``methods/acam/fusion.py`` for a fusion, ``methods/acam/masking.py`` for a masking.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.registry import Registry as _Registry

from .errors import ConfigError

__all__ = ["DISTILLER_REGISTRY", "FUSION_REGISTRY", "MASKING_REGISTRY", "Registry"]


class Registry(_Registry):  # type: ignore[misc]
    """fvcore's registry, with an error that lists the known names.

    Args:
        name: the registry's name.
        argument: the argument that names an entry, for the error; ``name`` if left out.
    """

    def __init__(self, name: str, *, argument: str = "") -> None:
        super().__init__(name)
        self._argument = argument or name

    def get(self, name: str, *, argument: str = "") -> Any:
        """Return the object registered under ``name``.

        Args:
            name: of the object.
            argument: the argument that gave the name, if it is not the registry's usual one.

        Raises:
            ConfigError: ``name`` is not registered; the message lists the names that are.
        """
        if name not in self:
            known = ", ".join(sorted(key for key, _ in self))
            raise ConfigError(argument or self._argument, name, f"one of {known}")
        return super().get(name)


DISTILLER_REGISTRY = Registry("distiller", argument="method")
FUSION_REGISTRY = Registry("fusion")
MASKING_REGISTRY = Registry("masking")
