"""The kinds of files that Detectron2's engine reads."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg

from acam_kd.d2 import add_distillation_config
from acam_kd.d2.checkpoint import _Explained
from acam_kd.d2.config import merge, student_config
from acam_kd.d2.config_files import merge_safely
from acam_kd.d2.weights_file import read_safely

from .inputs import TARGETS, Target, target
from .tensor_inputs import as_torch, network

__all__ = ["TARGETS"]


def config_kind(text: str) -> Callable[[Path], Target]:
    def make(folder: Path) -> Target:
        (folder / "base.yaml").write_text("MODEL: {WEIGHTS: '', DEVICE: cpu}\nSOLVER: {STEPS: [1, 2]}\n")
        (folder / "config.yaml").write_text(text)

        def prepare(_: Path) -> Callable[[Path], None]:
            def read(folder: Path) -> None:
                cfg = get_cfg()
                add_distillation_config(cfg)
                merge(cfg, str(folder / "config.yaml"))
                student_config(cfg)
                if "DISTILL" not in text:
                    merge_safely(get_cfg(), str(folder / "config.yaml"))

            return read

        return Target(folder, folder / "config.yaml", prepare)

    return make


SIZES = '!!python/object/apply:eval ["[[x, x * 2**(1.0/3)] for x in [32, 64]]"]'
DISTILL = "DISTILL: {METHOD: PKD, PKD: {ALPHA: 2.0}, TEACHER: {CONFIG_FILE: base.yaml}}\n"
TARGETS["config"] = config_kind(f"_BASE_: base.yaml\nMODEL: {{ANCHOR_GENERATOR: {{SIZES: {SIZES}}}}}\n{DISTILL}")
TARGETS["dumped config"] = config_kind(yaml.dump(CfgNode({"MODEL": {"MASK_ON": True}, "INPUT": {"MIN_SIZE_TEST": 9}})))


@target("pickle of the zoo")
def zoo(folder: Path) -> Target:
    file = folder / "w.pkl"
    arrays = {name: value.numpy() for name, value in network().state_dict().items()}
    content = {"model": arrays, "__author__": "zoo"}
    file.write_bytes(pickle.dumps(content))

    def prepare(_: Path) -> Callable[[Path], None]:
        return lambda _: read_safely(DetectionCheckpointer(network())).load(str(file)) and None

    return Target(folder, file, prepare, content, pickle.dumps)


@target("checkpoint of Detectron2")
def checkpoint(folder: Path) -> Target:
    def parts() -> DetectionCheckpointer:
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model[2](torch.rand(1, 4)).sum().backward()
        optimizer.step()
        return read_safely(DetectionCheckpointer(model, str(folder), optimizer=_Explained(optimizer)))

    parts().save("model_1", iteration=1)

    def prepare(_: Path) -> Callable[[Path], None]:
        return lambda _: parts().resume_or_load("", resume=True) and None

    file = folder / "model_1.pth"
    return Target(folder, file, prepare, torch.load(file, weights_only=True), as_torch)
