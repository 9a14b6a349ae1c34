"""The fixtures of the tests of core and methods: official inputs, and the sizes of all tensors."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """A mode that records the number of elements of every tensor that an operator returns, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen.extend(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result


class Official:
    """The inputs for which the methods' official code printed the figures that the tests hold ours to.

    No random numbers: ``wave`` is scale * sin(a * k + b) + shift for k = 0, 1, ... in C order, computed in float64.
    """

    rtol = 1e-4

    def __init__(self) -> None:
        self.student = self.wave((2, 8, 6, 10), 0.37, 0.1)
        self.teacher = self.wave((2, 8, 6, 10), 0.53, 0.7, 1.5, 0.2)
        self.student_logits = self.wave((6, 10), 0.7, 0.2, 3)
        self.teacher_logits = self.wave((6, 10), 0.9, 0.4, 3)
        self.labels = torch.tensor([3, 1, 4, 1, 5, 9])

    @staticmethod
    def wave(shape: tuple[int, ...], a: float, b: float, scale: float = 1, shift: float = 0) -> torch.Tensor:
        k = np.arange(np.prod(shape), dtype=np.float64)
        return torch.from_numpy(scale * np.sin(a * k + b) + shift).float().reshape(shape)

    def fill(self, parameters: Iterable[torch.nn.Parameter], scale: float) -> None:
        """Fill the i-th parameter with a wave of its own."""
        with torch.no_grad():
            for i, p in enumerate(parameters):
                p.copy_(self.wave(tuple(p.shape), 0.31, 0.17 * i, scale))


@pytest.fixture
def official() -> Official:
    return Official()


@pytest.fixture
def sizes() -> Sizes:
    return Sizes()
