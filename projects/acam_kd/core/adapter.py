"""Adapters: everything that the assembly asks of one model, and the adapter of any ``nn.Module``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .distillation import Distillation
from .errors import ConfigError
from .features import BACKBONE, CLASSES, LOGITS, FeatureSpec, Pyramid
from .measure import Example, measured, own_pixels, submodule_of
from .paths import Path, Paths
from .reader import Convert, Reader, as_mapping
from .scores import ReadScores
from .taps import EntryTap, ModuleTap
from .targets import Targets
from .teacher import Extract, Pixels, call

__all__ = ["Adapter", "ModuleAdapter"]


class Adapter:
    """The answers that the assembly needs from one model; every engine has a subclass.

    Args:
        model: the model.
    """

    family: str = ""
    """The kind of model that a recipe may be for: ``retinanet``, ``fcos``, ``rcnn``, ``semseg``; else empty."""
    offered: tuple[str, ...] = (BACKBONE,)
    """The taps that the model has, the usual first."""
    on_request: tuple[str, ...] = ()
    """Taps that it has too, and that no method uses unless a user or a recipe asks for them."""
    annotations: tuple[str, ...] = ("boxes", "labels")
    """The annotations that its training inputs may have."""
    pixels: Pixels | None = None
    """Mean, standard deviation and order of its channels; None if they are unknown."""
    class_names: Sequence[str] = ()
    """The classes that it predicts, in their order; empty if they are unknown. The background of a class head may be
    left out."""
    class_layers: Sequence[str] = ()
    """The prefixes of the tensors, among those that are inherited, that belong to single classes."""
    box_dimension = 4
    """Numbers of a box: 5 if boxes are rotated."""
    distillation: type[Distillation] = Distillation
    """The engine's own class of an attached distillation."""
    read_scores: ReadScores | None = None
    """A detector and its levels -> the largest probability of a class at each position; None for other models."""
    named = False
    """Its levels were named by the user, one by one."""
    images: Tensor | None = None
    """The batch by which it was measured, where the example is the arguments of its forward and has no batch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def name(self) -> str:
        """Its kind, for messages."""
        return type(self.model).__name__

    @property
    def kind(self) -> Any:
        """Models of equal kinds inherit by default; None for a kind that never does."""
        return None

    @property
    def inheriting(self) -> nn.Module:
        """The module whose tensors are inherited, by name."""
        return self.model

    @property
    def trunk(self) -> str:
        """The prefix of the tensors that are never inherited."""
        return "backbone."

    def background(self, spec: FeatureSpec) -> int | None:
        """Return the channel of the background in predictions that have one without a name, 0 or the last."""
        return None

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> Pyramid:
        """Return channels and stride of every level that the taps give.

        Args:
            taps: some of ``offered``.
            side: of the images by which levels are measured, where they are measured; 0 for the model's own.
            student: the class head will be tapped, not asked.
        """
        raise NotImplementedError

    def side(self) -> int:
        """Return the side of the images by which the model is measured, 0 if it says its shapes itself."""
        return 0

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return as much of the model as the taps need, and the function that makes features of it and a batch."""
        raise NotImplementedError

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put taps on the model, as a student."""
        raise NotImplementedError

    def logits_module(self) -> nn.Module | None:
        """Return the module whose output is the map of logits, None if there is no such tap."""
        return None

    def anchors(self) -> list[Tensor] | None:
        """Return the anchors of a dense class head, for comparison; None for a head of regions."""
        return None

    def targets(self, reader: Reader, *args: Any, **kwargs: Any) -> Targets:
        """Return what the arguments of the student's forward say of the batch."""
        return Targets()


class ModuleAdapter(Adapter):
    """Any module: its levels by the paths of submodules, or a ``backbone`` that returns maps by name.

    A level called ``logits`` or ``classes`` is what the model predicts: (N, K) or (N, K, H, W). The pixel statistics of
    a teacher are those that it says of itself, as timm's networks do.

    Args:
        model: called with a batch (N, C, H, W) first among its arguments; or a student, one of whose parts is.
        levels: level name -> path of a submodule, as ``blocks.11[0]`` with a key or an index of what it returns; None
            for the outputs of ``model.backbone``.
        example_inputs: a batch, or the arguments of the model, by which channels and strides are measured; noise of
            1 x 3 x 224 x 224 if left out.
        role: ``"student"`` or ``"teacher"``, for messages.
        named: the user has named the levels, so that those of one name belong together.

    Raises:
        ConfigError: a path does not exist, or gives no map, or the example does not fit the model.
    """

    annotations = ("boxes", "labels", "ids")

    def __init__(
        self,
        model: nn.Module,
        levels: Mapping[str, str] | None = None,
        *,
        example_inputs: Any = None,
        role: str = "student",
        named: bool = True,
    ) -> None:
        super().__init__(model)
        self.role, self.named = role, bool(levels) and named
        self._example = Example(example_inputs, self.name)
        self._shapes: dict[str, FeatureSpec] = {}
        self._parts = self._measured_parts(levels) if levels else []
        if not levels and not isinstance(getattr(model, "backbone", None), nn.Module):
            paths = [path for path, _ in model.named_children()]
            raise ConfigError(
                f"{role}_levels", "nothing", "level name -> path of a submodule",
                f"{self.name} is of no known kind and has no backbone; its parts are {', '.join(paths[:12])}",
            )  # fmt: skip
        self.class_layers = [f"{part.path}." for part in self._parts if self._shapes[part.level].logits]
        taps = {spec.tap for spec in self._shapes.values()} if levels else {BACKBONE}
        self.offered = tuple(tap for tap in (BACKBONE, LOGITS, CLASSES) if tap in taps)

    def levels(self, taps: Sequence[str], *, side: int = 0, student: bool = False) -> Pyramid:
        """Return the measured levels."""
        if not self._parts:
            self._shapes = self._measured_backbone()
        return {level: spec for level, spec in self._shapes.items() if spec.tap in taps}

    def network(self, taps: Sequence[str]) -> tuple[nn.Module, Extract]:
        """Return the model, or its backbone alone.

        Raises:
            ConfigError: a teacher takes no batch, and a part of it that is not below the one that takes it is tapped.
        """
        if not self._parts:
            return self.model.backbone, call  # type: ignore[return-value]
        used, entry = self._used(taps), self._example.entry
        outside = [p for p in used if entry and not f"{p.path}.".startswith(f"{entry}.")]
        if outside and self.role == "teacher":
            raise ConfigError(
                "teacher_levels", f"{outside[0].level}: {outside[0].path}", f"parts of {entry}, which gets the images",
                f"a {self.name} takes no batch of images, so that part alone runs on the student's",
            )  # fmt: skip
        return self.model, Paths(used, self.role, entry=entry)

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put a tap on every submodule."""
        if not self._parts:
            tap = ModuleTap(self.model.backbone, "backbone")  # type: ignore[arg-type]
            return Reader([(tap, as_mapping)], batch_from=tap)
        parts: list[tuple[Any, Convert]] = [
            (ModuleTap(self.model.get_submodule(part.path), part.path), part) for part in self._used(taps)
        ]
        entry = self._example.entry
        images = EntryTap(self.model.get_submodule(entry), entry) if entry else None
        return Reader(parts, batch_from=images, others=[images] if images else [])

    def _used(self, taps: Sequence[str]) -> list[Path]:
        return [part for part in self._parts if self._shapes[part.level].tap in taps]

    def _measured_parts(self, levels: Mapping[str, str]) -> list[Path]:
        """Run the example once; the shape of every output says channels, stride and leading tokens."""
        taps: dict[str, ModuleTap] = {}
        for level, named in levels.items():
            path = submodule_of(self.model, level, named, self.role)
            taps[level] = ModuleTap(self.model.get_submodule(path), path)
        try:
            for tap in taps.values():
                tap.arm()
            batch = self._example.run(self.model)
            outputs = {level: self._only_output(level, tap) for level, tap in taps.items()}
        finally:
            for tap in taps.values():
                tap.remove()
        self.images = self._example.images
        if self.role == "teacher":
            self.pixels = own_pixels(self.model, batch.shape[1])
        found = {level: measured(level, levels[level], x, batch, self.role) for level, x in outputs.items()}
        self._shapes = {level: spec for level, (_, spec) in found.items()}
        return [part for part, _ in found.values()]

    def _only_output(self, level: str, tap: ModuleTap) -> Any:
        try:
            return tap.read().output
        except ConfigError as error:
            if tap.times == 1:  # and its output was changed in place
                raise ConfigError(
                    f"{self.role}_levels", f"{level}: {error.value}", error.allowed, error.hint
                ) from error
            runs = "runs more than once" if tap.times else "does not run"
            raise ConfigError(
                f"{self.role}_levels", f"{level}: {tap.name}, which {runs} on the example", "one call",
                "name a submodule that the model calls once",
            ) from error  # fmt: skip

    def _measured_backbone(self) -> dict[str, FeatureSpec]:
        backbone: nn.Module = self.model.backbone  # type: ignore[assignment]
        tap = ModuleTap(backbone, "backbone")
        tap.arm()
        try:
            batch = self._example.run(backbone)
            output = tap.read().output
        finally:
            tap.remove()
        if not isinstance(output, Mapping):
            raise ConfigError(
                f"{self.role}_levels", f"nothing, and a {type(output).__name__} from the backbone of a {self.name}",
                "level name -> path of a submodule", f"{self.role}_levels={{'c4': 'backbone.layer3'}}, say",
            )  # fmt: skip
        return {name: FeatureSpec(x.shape[1], round(batch.shape[2] / x.shape[2])) for name, x in output.items()}
