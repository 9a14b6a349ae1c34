"""Files of weights as people have them: wrapped, under a prefix, in safetensors; and what is no such file, in a line."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import zipfile

import lightning
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from acam_kd.core.errors import ConfigError
from acam_kd.core.weights import WRAPPERS, fit, load_file, not_finite, read_state_dict


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def prefixed(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


class Module(lightning.LightningModule):
    def __init__(self, width, path):
        super().__init__()
        self.save_hyperparameters()
        self.model, self.head_of_loss = network(), nn.Linear(2, 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def training_step(self, batch, _):
        return self.model(batch).mean()


@pytest.fixture
def state():
    return network().state_dict()


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "w.pth")


def loaded(path, state):
    """Load a file, and see that the values have come."""
    module = network()
    found = load_file(module, path, argument="weights")
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    return found


def refused(path, value, allowed="", hint="", module=None):
    """Expect one line, in this project's words, that has these parts; nothing may have been loaded."""
    module = module or network()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        load_file(module, str(path), argument="weights")
    found, line = error.value, str(error.value)
    for part, text in ((value, found.value), (allowed, found.allowed), (hint, found.hint)):
        assert part in str(text), line
    assert line.startswith("weights: found ") and "\n" not in line and "\x1b" not in line
    assert "weights_only" not in line and "arbitrary" not in line
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_state_dict_and_torchs_old_format(state, path):
    torch.save(state, path)
    assert loaded(path, state).prefix == ""
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert loaded(path, state).needed == 8


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "student.net.", "_orig_mod."])
def test_wrappers_and_prefixes(state, path, wrapper, prefix):
    torch.save({wrapper: prefixed(state, prefix), "epoch": 3, "optimizer": {"state": {}}}, path)
    assert loaded(path, state).prefix == prefix


def test_a_wrapper_in_a_wrapper(state, path):
    torch.save({"model": {"state_dict": prefixed(state, "module.")}}, path)
    assert loaded(path, state).prefix == "module."


def test_lightnings_checkpoint(path, tmp_path):
    module = Module(width=3, path="x")
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    trainer.fit(module, torch.utils.data.DataLoader(torch.rand(2, 3, 8, 8), batch_size=2))
    trainer.save_checkpoint(path)
    assert loaded(path, module.model.state_dict()).prefix == "model."


def test_safetensors_whatever_its_name(state, path):
    safetensors.torch.save_file(prefixed(state, "module."), path, metadata={"format": "pt"})
    assert loaded(path, state).prefix == "module."


def test_half_precision_and_frozen_batch_norm(state, path):
    """Counters of batches may be missing, or be there for a norm that has none."""
    half = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    torch.save({name: value for name, value in half.items() if "num_batches" not in name}, path)
    module = network()
    load_file(module, path, argument="weights")
    assert torch.equal(module[0].weight, half["0.weight"].float())
    torch.save({**network()[0].state_dict(), "x.num_batches_tracked": torch.tensor(1)}, path)
    assert fit(torch.load(path), nn.Conv2d(3, 4, 3)).problem() == ""


def test_a_part_of_a_model_may_be_fitted(state):
    found = fit(prefixed(state, "trunk."), network()[0])
    assert found.prefix == "trunk.0." and set(found.tensors) == {"weight", "bias"} and not found.problem()


def test_a_mismatch_says_how_many_fit_and_where(state, path):
    changed = prefixed(state, "module.")
    del changed["module.0.bias"]
    changed["module.2.weight"] = torch.zeros(9, 4, 1, 1)
    changed["module.extra"] = torch.zeros(1)
    torch.save(changed, path)
    refused(
        path,
        "w.pth with 6 of the model's 8 tensors under the prefix 'module.' (missing in the file: 0.bias; unknown to the "
        "model: extra; of another shape: 2.weight (9, 4, 1, 1) in the file, (2, 4, 1, 1) in the model)",
        "this model's weights",
    )
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(9)}, path)
    refused(path, "with 0 of the model's 8 tensors (missing in the file: 0.weight, 0.bias, 1.weight and 5 more; ")


def test_two_whole_models_in_a_file(state, path):
    torch.save({"state_dict": {**prefixed(state, "model."), **prefixed(state, "model_ema.module.")}}, path)
    refused(path, "with the whole model under each of the prefixes 'model.', 'model_ema.module.'", "", "save the one")
    torch.save({"model": state, "net": state}, path)
    refused(path, "with a state dict under each of model, net", "", "save the one")


def test_tensors_that_are_not_finite_are_named(state, path):
    state["1.running_var"][2] = float("nan")
    state["0.weight"][0, 0] = float("inf")
    torch.save(state, path)
    refused(path, "w.pth with NaN or infinity in 0.weight, 1.running_var", "finite weights")
    assert not_finite({"a": torch.tensor([1]), "b": torch.tensor(float("nan")).bfloat16()}) == ["b"]


class Opens:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False])
def test_pickled_objects_are_refused_and_not_run(path, tmp_path, new):
    torch.save(network(), path, _use_new_zipfile_serialization=new)
    refused(
        path, "w.pth, which holds Python objects (torch.nn.modules.container.Sequential", "", "save model.state_dict()"
    )
    torch.save({"state_dict": network().state_dict(), "hook": Opens(tmp_path / "mark")}, path)
    refused(path, "which holds Python objects (posix.mkdir), not only tensors", "a file of tensors by name")
    assert not (tmp_path / "mark").exists()


def test_other_pickles(path):
    with open(path, "wb") as file:
        pickle.dump({"model": {"a": np.zeros(3)}}, file)
    refused(path, "a pickle that torch has not written, or a damaged one")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*TorchScript:UserWarning")
def test_torchscript(path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    refused(path, "w.pth, a TorchScript program", "", "save model.state_dict()")


def test_dicts_of_something_else(path):
    for content, value in (
        ({"epoch": 3}, "which is no dict of tensors: it has epoch"),
        ({"weights": network().state_dict(), "a": torch.ones(1)}, "which is no dict of tensors: it has weights"),
        ({}, "which is no dict of tensors: it is empty"),
        ({"state_dict": {}}, "which is no dict of tensors: it is empty"),
        ([torch.ones(1)], "which is no dict of tensors but a list"),
        (torch.ones(1), "which is no dict of tensors but a Tensor"),
    ):
        torch.save(content, path)
        refused(path, value, "a file of tensors by name")


def test_files_of_another_kind(path, tmp_path):
    for content, value in (
        (b"", "w.pth, which is empty"),
        (b"epoch 1 loss 0.3\n", "w.pth, which is a file of another kind"),
        (b"\x89HDF\r\n\x1a\n" + bytes(64), "w.pth, which is a file of another kind"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n",
            "a pointer of Git LFS and not the file itself",
        ),
        (b"\n<!DOCTYPE html><html>", "w.pth, a web page"),
    ):
        with open(path, "wb") as file:
            file.write(content)
        refused(path, value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", b"1")
    refused(path, "a zip archive that torch has not written")
    refused(tmp_path / "gone.pth", f"no file {tmp_path}/gone.pth", "an existing one")
    refused(tmp_path, f"the folder {tmp_path}", "a file of tensors", "name the file in it, as w.pth")


def test_files_that_are_cut_off(state, path):
    for save in (
        lambda: torch.save(state, path),
        lambda: torch.save(state, path, _use_new_zipfile_serialization=False),
        lambda: safetensors.torch.save_file(state, path),
    ):
        save()
        size = os.path.getsize(path)
        for part in (size // 4, size // 2, size - 10):
            save()
            os.truncate(path, part)
            refused(path, "w.pth, ", "a file of tensors", "copy or download it again")


@pytest.mark.parametrize("seed", range(40))
def test_files_with_a_wrong_byte_are_read_or_refused(state, path, seed):
    draw = random.Random(seed)
    if seed % 2:
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=bool(seed % 4))
    with open(path, "r+b") as file:
        content = bytearray(file.read())
        for _ in range(3):
            content[draw.choice([-1, 1]) * draw.randrange(200)] = draw.randrange(256)
        file.seek(0)
        file.write(content)
    with contextlib.suppress(ConfigError):
        load_file(network(), path, argument="weights")


def test_a_header_of_safetensors_that_lies(path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
    refused(path, "w.pth, which cannot be read (", "", "copy or download it again")


def test_the_names_of_the_file_are_returned(state, path):
    torch.save({"net": prefixed(state, "module.")}, path)
    assert list(read_state_dict(path, argument="x")) == [f"module.{name}" for name in state]
