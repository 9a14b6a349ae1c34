"""The adapter of classifiers in a ``Classifier``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer

from ..core import (
    BACKBONE,
    CLASSES,
    LOGITS,
    Adapter,
    FeatureSpec,
    ModuleAdapter,
    ModuleTap,
    Pixels,
    Reader,
    Targets,
)
from ..core.features import Features, Pyramid
from ..core.teacher import Extract
from .cifar_nets import CifarNet
from .classification import Classifier
from .stages import stages

__all__ = ["ClassifierAdapter", "family_of"]

TOKEN = "token"


def family_of(model: Classifier) -> str:
    """Return the kind of model that recipes are looked up by."""
    return "small_classifier" if isinstance(model.network, CifarNet) else "classifier"


class ClassifierAdapter(Adapter):
    """A classifier of torchvision's, or a small one: its stages, and ``classes``, its logits (N, K, 1, 1).

    The stages are ``c2`` to ``c5``, named after their strides of 4 to 32; those of a network for small images are
    ``c0`` to ``c2``. A vision transformer has ``token`` in their place, the class token after half of its blocks. A
    Swin transformer, whose maps have their channels last, has none.

    Args:
        model: the network in its criterion.
    """

    family = "classifier"
    annotations = ("labels", "ids")

    def __init__(self, model: Classifier) -> None:
        super().__init__(model)
        self.pixels = Pixels(model.image_mean, model.image_std, "RGB", 1.0)
        network: Any = model.network
        like = next(network.parameters())
        small, transformer = isinstance(network, CifarNet), isinstance(network, VisionTransformer)
        self.family = family_of(model)
        side = 32 if small else model.size if transformer else 224
        example = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
        found = stages(network, example, first=0 if small else 2)
        last = found.pop(LOGITS, "")
        if transformer or isinstance(network, SwinTransformer):
            found = {}
        self._token = len(network.encoder.layers) // 2 - 1 if transformer else None
        paths = {**found, **({CLASSES: last} if last else {})}
        self._parts = ModuleAdapter(network, paths, example_inputs=example, named=False)
        self._shapes = dict(self._parts.levels((BACKBONE, CLASSES)))
        if self._token is not None:
            self._shapes = {TOKEN: FeatureSpec(network.hidden_dim, side), **self._shapes}
        taps = {spec.tap for spec in self._shapes.values()}
        self.offered = tuple(tap for tap in (BACKBONE, CLASSES) if tap in taps)

    @property
    def name(self) -> str:
        """The kind of the network."""
        return type(self.model.network).__name__

    @property
    def inheriting(self) -> nn.Module:
        """The network itself."""
        return self.model.network  # type: ignore[return-value]

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> Pyramid:
        """Return the stages and the logits."""
        return {level: spec for level, spec in self._shapes.items() if spec.tap in taps}

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return the network."""
        return self.model.network, _Extract(self, tuple(taps))  # type: ignore[return-value]

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put taps on the stages, the last layer, and the network, which gets the batch."""
        reader = self._parts.reader(taps)
        if self._token is not None and BACKBONE in taps:
            block = self.model.network.encoder.layers[self._token]  # type: ignore[union-attr, index]
            reader.parts.append((ModuleTap(block, "encoder.layers"), _class_token))  # type: ignore[arg-type]
        whole = ModuleTap(self.model.network, "network")  # type: ignore[arg-type]
        reader.batch_from = whole
        reader.others.append(whole)
        return reader

    def targets(self, reader: Reader, *args: Any, **kwargs: Any) -> Targets:
        """Return class and number of each image."""
        targets = kwargs["targets"] if "targets" in kwargs else args[1]
        labels = self.model.labels(targets)  # type: ignore[operator]
        ids = [target.get("image_id") for target in targets]
        known = None if None in ids else torch.tensor(ids, device=labels.device)
        return Targets(labels={CLASSES: labels[:, None, None]}, ids=known)


def _class_token(output: Tensor, batch: Tensor) -> Mapping[str, Tensor]:
    return {TOKEN: output[:, 0, :, None, None]}


@dataclass(frozen=True)
class _Extract:
    """Runs the network of an adapter once, and returns its levels."""

    adapter: ClassifierAdapter
    taps: tuple[str, ...]

    def __call__(self, network: nn.Module, batch: Tensor) -> Features:
        reader = self.adapter.reader(self.taps)
        reader.arm()
        try:
            network(batch)
            return reader.read((batch,), {}).features
        finally:
            reader.remove()
