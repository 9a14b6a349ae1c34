"""What the core's tests share."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that an operator returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


@pytest.fixture
def sizes() -> Sizes:
    return Sizes()
