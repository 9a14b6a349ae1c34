"""Tokens for a run that needs them: read from a file, or learnt into it by one process while the others wait."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ...core.adapter import Adapter
from ...core.distiller import method_arguments
from ...core.errors import ConfigError, RunError
from ...core.features import LOGITS, Pyramid
from ...core.methods import levels_read
from ...core.options import all_arguments, note_own
from ...core.registry import DISTILLER_REGISTRY
from ...core.selection import choose_taps
from .shared_file import make_once
from .token_files import TOKEN_METHODS, build_tokens, check_teacher, save_tokens
from .token_learning import TokenLearning, learn_tokens

__all__ = ["TokenFile", "ensure_tokens", "learn_to_file"]


@dataclass(frozen=True)
class TokenFile:
    """A file of tokens, and the arguments by which they are learnt where it does not exist.

    Args:
        path: the file.
        method: ``MasKD`` or ``FreeKD``.
        num_tokens: see ``build_tokens``.
        iterations, learning_rate: see ``learn_tokens``.
        teacher: identifies the teacher, for ``check_teacher``; empty if unknown.
        taps: the method's own; empty for those of all methods.
    """

    path: str
    method: str
    num_tokens: int = 0
    iterations: int = 2000
    learning_rate: float = 0.01
    teacher: str = ""
    taps: tuple[str, ...] = ()


def ensure_tokens(
    methods: Mapping[str, Mapping[str, Any]],
    folder: str | os.PathLike[str],
    learn: Callable[[TokenFile], object],
    *,
    teacher: Callable[[], str],
    first: bool,
    log: logging.Logger,
) -> dict[str, str]:
    """Return the files of the tokens that the methods of a run need, after they were learnt if they do not exist.

    Several processes, of one run or of several, may ask for one file. One learns the tokens and the others wait; no
    process group is needed.

    Args:
        methods: name -> its settings, where None leaves one open.
        folder: of the run; ``tokens_<method>.pth`` in it is the file of a method whose ``tokens`` are empty.
        learn: learns the tokens of a file and writes it.
        teacher: returns what identifies the teacher, as the hash of its weights; called if a method needs tokens.
        first: this process may learn; of the processes of one run only the first may.
        log: gets a line for each file.

    Returns:
        Method -> file.

    Raises:
        ConfigError: an argument is out of range, or a file has tokens of another method or teacher.
        RunError: learning failed, here or in the process that this one waits for; or a file cannot be written.
    """
    files: dict[str, str] = {}
    for method in [name for name in methods if name in TOKEN_METHODS]:
        known = all_arguments(method)
        given = known | {name: value for name, value in methods[method].items() if value is not None}
        path = given["tokens"]
        if not path:
            path = os.path.join(folder, f"tokens_{method.lower()}.pth")
            note_own(method, "tokens", path)
        wanted = TokenFile(
            path, method, given["num_tokens"], given["token_iterations"], teacher=teacher(), taps=tuple(given["taps"])
        )
        try:
            if wanted.iterations < 1:
                raise ConfigError("token_iterations", wanted.iterations, ">= 1")
            _ensure(wanted, learn, first, log)
            check_teacher(path, method, wanted.teacher)
        except ConfigError as error:
            raise error.of(method, method_arguments(DISTILLER_REGISTRY.get(method))) from error
        log.info("tokens of %s: %s", method, path)
        files[method] = path
    return files


def _ensure(wanted: TokenFile, learn: Callable[[TokenFile], object], first: bool, log: logging.Logger) -> None:
    def make() -> None:
        log.info("learning the tokens of %s in %d steps, for %s", wanted.method, wanted.iterations, wanted.path)
        with _seeded():
            learn(wanted)

    def waiting() -> None:
        log.info("waiting for %s, which another process learns", wanted.path)

    make_once(wanted.path, make, first=first, waiting=waiting)


def learn_to_file(
    adapter: Adapter, batches: Iterable[tuple[Any, ...]], wanted: TokenFile, taps: Sequence[str] = ()
) -> list[dict[str, float]]:
    """Learn the tokens of a method on a teacher, and write them to a file.

    The tokens depend on the arguments alone, not on the random state of the process. That state, and the modes and
    flags of the teacher, are the same afterwards.

    Args:
        adapter: of the teacher, which has its weights and is on its device.
        batches: see ``learn_tokens``.
        wanted: the file.
        taps: of the distillation, for a method without its own; empty for the first that the method can use.

    Returns:
        The losses of every logged step.

    Raises:
        ConfigError: the method has no tokens, or no levels of the teacher that it can use.
        RunError: a loss is not finite, or the file cannot be written.
    """
    model, log = adapter.model, adapter.distillation.logger
    device = next(model.parameters()).device
    with _seeded(), _unchanged(model):
        levels = _levels(adapter, wanted.method, wanted.taps or taps)
        tokens = build_tokens(wanted.method, levels, wanted.num_tokens)
        learning = TokenLearning(model, tokens, logits=adapter.logits_module() if LOGITS in levels else None)
        learning.to(device)
        logged = learn_tokens(
            learning, batches, iterations=wanted.iterations, learning_rate=wanted.learning_rate, log=log
        )
    try:
        save_tokens(wanted.path, wanted.method, tokens, levels, teacher=wanted.teacher)
    except OSError as error:
        reason = error.strerror or error
        raise RunError(
            f"the learnt tokens cannot be written ({reason})", wanted.path, "make room on the disk"
        ) from error
    return logged


def _levels(adapter: Adapter, method: str, taps: Sequence[str]) -> Pyramid:
    """Return the teacher's levels that the method's distillation can use, with the taps that it will have."""
    taps = tuple(taps) or choose_taps(method, adapter.offered, adapter.name)
    if missing := [tap for tap in taps if tap not in adapter.offered]:
        allowed = f"{' or '.join(adapter.offered)} of the teacher, a {adapter.name}"
        raise ConfigError("taps", " and ".join(missing), allowed)
    return levels_read(method, adapter.levels(taps))


@contextmanager
def _seeded() -> Iterator[None]:
    """Run a block from fixed seeds, and leave no trace of it in random states, compiled code and peaks of memory.

    Optimised execution is off. Otherwise TorchScript profiles here, and the first training losses round differently.
    """
    states = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=cuda), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Give modules their modes and parameters their flags back after a block."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
