"""A counter of the kernels that a step launches on a GPU, by the operators that run: no GPU is needed."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NOTHING = ("empty", "new_empty", "_unsafe_view", "is_same_size", "promote_types", "_reshape_alias", "lift_fresh")


class Launches(TorchDispatchMode):
    """Counts operators, without views and without those that only allocate.

    An operator is at least one kernel, and nearly always exactly one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        returned = [r.alias_info for r in func._schema.returns]
        view = bool(returned) and all(info is not None and not info.is_write for info in returned)
        if not view and not name.startswith(NOTHING):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.names.values())
