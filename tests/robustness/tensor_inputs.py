"""Weights, checkpoints and files of tokens that are damaged."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from acam_kd.core.weights import load_file

from .inputs import TARGETS, Target, target


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def weights_kind(name: str, encode: Callable[[Any], bytes]) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        file = folder / name
        file.write_bytes(encode(network().state_dict()))

        def prepare(_: Path) -> Callable[[Path], None]:
            model = network()

            def read(_: Path) -> None:
                before = {key: value.clone() for key, value in model.state_dict().items()}
                try:
                    load_file(model, str(file), argument="teacher_weights")
                except BaseException:
                    after = model.state_dict()
                    assert all(after[key].equal(value) for key, value in before.items()), "half of it was loaded"
                    raise
                assert all(value.isfinite().all() for value in model.state_dict().values())

            return read

        return Target(folder, file, prepare, dict(network().state_dict()), encode)

    return make


def as_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def as_old_torch(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def as_safetensors(content: Any) -> bytes:
    known = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    return safetensors.torch.save(known)


TARGETS["weights .pth"] = weights_kind("w.pth", as_torch)
TARGETS["weights of old torch"] = weights_kind("w.pth", as_old_torch)
TARGETS["weights .safetensors"] = weights_kind("w.safetensors", as_safetensors)


@target("checkpoint")
def checkpoint(folder: Path) -> Target:
    from lightning.fabric.plugins.precision import Precision

    from acam_kd.core.average import Average
    from acam_kd.tv.checkpoint import Parts, read_checkpoint, restore_random

    def parts() -> Parts:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model[2](torch.rand(1, 4)).sum().backward()
        optimizer.step()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return Parts(model, None, optimizer, schedule, Precision(), Average(model, 0.0))

    file = folder / "last.ckpt"
    state = parts().state(step=3, seconds=1.0)
    torch.save(state, file)

    def prepare(_: Path) -> Callable[[Path], None]:
        def read(_: Path) -> None:
            with contextlib.redirect_stdout(io.StringIO()):
                state = read_checkpoint(file)
                parts().load(state, file)
                restore_random(state)

        return read

    return Target(folder, file, prepare, state, as_torch)


@target("tokens")
def tokens(folder: Path) -> Target:
    from acam_kd.core.features import FeatureSpec
    from acam_kd.methods.parts.token_files import build_tokens, check_teacher, load_tokens, save_tokens

    pyramid = {"p3": FeatureSpec(8, 8, False)}
    file = folder / "tokens.pth"
    save_tokens(str(file), "MasKD", build_tokens("MasKD", pyramid), pyramid, teacher="x")

    def prepare(_: Path) -> Callable[[Path], None]:
        def read(_: Path) -> None:
            check_teacher(str(file), "MasKD", "x")
            load_tokens(str(file), "MasKD", build_tokens("MasKD", pyramid), pyramid)

        return read

    return Target(folder, file, prepare, torch.load(file, weights_only=True), as_torch)
