"""A trunk's weights out of the file of a whole classifier, by name, else by order and shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import ConfigError
from .weights import COUNTER, fit, is_safetensors, not_finite, read_state_dict

__all__ = ["ORDERS", "TrunkFile", "load_trunk"]

ORDERS = ("RGB", "BGR")
"""The channel orders of images that a trunk may have been trained with."""
SHOWN = 3


@dataclass(frozen=True)
class TrunkFile:
    """The result of loading a trunk from a file.

    Args:
        loaded: the number of its tensors, which are all.
        unused: the number of the file's other tensors: the classifier's head, as a rule.
        prefix: the beginning of the names in the file that the trunk's names lack.
        by_name: the tensors were found by their names; else by their order and shapes.
    """

    loaded: int
    unused: int
    prefix: str = ""
    by_name: bool = True

    def __str__(self) -> str:
        how = "by name" if self.by_name else "by order and shape"
        under = f" under {self.prefix!r}" if self.prefix else ""
        return f"all {self.loaded} tensors {how}{under}, {self.unused} others unused"


def load_trunk(
    trunk: nn.Module,
    path: str,
    *,
    argument: str,
    order: str = "RGB",
    renamed: Mapping[str, str] | None = None,
) -> TrunkFile:
    """Load a trunk from the file of a classifier, all of the trunk's tensors or none.

    The file's tensors are found by name, perhaps under a prefix. Where not all names agree, as between torchvision and
    timm, the first tensors of the file must have the trunk's shapes, in its order. Other tensors of the file, as of the
    head, are left out.

    Args:
        trunk: the module, whose parameters and statistics are overwritten.
        path: torch's or safetensors' file; see ``read_state_dict``.
        argument: the name of the argument that the file was given as, for messages.
        order: of the channels that the file was trained with. With ``"BGR"`` the first convolution is turned, so that
            the trunk takes RGB.
        renamed: trunk's name of a tensor -> its name in the file, where they differ by a rule.

    Raises:
        ConfigError: the file cannot be read, or does not hold all of the trunk's tensors in their shapes, or holds
            numbers that are not finite.
    """
    state = read_state_dict(path, argument=argument)
    if renamed:
        theirs = {there: here for here, there in renamed.items()}
        prefix = _prefix(state, theirs)
        state = {theirs.get(name.removeprefix(prefix), name): value for name, value in state.items()}
    found = dataclasses.replace(fit(state, trunk), unknown=())
    needed = [name for name in trunk.state_dict() if not name.endswith(COUNTER)]
    counted = sum(not name.endswith(COUNTER) for name in state)
    if found.others:
        raise ConfigError(argument, f"{path} {found.problem()}", "one trunk", "save the one that is meant alone")
    if problem := found.problem():
        tensors, place = _by_order(state, trunk)
        if place:
            hint = "the names of safetensors are sorted, so save the file by torch.save" if is_safetensors(path) else ""
            raise ConfigError(
                argument, f"{path}, by name {problem}, and by order {place}", "the weights of this trunk", hint
            )
    else:
        tensors = {name: found.tensors[name] for name in needed}
    if names := not_finite(tensors):
        raise ConfigError(argument, f"{path} with NaN or infinity in {', '.join(names[:SHOWN])}", "finite weights")
    if order == "BGR":
        tensors = _turned(tensors, needed[0], path, argument)
    counters = {name: value for name, value in trunk.state_dict().items() if name.endswith(COUNTER)}
    trunk.load_state_dict({**counters, **tensors})
    return TrunkFile(len(needed), counted - len(needed), "" if problem else found.prefix, by_name=not problem)


def _prefix(state: Mapping[str, Tensor], theirs: Mapping[str, str]) -> str:
    """Return the prefix under which most of the names lie."""
    prefixes = {name[: -len(known)] for name in state for known in theirs if name.endswith(known)}
    return max(sorted(prefixes, key=len), key=lambda p: sum(p + known in state for known in theirs), default="")


def _by_order(state: Mapping[str, Tensor], trunk: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Pair the trunk's tensors with the first ones of the file; else say where the two part."""
    own = {name: value for name, value in trunk.state_dict().items() if not name.endswith(COUNTER)}
    theirs = [(name, value) for name, value in state.items() if not name.endswith(COUNTER)]
    for place, (name, value) in enumerate(own.items()):
        if place >= len(theirs):
            return {}, f"it ends before {name}, after {place} of {len(own)} tensors"
        other, tensor = theirs[place]
        if tensor.shape != value.shape:
            shapes = f"{tuple(tensor.shape)}, and the trunk {name} {tuple(value.shape)}"
            return {}, f"it has {other} {shapes} at place {place + 1} of {len(own)}"
    return {name: tensor for name, (_, tensor) in zip(own, theirs)}, ""


def _turned(tensors: dict[str, Tensor], first: str, path: str, argument: str) -> dict[str, Tensor]:
    weight = tensors[first]
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise ConfigError(
            argument, f"{path}, whose first tensor {first} is {tuple(weight.shape)}", "a convolution of three channels",
            "leave the order of channels at RGB",
        )  # fmt: skip
    return {**tensors, first: torch.flip(weight, (1,))}
