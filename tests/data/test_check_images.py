"""Image files: what the checker sees is what the reader reads, and nothing is clipped, turned twice or waited for."""

from __future__ import annotations

import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from acam_kd.core.errors import ConfigError
from acam_kd.data import images
from acam_kd.data.check.findings import Findings
from acam_kd.data.check.look import check_depth, headers_of
from acam_kd.data.images import image_size, look, read_rgb

RAMP = np.linspace(0, 65535, 160 * 120).reshape(120, 160)


def refused(drawn, **options):
    with pytest.raises(ConfigError) as error:
        drawn.check(**options)
    assert "\n" not in str(error.value)
    return str(error.value)


def replace(drawn, pixels, suffix="png", **options):
    """Write the same pixels as every image of the dataset."""
    for image in drawn.content["images"]:
        image["file_name"] = f"{image['id']}.{suffix}"
        Image.fromarray(pixels).save(drawn.root / "images" / image["file_name"], **options)
    return str(drawn.root / "images" / f"1.{suffix}")


# More than 8 bits.


def test_sixteen_bits_are_scaled_by_a_stated_rule(drawn):
    path = replace(drawn, RAMP.astype(np.uint16))
    drawn.check()
    assert "the values of 4 images of more than 8 bits are divided by 256" in "".join(drawn.said)
    read = read_rgb(path)
    assert read.shape == (120, 160, 3) and read.dtype == np.uint8
    assert np.array_equal(read[..., 0], RAMP.astype(np.uint16) >> 8) and np.array_equal(read[..., 0], read[..., 2])


def test_twelve_bits_in_sixteen_are_in_doubt(drawn):
    path = replace(drawn, (RAMP / 16).astype(np.uint16))
    line = refused(drawn)
    assert "4 images of 16 bits whose largest value is 4095" in line and "nearly black" in line
    drawn.check(image_range="16bit")
    assert read_rgb(path, "16bit").max() == 15
    replace(drawn, (RAMP / 65535 * 255).round().astype(np.uint16))
    assert "whose largest value is 255" in refused(drawn)
    drawn.check(image_range="8bit")
    assert read_rgb(path, "8bit").max() == 255


def test_colours_of_sixteen_bits_are_seen_too(drawn):
    """Pillow itself takes the upper bits; 12 bits would be nearly black without a word."""
    for top, fine in ((65535, True), (4095, False)):
        pixels = struct.pack(">HHH", top, top // 2, 0)
        header = struct.pack(">IIBBBBB", 160, 120, 16, 2, 0, 0, 0)
        rows = zlib.compress((b"\0" + pixels * 160) * 120)
        data = b"\x89PNG\r\n\x1a\n"
        for kind, body in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for number in range(1, 5):
            drawn.image(number).write_bytes(data)
        assert look(str(drawn.image(1))).depth == images.DEEP
        if fine:
            drawn.check()
            assert read_rgb(str(drawn.image(1)))[0, 0].tolist() == [255, 127, 0]
        else:
            assert "nearly black" in refused(drawn)
            assert "16bit for such files" in refused(drawn, image_range="8bit")


@pytest.mark.parametrize(
    ("pixels", "fits", "low", "high"),
    [
        (RAMP.astype(np.int32), "16bit", 0, 255),
        ((RAMP / 65535 * 255).round().astype(np.int32), "8bit", 0, 255),
        ((RAMP / 65535).astype(np.float32), "0-1", 0, 255),
        ((RAMP / 65535 * 255).astype(np.float32), "8bit", 0, 255),
    ],
)
def test_other_kinds_are_refused_until_their_range_is_named(drawn, pixels, fits, low, high):
    path = replace(drawn, pixels, "tif")
    line = refused(drawn)
    assert "(the first of 4)" in line and "give image_range: 8bit, 16bit or 0-1" in line
    with pytest.raises(ConfigError) as error:
        read_rgb(path)
    assert error.value.argument == "image_range"
    drawn.check(image_range=fits)
    read = read_rgb(path, fits)
    assert (read.min(), read.max()) == (low, high) and abs(float(read.mean()) - 127) < 1


@pytest.mark.parametrize(
    "pixels", [RAMP.astype(np.float32), np.full((120, 160), -1, np.float32), np.full((120, 160), np.nan, np.float32)]
)
def test_values_outside_of_the_range_are_never_clipped(drawn, pixels):
    path = replace(drawn, pixels, "tif")
    assert "values from 0 to 1" in refused(drawn, image_range="0-1")
    with pytest.raises(ConfigError) as error:
        read_rgb(path, "0-1")
    assert (error.value.argument, error.value.allowed) == ("image_range", "values from 0 to 1")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_usual_modes_are_read_as_pillow_converts_them(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    Image.fromarray(pixels).convert(mode).save(path)
    assert np.array_equal(read_rgb(str(path)), np.asarray(Image.open(path).convert("RGB")))
    assert look(str(path)).depth == "" and image_size(str(path)) == (6, 8)


# Orientation, from wherever a reader may take it.


def exif(value):
    entry = Image.Exif()
    entry[0x0112] = value
    return entry


def corner(path):
    """Return the size of what is read, and where its one bright corner is."""
    pixels = read_rgb(path)[..., 0]
    y, x = np.unravel_index(pixels.argmax(), pixels.shape)
    return pixels.shape, (int(y) // 40, int(x) // 40)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp", "late.png"])
def test_orientation_wherever_it_is_written(tmp_path, suffix, value):
    pixels = np.zeros((80, 120, 3), np.uint8)
    pixels[:20, :20] = 255
    path = str(tmp_path / f"a.{suffix}")
    if suffix == "late.png":  # EXIF behind the pixels, as some cameras and tools write it
        Image.fromarray(pixels).save(path)
        data = Path(path).read_bytes()
        body = b"eXIf" + exif(value).tobytes()[6:]
        chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
        Path(path).write_bytes(data[:-12] + chunk + data[-12:])
    else:
        Image.fromarray(pixels).save(path, exif=exif(value))
    shape = (120, 80) if value > 4 else (80, 120)
    top, left = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[value]
    found, place = corner(path)
    assert found == shape and place == (top * (shape[0] // 40 - 1), left * (shape[1] // 40 - 1))
    header = look(path)
    assert (header.height, header.width) == shape and header.orientation == value and not header.problem


def test_orientation_in_xmp(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png", pnginfo=info)
    assert image_size(str(tmp_path / "a.png")) == read_rgb(str(tmp_path / "a.png")).shape[:2] == (8, 6)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")
def test_exif_that_cannot_be_read_says_nothing(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 6)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9)
    assert image_size(str(path)) == read_rgb(str(path)).shape[:2] == (6, 8)


def test_a_json_made_before_the_image_was_turned_is_told(drawn):
    path = drawn.root / "images/1.jpg"
    Image.new("RGB", (160, 120)).save(path, exif=exif(6))
    drawn.content["images"][0]["file_name"] = "1.jpg"
    assert "with 120 x 160 pixels, expected 160 x 120, as the json says; its EXIF orientation turns it" in refused(
        drawn
    )


# Files that are none.


def test_cut_off_files_are_found_before_anything_is_built(drawn):
    draw = np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)
    for number, suffix in enumerate(("png", "jpg", "webp", "bmp"), 1):
        path = drawn.root / f"images/{number}.{suffix}"
        Image.fromarray(draw).save(path)
        assert not look(str(path)).problem
        drawn.content["images"][number - 1]["file_name"] = path.name
        for part in (0.5, 0.98):
            whole = path.read_bytes()
            path.write_bytes(whole[: int(len(whole) * part)])
            assert look(str(path)).problem, (suffix, part)
            if part != 0.98:
                path.write_bytes(whole)
    line = refused(drawn)
    assert "images[0] (id 1): " in line and "1.png, which cannot be read (" in line and "(the first of 4)" in line


def test_what_is_behind_the_end_of_a_file_does_not_matter(tmp_path):
    for suffix in ("png", "jpg"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (8, 6)).save(path)
        path.write_bytes(path.read_bytes() + b"what a telephone adds" * 9)
        assert not look(str(path)).problem


def test_sizes_beyond_pillows_limit_are_a_line(drawn, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 160 * 120 // 2 - 1)
    line = refused(drawn)
    assert "1.png, which cannot be read (Image size (19200 pixels) exceeds limit" in line and "(the first of 4)" in line
    with pytest.raises(ConfigError):
        read_rgb(str(drawn.image(1)))


@pytest.mark.parametrize("size", [(2000, 3), (3, 2000), (101, 2)])
def test_strips_of_which_nothing_would_be_left(drawn, size):
    Image.new("RGB", size).save(drawn.image(1))
    drawn.content["images"][0].update(width=size[0], height=size[1])
    drawn.annotation.update(bbox=[0, 0, 2, 2], area=4, segmentation=[[0, 0, 2, 0, 2, 2]])
    line = refused(drawn)
    assert f"of {size[0]} x {size[1]} pixels" in line and "a longer side of at most 50 shorter ones" in line


def test_pipes_and_folders_are_no_images(drawn):
    """A pipe would be waited for without an end."""
    os.mkfifo(drawn.root / "images/pipe.png")
    (drawn.root / "images/folder.png").mkdir()
    for number, name in enumerate(("pipe.png", "folder.png", "/dev/zero", "x" * 5000)):
        drawn.content["images"][number]["file_name"] = name
    line = refused(drawn)
    assert "pipe.png, which cannot be read (not a regular file)" in line and "(the first of 4)" in line
    assert sum("not a regular file" in line for line in drawn.said) == 3


def test_no_bytes_make_it_fail_otherwise(tmp_path):
    draw, path = np.random.default_rng(0), tmp_path / "a"
    for suffix in ("png", "jpeg", "tiff", "webp", "gif", "bmp"):
        Image.new("RGB", (8, 6)).save(path, format=suffix)
        data = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(60):
            broken = data.copy()
            broken[draw.integers(len(data), size=4)] = draw.integers(0, 256, 4)
            path.write_bytes(broken[: draw.integers(1, len(data) + 1)].tobytes())
            header = look(str(path))
            try:
                assert read_rgb(str(path)).shape[:2] == (header.height, header.width) or header.problem
            except ConfigError:
                assert header.problem or suffix in ("png", "jpeg", "webp"), "decoded by the check"


# Detectron2's reader is its own.


def test_what_detectron2_would_read_otherwise_is_refused(drawn):
    replace(drawn, RAMP.astype(np.uint16))
    line = refused(drawn, reader="detectron2")
    assert "of 16 bits (mode I;16)" in line and "since Detectron2 cuts larger values off" in line
    assert "save it with 8 bits" in line
    replace(drawn, np.zeros((160, 120, 3), np.uint8), "tif", exif=exif(6))
    assert "in TIFF format with orientation 6" in refused(drawn, reader="detectron2")
    drawn.check()  # torchvision's engine turns it once


# The cache.


def test_an_unchanged_image_is_not_opened_again(drawn, monkeypatch):
    opened = []
    monkeypatch.setattr(
        images, "opened", lambda path, *more, _open=images.opened: opened.append(path) or _open(path, *more)
    )
    drawn.check()
    assert sorted(opened) == [str(drawn.image(number)) for number in range(1, 5)]
    drawn.check()
    drawn.content["info"] = "another json of the same images"
    drawn.check()
    assert len(opened) == 4
    Image.new("RGB", (160, 120), (1, 2, 3)).save(drawn.image(3))
    drawn.check()
    assert opened[4:] == [str(drawn.image(3))]
    Image.new("RGB", (12, 12)).save(drawn.image(3))
    assert "with 12 x 12 pixels" in refused(drawn)
    drawn.image(3).write_bytes(b"")
    assert "3.png, which cannot be read" in refused(drawn) and "3.png, which cannot be read" in refused(drawn)
    assert opened[5:] == [str(drawn.image(3))] * 3, "what cannot be read is not remembered"


def test_a_known_json_is_not_checked_again(drawn, monkeypatch):
    for annotation in drawn.content["annotations"]:
        del annotation["iscrowd"]
    first, said = drawn.check(), drawn.said
    with monkeypatch.context() as patch:
        patch.setattr("acam_kd.data.check.coco._check", lambda *_: pytest.fail("checked again"))
        assert drawn.check() == first and drawn.said == said
    drawn.annotation["bbox"] = [0, 0, -1, 5]
    assert "negative size" in refused(drawn)


def test_a_cache_that_cannot_be_used_only_takes_time(drawn, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "file" / "cache"))
    drawn.check()
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "cache"))
    drawn.check()
    entries = list((tmp_path / "cache").rglob("*.json"))
    assert len(entries) == 2
    for content in (b"", b"[]", b"\xff", b'{"version": 0}', b"[" * 100_000):
        for path in entries:
            path.write_bytes(content)
        drawn.check()


def test_the_cache_lies_in_the_users_folder(monkeypatch, tmp_path):
    from acam_kd.data.check.cache import KEPT, read_entry, write_entry
    from acam_kd.files import cache_folder

    monkeypatch.delenv("ACAM_KD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "acam-kd"
    for number in range(KEPT + 5):
        write_entry("kind", f"key {number}", number)
    assert len(list((tmp_path / "acam-kd/kind").iterdir())) == KEPT
    assert read_entry("kind", f"key {KEPT + 4}") == KEPT + 4 and read_entry("kind", "other") is None
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/acam-kd"


def test_progress_is_shown_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    paths = [str(tmp_path / "a.png")] * 150
    headers_of(paths, str(tmp_path), "images")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("ACAM_KD_CACHE", str(tmp_path / "new"))
    headers_of(paths, str(tmp_path), "images")
    assert capsys.readouterr().err.endswith("\rimages 150/150\n")


def test_a_dataset_without_deep_images_says_nothing_of_them():
    findings = Findings("mine")
    check_depth([images.Header(8, 6, "RGB")], findings, image_range="auto", reader="")
    assert not findings.notices and not findings.counts
