"""Adapters: everything that the assembly asks of one model, and the adapter of any ``nn.Module``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .distillation import Distillation
from .errors import ConfigError, first_line
from .features import BACKBONE, CLASSES, LOGITS, FeatureSpec, Pyramid
from .paths import Path, Paths, folded, is_map, keys_of, pick, split_key
from .reader import Convert, Reader, as_mapping, first_batch
from .scores import ReadScores
from .taps import ModuleTap
from .targets import Targets
from .teacher import Extract, Pixels, call, evaluating

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

    A level called ``logits`` or ``classes`` is what the model predicts: (N, K) or (N, K, H, W).

    Args:
        model: called with a batch (N, C, H, W) first among its arguments.
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
        self._example = example_inputs
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
        """Return the model, or its backbone alone."""
        if self._parts:
            return self.model, Paths([p for p in self._parts if self._shapes[p.level].tap in taps], self.role)
        return self.model.backbone, call  # type: ignore[return-value]

    def reader(self, taps: Sequence[str]) -> Reader:
        """Put a tap on every submodule."""
        if not self._parts:
            tap = ModuleTap(self.model.backbone, "backbone")  # type: ignore[arg-type]
            return Reader([(tap, as_mapping)], batch_from=tap)
        used = [part for part in self._parts if self._shapes[part.level].tap in taps]
        parts: list[tuple[Any, Convert]] = [
            (ModuleTap(self.model.get_submodule(part.path), part.path), part) for part in used
        ]
        return Reader(parts)

    def _measured_parts(self, levels: Mapping[str, str]) -> list[Path]:
        """Run the example once; the shape of every output says channels, stride and leading tokens."""
        taps: dict[str, ModuleTap] = {}
        modules = dict(self.model.named_modules())
        for level, named in levels.items():
            path = named if named in modules else split_key(named)[0]
            if path not in modules or not path:
                close = [name for name in modules if name and name.split(".")[0] == path.split(".")[0]][:8]
                known = close or [name for name, _ in self.model.named_children()]
                raise ConfigError(f"{self.role}_levels", f"{level}: {named}", f"a submodule, as {', '.join(known)}")
            taps[level] = ModuleTap(modules[path], path)
        try:
            for tap in taps.values():
                tap.arm()
            batch = self._run_example(self.model)
            outputs = {level: self._only_output(level, tap) for level, tap in taps.items()}
        finally:
            for tap in taps.values():
                tap.remove()
        self._shapes = {}
        parts = []
        for level, output in outputs.items():
            part, spec = self._measure(level, levels[level], output, batch)
            parts.append(part)
            self._shapes[level] = spec
        return parts

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

    def _measure(self, level: str, path: str, output: Any, batch: Tensor) -> tuple[Path, FeatureSpec]:
        logits = level in (LOGITS, CLASSES)
        height, width = batch.shape[2:]
        module, key = split_key(path)
        whole, output = output, pick(output, key)
        if isinstance(output, Tensor) and output.dim() == 4 and is_map(output, height, width):
            stride = round(height / output.shape[2])
            return Path(module, level, None, stride, key), FeatureSpec(output.shape[1], stride, logits=logits)
        if isinstance(output, Tensor) and output.dim() == 2:
            return Path(module, level, key=key), FeatureSpec(output.shape[1], 0, logits=True)
        if isinstance(output, Tensor) and output.dim() == 3:
            found = folded(output.shape[1], height, width)
            if found:
                leading, patch = found
                return Path(module, level, leading, patch, key), FeatureSpec(output.shape[2], patch, logits=logits)
        shape = f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        hint = "name a submodule below it, or another one"
        if isinstance(output, Tensor) and output.dim() == 3:
            hint += f"; {output.shape[1]} tokens, 0 to 32 leading ones left out, are no patches of {height} x {width}"
        elif keys := keys_of(whole):
            hint += f"; or a part of its output: {', '.join(f'{module}[{name}]' for name in keys[:8])}"
        raise ConfigError(
            f"{self.role}_levels", f"{level}: {path}, which gives {shape}", "(N, C, H, W), tokens (N, L, C) or (N, K)",
            hint,
        )  # fmt: skip

    def _measured_backbone(self) -> dict[str, FeatureSpec]:
        backbone: nn.Module = self.model.backbone  # type: ignore[assignment]
        tap = ModuleTap(backbone, "backbone")
        tap.arm()
        try:
            batch = self._run_example(backbone)
            output = tap.read().output
        finally:
            tap.remove()
        if not isinstance(output, Mapping):
            raise ConfigError(
                f"{self.role}_levels", f"nothing, and a {type(output).__name__} from the backbone of a {self.name}",
                "level name -> path of a submodule", f"{self.role}_levels={{'c4': 'backbone.layer3'}}, say",
            )  # fmt: skip
        return {name: FeatureSpec(x.shape[1], round(batch.shape[2] / x.shape[2])) for name, x in output.items()}

    @torch.no_grad()
    def _run_example(self, network: nn.Module) -> Tensor:
        """Run a network on the example, in evaluation mode, and return the batch of images in it."""
        example = self._example
        if example is None:
            noise = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
            like = next((p for p in network.parameters() if p.is_floating_point()), noise)
            example = noise.to(like.device, like.dtype)
        args, kwargs = (), {}
        if isinstance(example, Mapping):
            kwargs = dict(example)
        else:
            args = tuple(example) if isinstance(example, (tuple, list)) else (example,)
        batch = first_batch([*args, *kwargs.values()])
        if batch is None:
            raise ConfigError("example_inputs", type(example).__name__, "a batch (N, C, H, W) among the arguments")
        try:
            with evaluating(network), torch.random.fork_rng(devices=[]):
                network(*args, **kwargs)
        except (RuntimeError, TypeError, ValueError, AssertionError, AttributeError, KeyError, IndexError) as error:
            reason = first_line(error)
            raise ConfigError(
                "example_inputs", f"{tuple(batch.shape)}, on which a {self.name} fails: {reason[:160]}",
                "inputs that it takes",
            ) from error  # fmt: skip
        return batch
