"""Detectron2's checkpointer, made to refuse files that would run code, and to name the file that it cannot read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils.file_io import PathManager
from torch import Tensor

from ..core.errors import ConfigError, RunError
from ..core.weights import unreadable

__all__ = ["check_pickle", "read_safely"]

ALLOWED = "a checkpoint of Detectron2, or a file of tensors"
PICKLE = "a checkpoint that is a pickle of arrays by name"
HARMLESS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
}
"""The module and name of everything that arrays in a pickle need."""


class _Unpickler(pickle.Unpickler):
    """Unpickles arrays, numbers, texts and containers, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in HARMLESS:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return super().find_class(module, name)


def check_pickle(path: str, argument: str) -> None:
    """Refuse a ``.pkl`` file that holds anything else than arrays: Detectron2 reads it by ``pickle``, which runs code.

    Args:
        path: any file of weights; other suffixes are left to torch, which refuses objects itself.
        argument: the name of the argument that it was given as, for messages.

    Raises:
        ConfigError: the file has other objects, or cannot be read.
    """
    if not path.endswith(".pkl"):
        return
    try:
        with PathManager.open(path, "rb") as file:
            content = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # whatever pickle and numpy make of a damaged file
        hint = "objects could run any code: convert the file where it comes from" if "GLOBAL" in str(error) else ""
        raise ConfigError(argument, f"{path}, {unreadable(error)}", PICKLE, hint) from error
    if not isinstance(content, dict):
        raise ConfigError(argument, f"{path}, a pickle of {type(content).__name__}", PICKLE)


def read_safely(checkpointer: DetectionCheckpointer, argument: str = "MODEL.WEIGHTS") -> DetectionCheckpointer:
    """Let a checkpointer refuse files that would run code, and name the file that it cannot read.

    Args:
        checkpointer: is changed.
        argument: the name of the argument that files of weights are given as, for messages.

    Returns:
        The same checkpointer, whose ``load`` raises ConfigError for a file of weights that cannot be used, and
        RunError for the last checkpoint of its folder.
    """
    checkpointer._load_file = partial(_load_file, checkpointer, argument)
    return checkpointer


def _load_file(checkpointer: DetectionCheckpointer, argument: str, path: str) -> dict[str, Any]:
    try:
        check_pickle(path, argument)
        try:
            loaded = type(checkpointer)._load_file(checkpointer, path)
        except Exception as error:  # whatever torch makes of a damaged or foreign file
            raise ConfigError(argument, f"{path}, {unreadable(error)}", ALLOWED) from error
        if problem := _problem(loaded):
            raise ConfigError(argument, f"{path}, {problem}", ALLOWED)
    except ConfigError as error:
        if not _is_last(checkpointer, path):
            raise
        what = f"it cannot be resumed from: found {error.value}, expected {error.allowed}"
        raise RunError(what, path, "name another checkpoint in last_checkpoint, or start in another folder") from error
    return loaded


def _problem(loaded: dict[str, Any]) -> str:
    model = loaded.get("model")
    if not isinstance(model, Mapping) or not model:
        return "which has no tensors by name"
    wrong = [str(k) for k, v in model.items() if not isinstance(v, (Tensor, np.ndarray)) or not isinstance(k, str)]
    return f"which is no dict of tensors: it has {wrong[0]}" if wrong else ""


def _is_last(checkpointer: DetectionCheckpointer, path: str) -> bool:
    last = checkpointer.get_checkpoint_file() if checkpointer.save_dir and checkpointer.has_checkpoint() else ""
    return bool(last) and os.path.abspath(last) == os.path.abspath(path)
