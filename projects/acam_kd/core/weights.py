"""Files of weights: which tensors a file holds, under which prefix they fit a model, and loading all of them."""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import ConfigError, first_line

__all__ = ["Fit", "fit", "is_safetensors", "load_file", "not_finite", "read_state_dict", "unreadable"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""The keys under which training programs put a state dict."""
ALLOWED = "a file of tensors by name, from torch.save(model.state_dict(), ...) or safetensors"
COUNTER = "num_batches_tracked"
"""The end of the names of counters that frozen batch normalisation has not; torch fills them in."""
SHOWN = 3


def read_state_dict(path: str, *, argument: str) -> dict[str, Tensor]:
    """Read the tensors of a file, by name.

    The file is torch's or safetensors', told apart by its content. A state dict may lie under one of ``WRAPPERS``, as
    in Lightning's checkpoints. Python objects are never unpickled.

    Args:
        path: the file.
        argument: the name of the argument that it was given as, for messages.

    Returns:
        The tensors, on the CPU, with the names that they have in the file.

    Raises:
        ConfigError: there is no such file, or it holds anything else than tensors by name.
    """
    if problem := _not_weights(path):
        raise ConfigError(argument, *problem)
    try:
        if is_safetensors(path):
            content: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that it then refuses
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch, pickle and safetensors make of a damaged file
        raise ConfigError(argument, f"{path}, {unreadable(error)}", ALLOWED, _remedy(error)) from error
    return _unwrapped(content, path, argument)


def _not_weights(path: str) -> tuple[str, str, str] | None:
    """Return the value, allowed and hint of an error if a path is clearly no file of weights."""
    if os.path.isdir(path):
        inside = sorted(name for name in os.listdir(path) if name.endswith((".pth", ".pt", ".ckpt", ".safetensors")))
        return f"the folder {path}", ALLOWED, f"name the file in it, as {inside[0]}" if inside else ""
    if not os.path.isfile(path):
        return f"no file {os.path.abspath(path)}", "an existing one", ""
    with open(path, "rb") as file:
        start = file.read(64)
    if not start:
        return f"{path}, which is empty", ALLOWED, "copy or download it again"
    if start.startswith(b"version https://git-lfs"):
        return f"{path}, a pointer of Git LFS and not the file itself", ALLOWED, "fetch it with git lfs pull"
    if start.lstrip()[:1] == b"<":
        return f"{path}, a web page", ALLOWED, "the download got a page instead of the file"
    if start.startswith(b"PK"):
        return (f"{path}, a zip archive that torch has not written", ALLOWED, "") if _is_foreign_zip(path) else None
    if start[:1] != b"\x80" and not is_safetensors(path):
        return f"{path}, which is a file of another kind", ALLOWED, ""
    return None


def _is_foreign_zip(path: str) -> bool:
    """Return True for a whole zip archive without the entry that torch's have."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not any(name.endswith("/data.pkl") for name in archive.namelist())
    except Exception:  # a damaged one; torch says how
        return False


def is_safetensors(path: str) -> bool:
    """Return True for a file that begins as safetensors' do: the length of a header, and a header in json."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= 100_000_000


def unreadable(error: BaseException) -> str:
    """Describe in the words of this project why a file of weights cannot be read.

    Torch advises to load a refused file with ``weights_only=False``, which would run code from it. So its words are
    not shown.

    Example:
        >>> unreadable(pickle.UnpicklingError("Unsupported global: GLOBAL mine.Net was not an allowed global"))
        'which holds Python objects (mine.Net), not only tensors'
    """
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"which holds Python objects ({found[1]}), not only tensors"
    if "TorchScript" in text:
        return "a TorchScript program"
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in text:
        return "a pickle that torch has not written, or a damaged one"
    return f"which cannot be read ({first_line(error)})"


def _remedy(error: BaseException) -> str:
    if re.search(r"GLOBAL|TorchScript", str(error)):
        return "objects could run any code, so save model.state_dict() where the file comes from"
    return "copy or download it again"


def _unwrapped(content: Any, path: str, argument: str) -> dict[str, Tensor]:
    """Take a state dict out of its wrappers."""
    while isinstance(content, Mapping):
        inner = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
        if len(inner) > 1:
            found = f"{path} with a state dict under each of {', '.join(inner)}"
            raise ConfigError(argument, found, ALLOWED, "save the one that is meant alone")
        if not inner:
            break
        content = content[inner[0]]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise ConfigError(argument, f"{path}, which is no dict of tensors but a {kind}", ALLOWED)
    others = [name for name, value in content.items() if not isinstance(value, Tensor) or not isinstance(name, str)]
    if others or not content:
        listed = f"has {_listed([str(name) for name in others])}" if others else "is empty"
        allowed = f"{ALLOWED}, alone or under one of {', '.join(WRAPPERS)}"
        raise ConfigError(argument, f"{path}, which is no dict of tensors: it {listed}", allowed)
    return dict(content)


@dataclass(frozen=True)
class Fit:
    """The tensors of a file that belong to a model."""

    prefix: str
    """The beginning of their names in the file, as ``module.``, which the model's names lack."""
    tensors: dict[str, Tensor]
    """The file's tensors below the prefix, under the names that they have in the model."""
    fitting: int
    """The number of the model's tensors that the file has in their shape."""
    needed: int
    """The number of the model's tensors."""
    missing: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    """The names that are missing in the file or unknown to the model, and the tensors of another shape, in words."""
    others: tuple[str, ...] = ()
    """Prefixes under which the whole model is in the file too."""

    def problem(self) -> str:
        """Return why the file is not this model's, in words; empty if all tensors fit."""
        if self.others:
            return (
                f"with the whole model under each of the prefixes {', '.join(map(repr, (self.prefix, *self.others)))}"
            )
        parts = [
            f"{words}: {_listed(names)}"
            for words, names in (
                ("missing in the file", self.missing),
                ("unknown to the model", self.unknown),
                ("of another shape", self.reshaped),
            )
            if names
        ]
        under = f" under the prefix {self.prefix!r}" if self.prefix else ""
        counted = f"with {self.fitting} of the model's {self.needed} tensors{under}"
        return f"{counted} ({'; '.join(parts)})" if parts else ""


def fit(state: Mapping[str, Tensor], module: nn.Module) -> Fit:
    """Find the tensors of a module in a state dict whose names may begin with a prefix.

    The prefix is the one under which most tensors have a name and a shape of the module's.

    Args:
        state: tensors by name; see ``read_state_dict``.
        module: the model, or a part of it.

    Returns:
        The tensors, and those that do not fit. Counters of batches are never missing or unknown.

    Example:
        >>> state = {f"module.{name}": value for name, value in nn.Linear(2, 3).state_dict().items()}
        >>> found = fit(state, nn.Linear(2, 3))
        >>> found.prefix, list(found.tensors), found.problem()
        ('module.', ['weight', 'bias'], '')
    """
    own = module.state_dict()
    needed = {name for name in own if not name.endswith(COUNTER)}
    counts: Counter[str] = Counter()
    for name, tensor in state.items():
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
            if name[start:] in needed and own[name[start:]].shape == tensor.shape:
                counts[name[:start]] += 1
    best = max(counts.values(), default=0)
    prefix, *others = sorted((p for p in counts if counts[p] == best), key=lambda p: (len(p), p)) or [""]
    tensors = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    return Fit(
        prefix,
        tensors,
        fitting=best,
        needed=len(needed),
        missing=tuple(name for name in own if name in needed and name not in tensors),
        unknown=tuple(name for name in tensors if name not in own and not name.endswith(COUNTER)),
        reshaped=tuple(
            f"{name} {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ),
        others=tuple(others) if needed and best == len(needed) else (),
    )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """List the names of the tensors that hold NaN or infinity."""
    return [n for n, tensor in state.items() if tensor.is_floating_point() and not tensor.float().isfinite().all()]


def load_file(module: nn.Module, path: str, *, argument: str) -> Fit:
    """Load a file into a module, all of its tensors or none.

    Args:
        module: the model; its parameters are overwritten.
        path: the file; see ``read_state_dict``.
        argument: the name of the argument that the file was given as, for messages.

    Returns:
        The tensors and their prefix in the file.

    Raises:
        ConfigError: the file cannot be read, a tensor is missing, superfluous or of another shape, or holds numbers
            that are not finite.
    """
    found = fit(read_state_dict(path, argument=argument), module)
    if problem := found.problem():
        hint = "save the one that is meant alone" if found.others else ""
        raise ConfigError(argument, f"{path} {problem}", "this model's weights", hint)
    if names := not_finite(found.tensors):
        raise ConfigError(argument, f"{path} with NaN or infinity in {_listed(names)}", "finite weights")
    module.load_state_dict(found.tensors)
    return found


def _listed(names: Any) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"
