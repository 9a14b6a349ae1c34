"""A malicious example of each kind of file: a weights file, a dataset, a file of tokens; configs are in tests/d2."""

from __future__ import annotations

import json
import os
import struct
import tarfile
import zipfile
import zlib

import pytest
import torch
from PIL import Image

from acam_kd.core.errors import ConfigError, RunError
from acam_kd.core.features import FeatureSpec
from acam_kd.core.weights import read_state_dict
from acam_kd.data.check import check_coco
from acam_kd.data.images import look, read_rgb
from acam_kd.data.voc import find_voc
from acam_kd.data.yolo_file import read_yolo_file
from acam_kd.export.exported import load_exported
from acam_kd.methods.parts.token_files import build_tokens, check_teacher, load_tokens, save_tokens
from acam_kd.tv.checkpoint import read_checkpoint
from acam_kd.yaml_file import load_yaml

from .limits import in_child

PYRAMID = {"p3": FeatureSpec(8, 8, False)}


class Opens:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def refused(function, *parts):
    with pytest.raises((ConfigError, RunError)) as error:
        function()
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize("name", ["w.pth", "w.ckpt", "w.safetensors"])
def test_code_in_weights_is_refused_and_not_run(name, tmp_path):
    path, mark = tmp_path / name, tmp_path / "mark"
    for content in ({"model": {"a": torch.zeros(1)}, "hook": Opens(mark)}, {"a": Opens(mark)}, Opens(mark)):
        for new in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=new)
            said = "which cannot be read" if name == "w.safetensors" else "Python objects (posix.mkdir)"
            refused(lambda: read_state_dict(str(path), argument="weights"), said)
            refused(lambda: read_checkpoint(path), str(path))
            refused(
                lambda: load_tokens(str(path), "MasKD", build_tokens("MasKD", PYRAMID), PYRAMID), "no learnt tokens"
            )
    assert not mark.exists()


def test_an_archive_does_not_leave_its_place(tmp_path):
    """Weights and exported files are zip archives; their entries are read and never unpacked."""
    path = tmp_path / "in" / "w.pth"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped/data.pkl", b"\x80\x02}.")
        archive.writestr("/escaped", b"x")
    refused(lambda: read_state_dict(str(path), argument="weights"), str(path))
    refused(lambda: read_checkpoint(path), str(path))
    refused(lambda: load_exported(str(path)), str(path))
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("../escaped"))
    refused(lambda: read_state_dict(str(path), argument="weights"), "a file of another kind")
    assert [file.name for file in tmp_path.rglob("*")] == ["in", "w.pth"]


def test_a_file_of_tokens_for_more_memory_than_there_is(tmp_path):
    """Its numbers are compared with those of the pyramid before anything of its size is made."""
    path = tmp_path / "tokens.pth"
    save_tokens(str(path), "MasKD", build_tokens("MasKD", PYRAMID), PYRAMID, teacher="x")
    content = torch.load(path, weights_only=True)
    state = content["levels"]["p3"]["state"]
    state["tokens"] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(content, path)
    refused(lambda: load_tokens(str(path), "MasKD", build_tokens("MasKD", PYRAMID), PYRAMID), "1000000 tokens")
    for odd in ({"levels": {"p3": {**content["levels"]["p3"], "stride": "8"}}}, {"levels": {1: {}}}, {"levels": [1]}):
        torch.save({**content, **odd}, path)
        refused(lambda: check_teacher(str(path), "MasKD", "x"), "which holds no learnt tokens")


def png(path, width, height):
    """Write a PNG of a few bytes whose header promises many pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + chunk(b"IEND", b"")
    )


def one_image(folder, name, **entry):
    content = {
        "images": [{"id": 1, "file_name": name, "width": 40, "height": 20, **entry}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "thing"}],
    }
    path = folder / "d.json"
    path.write_text(json.dumps(content))
    return lambda: check_coco(str(path), str(folder), name="mine", say=lambda _: None)


def test_an_image_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    bomb = tmp_path / "bomb.png"
    png(bomb, 60000, 60000)

    def try_it():
        assert "decompression bomb" in look(str(bomb)).problem
        refused(lambda: read_rgb(str(bomb)), "decompression bomb")
        refused(one_image(tmp_path, "bomb.png", width=60000, height=60000), "decompression bomb")

    in_child(try_it, tmp_path)


def test_a_mask_larger_than_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    check = one_image(tmp_path, "a.png")
    content = json.loads((tmp_path / "d.json").read_text())
    huge = {"counts": [10**12], "size": [10**6, 10**6]}
    far = [[0, 0, 1e9, 0, 1e9, 1e9]]
    for segmentation in (huge, far, [[0, 0] * 10**6 + [1e300, 1]]):
        content["annotations"][0]["segmentation"] = segmentation
        (tmp_path / "d.json").write_text(json.dumps(content))
        in_child(lambda: refused(check, "segmentation"), tmp_path)


def test_no_image_is_read_that_never_ends(tmp_path, monkeypatch):
    """A pipe, a device, a folder, a link to itself."""
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "loop.png", "folder.png", "zero.png"):
        in_child(lambda name=name: refused(one_image(tmp_path, name), name), tmp_path)


def test_entities_of_xml_are_refused(tmp_path):
    """Neither a billion laughs nor the content of another file."""
    bomb = "".join(f'<!ENTITY a{i + 1} "{f"&a{i};" * 10}">' for i in range(9))
    other = '<!ENTITY a9 SYSTEM "file:///etc/passwd">'
    (tmp_path / "train").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "train/a.png")
    for entities in (f'<!ENTITY a0 "x">{bomb}', other):
        text = f"<!DOCTYPE a [{entities}]><annotation><object><name>&a9;</name></object></annotation>"
        (tmp_path / "train/a.xml").write_text(text)
        in_child(lambda: refused(lambda: find_voc(tmp_path, "train", ""), "an entity"), tmp_path)


def test_yaml_that_unfolds_is_refused(tmp_path):
    laughs = "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))
    path = tmp_path / "data.yaml"
    path.write_text(f"{laughs}names: *a9\n")
    in_child(lambda: refused(lambda: read_yolo_file(path), "aliases that unfold to more than 1000000 values"), tmp_path)
    path.write_text("names: &a [*a]\n")
    refused(lambda: read_yolo_file(path), "data.yaml:1: an alias within itself")
    assert load_yaml("a: &a [1]\nb: *a\n") == {"a": [1], "b": [1]}
