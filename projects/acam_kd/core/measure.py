"""The measurement of a module by one example: the shapes of its parts, and the part that is given the images."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError, first_line
from .features import CLASSES, LOGITS, FeatureSpec
from .paths import MOST_LEADING, Path, folded, is_map, keys_of, pick, split_key
from .reader import first_batch
from .teacher import Pixels, evaluating

__all__ = ["Example", "measured", "own_pixels", "submodule_of"]

BATCH = "a batch (N, C, H, W) among the arguments, its own or those of a part"


class Example:
    """The inputs by which a model is measured.

    Args:
        inputs: a batch, or the arguments of the model; a list of dicts is one argument, as Detectron2's models have it;
            None for noise of 1 x 3 x 224 x 224.
        name: of the model's kind, for messages.
    """

    def __init__(self, inputs: Any, name: str) -> None:
        self.inputs, self.name = inputs, name
        self.entry = ""
        """The path of the submodule that was given the images, where they are no argument of the network."""
        self.images: Tensor | None = None
        """The images that it was given."""

    @torch.no_grad()
    def run(self, network: nn.Module) -> Tensor:
        """Run a network on the inputs, in evaluation mode, and return the batch of images (N, C, H, W).

        Raises:
            ConfigError: the network does not take them, or there is no such batch.
        """
        args, kwargs = self._arguments(network)
        batch = first_batch([*args, *kwargs.values()])
        entries: list[tuple[str, Tensor]] = []
        try:
            with evaluating(network), torch.random.fork_rng(devices=[]), _recording(network, entries):
                network(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError, IndexError) as error:
            found = f"{tuple(batch.shape)}" if batch is not None else type(self.inputs).__name__
            raise ConfigError(
                "example_inputs", f"{found}, on which a {self.name} fails: {first_line(error)[:160]}",
                "inputs that it takes" if entries or batch is not None else BATCH,
                "a batch of another size, or the arguments of its forward as a tuple",
            ) from error  # fmt: skip
        if batch is None:
            if not entries:
                raise ConfigError("example_inputs", type(self.inputs).__name__, BATCH)
            self.entry, self.images = entries[0]
            return self.images
        return batch

    def _arguments(self, network: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = self.inputs
        if inputs is None:
            noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            like = next((p for p in network.parameters() if p.is_floating_point()), noise)
            return (noise.to(like.device, like.dtype),), {}
        if isinstance(inputs, Mapping):
            return (), dict(inputs)
        if isinstance(inputs, list) and inputs and all(isinstance(x, Mapping) for x in inputs):
            return (inputs,), {}
        return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@contextmanager
def _recording(network: nn.Module, found: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Record the first submodule whose first argument is a batch of images, and that batch."""
    handles = []
    for path, module in network.named_modules():

        def before(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            if not found and path and args and isinstance(args[0], Tensor) and args[0].dim() == 4:
                found.append((path, args[0]))

        handles.append(module.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def submodule_of(model: nn.Module, level: str, named: str, role: str) -> str:
    """Return the path of a level's submodule, without a key of what it returns.

    Raises:
        ConfigError: there is no such submodule; those of nearly that name are listed.
    """
    modules = dict(model.named_modules())
    path = named if named in modules else split_key(named)[0]
    if path in modules and path:
        return path
    shallow = [name for name in modules if name and name.count(".") <= path.count(".")]
    close = {*difflib.get_close_matches(path, shallow, n=8, cutoff=0.8)}
    above = path
    while above not in modules:  # up to the model itself, whose path is empty
        above = above.rpartition(".")[0]
    below = [f"{above}.{name}" if above else name for name, _ in modules[above].named_children()]
    known = [name for name in modules if name in close] or below[:8]
    raise ConfigError(f"{role}_levels", f"{level}: {named}", f"a submodule, as {', '.join(known)}")


def measured(level: str, named: str, whole: Any, batch: Tensor, role: str) -> tuple[Path, FeatureSpec]:
    """Return how the output of a submodule on the example is read as a map, and the shape of its level.

    Args:
        level: its name; ``logits`` and ``classes`` are predictions.
        named: the path of the submodule, with a key or an index of its output.
        whole: its output.
        batch: the images, (N, C, H, W).
        role: ``"student"`` or ``"teacher"``, for messages.

    Raises:
        ConfigError: the output is no map, no vector and no map of tokens.
    """
    module, key = split_key(named)
    output, predicted = pick(whole, key), level in (LOGITS, CLASSES)
    number, (height, width) = len(batch), batch.shape[2:]
    hint = "name a submodule below it, or another one"
    if isinstance(output, Tensor) and output.dim() == 2:
        return Path(module, level, "NC", key=key), FeatureSpec(output.shape[1], 0, logits=True)
    if isinstance(output, Tensor) and output.dim() == 4:
        for axes, seen in (("NCHW", output), ("NHWC", output.permute(0, 3, 1, 2))):
            if is_map(seen, height, width) and seen.shape[0] == number and max(seen.shape[2:]) <= max(height, width):
                stride = round(height / seen.shape[2])
                return Path(module, level, axes, 0, stride, key), FeatureSpec(seen.shape[1], stride, logits=predicted)
    if isinstance(output, Tensor) and output.dim() == 3:
        axes = "LNC" if output.shape[1] == number != output.shape[0] else "NLC"
        tokens = output.shape[axes.index("L")]
        if found := folded(tokens, height, width):
            spec = FeatureSpec(output.shape[2], found[1], logits=predicted)
            return Path(module, level, axes, *found, key), spec
        hint += f"; {tokens} tokens, 0 to {MOST_LEADING} leading ones left out, are no patches of {height} x {width}"
    elif not isinstance(output, Tensor) and (keys := keys_of(whole)):
        hint += f"; or a part of its output: {', '.join(f'{module}[{name}]' for name in keys[:8])}"
    shape = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    shape = "nothing" if output is None else shape
    raise ConfigError(
        f"{role}_levels", f"{level}: {named}, which gives {shape}",
        "(N, C, H, W), (N, H, W, C), tokens (N, L, C) or (N, K)", hint,
    )  # fmt: skip


def own_pixels(model: nn.Module, channels: int) -> Pixels | None:
    """Return the pixel statistics that a network of timm says of itself, None if there are none.

    Args:
        model: timm's networks have them in ``pretrained_cfg``, of pixels from 0 to 1.
        channels: of its images; statistics of others are none of its own.
    """
    said = getattr(model, "pretrained_cfg", None)
    said = said if isinstance(said, Mapping) else {}
    mean, std = said.get("mean"), said.get("std")
    if not isinstance(mean, (tuple, list)) or not isinstance(std, (tuple, list)):
        return None
    return Pixels(mean, std, "RGB", 1.0) if len(mean) == len(std) == channels else None
