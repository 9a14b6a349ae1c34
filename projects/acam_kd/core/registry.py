"""The registries of everything that a config file may name.

A module registers its class with the decorator ``@X_REGISTRY.register()``, where it is defined; what a
project of your own registers is found in the same way, under its class name.
"""

from __future__ import annotations

from typing import Any

from fvcore.common.registry import Registry as _Registry

__all__ = ["DISTILLER_REGISTRY", "FUSION_REGISTRY", "MASKING_REGISTRY", "Registry"]


class Registry(_Registry):  # type: ignore[misc]
    """fvcore's registry, with an error that lists the known names."""

    def get(self, name: str) -> Any:
        """Return the object registered under ``name``.

        Raises:
            KeyError: ``name`` is not registered; the message lists the names that are.
        """
        if name not in self:
            known = ", ".join(sorted(key for key, _ in self))
            raise KeyError(f"no {self._name} is called {name!r}; known: {known}")
        return super().get(name)


DISTILLER_REGISTRY = Registry("distiller")
FUSION_REGISTRY = Registry("fusion")
MASKING_REGISTRY = Registry("masking")
