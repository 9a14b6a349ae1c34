"""Pairs of images and labels: every way to get them wrong is one line with the file."""

from __future__ import annotations

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from acam_kd.core.errors import ConfigError
from acam_kd.data.check import check_labels
from acam_kd.data.images import image_size
from acam_kd.data.labels import find_pairs, read_class_names, read_label

CLASSES = ["sky", "road", "car"]


def write(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8))
    image.save(path, **options)


@pytest.fixture
def folders(tmp_path):
    """Make two good pairs, one of them a level deeper, of 4 x 6 pixels."""
    for number, stem in enumerate(("a", "city/b.c")):
        label = np.full((4, 6), number)
        label[0, :2] = 2, 255
        write(tmp_path / f"images/{stem}.jpg", np.full((4, 6, 3), 90))
        write(tmp_path / f"labels/{stem}.png", label)
    return str(tmp_path / "images"), str(tmp_path / "labels")


def pairs_of(folders):
    return find_pairs(*folders, name="mine")


def check(folders, classes=CLASSES):
    return check_labels(pairs_of(folders), classes, name="mine")


def value_of(error):
    """Return the value of an error about the dataset, whose message has to be one line."""
    assert error.value.argument == "dataset" and "\n" not in str(error.value)
    name, _, value = error.value.value.partition(": ")
    assert name == "mine"
    return value


def test_images_find_their_labels_by_path_and_stem(folders, tmp_path):
    write(tmp_path / "labels/unused.png", np.zeros((4, 6)))
    (tmp_path / "images/notes.txt").write_text("no image")
    (tmp_path / "images/._a.jpg").write_text("what macOS leaves")
    write(tmp_path / "images/Z.PNG", np.zeros((4, 6, 3)))
    write(tmp_path / "labels/Z.png", np.zeros((4, 6)))
    found = [tuple(os.path.relpath(path, tmp_path) for path in pair) for pair in pairs_of(folders)]
    assert found == [
        ("images/Z.PNG", "labels/Z.png"),
        ("images/a.jpg", "labels/a.png"),
        ("images/city/b.c.jpg", "labels/city/b.c.png"),
    ]


def test_folders_behind_links_are_looked_into(folders, tmp_path):
    for folder in folders:
        os.makedirs(tmp_path / "linked" / os.path.basename(folder))
        os.symlink(os.path.join(folder, "city"), tmp_path / "linked" / os.path.basename(folder) / "town")
    assert len(find_pairs(str(tmp_path / "linked/images"), str(tmp_path / "linked/labels"), name="d")) == 1


def test_what_is_not_there(folders, tmp_path):
    for pair in ((folders[0], str(tmp_path / "gone")), (str(tmp_path / "gone"), folders[1])):
        with pytest.raises(ConfigError) as error:
            pairs_of(pair)
        assert value_of(error) == f"no folder {tmp_path}/gone"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as error:
        pairs_of((str(tmp_path / "empty"), folders[1]))
    assert value_of(error) == f"no images in {tmp_path}/empty" and ".jpg" in error.value.allowed
    with pytest.raises(ConfigError) as error:
        pairs_of((folders[0], folders[0]))
    assert value_of(error) == f"images and labels in one folder, {folders[0]}"
    os.remove(tmp_path / "labels/city/b.c.png")
    with pytest.raises(ConfigError) as error:
        pairs_of(folders)
    assert value_of(error) == "1 of 2 images without a label, the first is city/b.c.jpg"
    assert error.value.allowed == f"its label at {tmp_path}/labels/city/b.c.png"


def test_pixels_are_counted(folders, caplog):
    assert check(folders) == [22, 22, 2] and not caplog.records


def test_palette_labels_are_their_indices(folders, tmp_path):
    """PASCAL VOC has such labels; their colours are for people."""
    label = Image.fromarray(np.array([[0, 1, 2], [255, 2, 2]], np.uint8))
    label.putpalette([value * step % 256 for value in range(256) for step in (5, 7, 11)])
    write(tmp_path / "labels/a.png", label)
    write(tmp_path / "images/a.jpg", np.zeros((2, 3, 3)))
    with Image.open(tmp_path / "labels/a.png") as written:
        assert written.mode == "P"
    assert read_label(str(tmp_path / "labels/a.png")).tolist() == [[0, 1, 2], [255, 2, 2]]
    assert check(folders) == [1, 23, 4]


@pytest.mark.parametrize(
    ("label", "value", "allowed"),
    [
        (np.zeros((6, 4)), "with 4 x 6 pixels", "6 x 4, as its image"),
        (np.zeros((4, 6, 3)), "with mode RGB", "class numbers in one channel of 8 bits"),
        (Image.fromarray(np.zeros((4, 6), np.uint16)), "with mode I;16", "class numbers in one channel of 8 bits"),
        (
            np.arange(24).reshape(4, 6),
            "with the values 3, 4, 5, 6, 7, ...",
            "0 to 2 for the 3 classes, and 255 for ignored pixels",
        ),
    ],
)
def test_labels_that_are_none(folders, tmp_path, label, value, allowed):
    write(tmp_path / "labels/a.png", label)
    with pytest.raises(ConfigError) as error:
        check(folders)
    assert value_of(error) == f"label {tmp_path}/labels/a.png {value}"
    assert error.value.allowed.startswith(allowed)


def test_values_that_are_no_classes_may_be_named(folders, tmp_path):
    write(tmp_path / "labels/a.png", np.arange(24).reshape(4, 6))
    with pytest.raises(ConfigError) as error:
        check(folders)
    assert error.value.render(lambda name: f"--{name}").endswith(
        "; correct the label, or name its classes in --classes"
    )


def test_files_that_cannot_be_read(folders, tmp_path):
    whole = (tmp_path / "labels/a.png").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "labels/a.png").write_bytes(content)
        with pytest.raises(ConfigError) as error:
            check(folders)
        assert value_of(error).startswith(f"label {tmp_path}/labels/a.png, which cannot be read (")
    (tmp_path / "images/a.jpg").write_text("text")
    with pytest.raises(ConfigError) as error:
        check(folders)
    assert value_of(error).startswith(f"image {tmp_path}/images/a.jpg, which cannot be read (")


def test_what_teaches_nothing_is_a_warning_and_nothing_but_that_an_error(folders, tmp_path, caplog):
    write(tmp_path / "labels/a.png", np.full((4, 6), 255))
    assert check(folders, [*CLASSES, "tram"]) == [0, 22, 1, 0]
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [
        f"mine: 1 of 2 labels are ignored as a whole, the first is {tmp_path}/labels/a.png",
        "mine: no pixel of sky (0), tram (3) in 2 labels",
    ]
    write(tmp_path / "labels/city/b.c.png", np.full((4, 6), 255))
    with pytest.raises(ConfigError) as error:
        check(folders)
    assert value_of(error) == "2 labels whose pixels are all 255, which is ignored"


def test_the_size_is_that_of_the_turned_image(tmp_path):
    """Loaders turn photographs; a label fits the photograph as it is shown."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png"):
        write(tmp_path / f"images/a.{suffix}", np.zeros((4, 6, 3)), exif=exif)
        assert image_size(str(tmp_path / f"images/a.{suffix}")) == (6, 4)


def test_class_names_of_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbfroad\r\ncar\r\n")
    assert read_class_names(str(file)) == ["road", "car"]


@pytest.mark.parametrize(
    ("classes", "value"),
    [("a,a", "2 ('a', 'a')"), ("a,,b", "3 ('a', '', 'b')"), (",".join(map(str, range(256))), "256 ('0', ")],
)
def test_names_that_cannot_be_used(classes, value):
    with pytest.raises(ConfigError) as error:
        read_class_names(classes)
    assert error.value.argument == "classes" and error.value.value.startswith(value)
    assert error.value.allowed.startswith("1 to 255 different names")


def test_a_file_of_names_that_does_not_exist(tmp_path):
    with pytest.raises(ConfigError) as error:
        read_class_names(str(tmp_path / "gone.txt"))
    assert (error.value.argument, error.value.value) == ("classes", f"no file {tmp_path}/gone.txt")


def test_greys_of_four_bits_are_refused(tmp_path):
    """PIL would scale class 1 to 17."""
    header = struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\x00\x12")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "label.png").write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_label(str(tmp_path / "label.png"))
    assert error.value.argument == "label" and error.value.value.endswith("label.png with grey values of 2 or 4 bits")


# Masks of 0 and 255, and other labels that make every model look right.


def only(tmp_path, *values):
    """Write the values, repeated, as every label."""
    for stem in ("a", "city/b.c"):
        write(tmp_path / f"labels/{stem}.png", np.resize(values, (4, 6)))


@pytest.mark.parametrize("classes", [["background", "road"], ["road"]])
def test_a_foreground_of_255_is_no_triumph(folders, tmp_path, classes):
    only(tmp_path, 0, 255)
    with pytest.raises(ConfigError) as error:
        check(folders, classes)
    assert value_of(error) == f"2 labels with pixels of {classes[0]} (0) only, and 50 % of 255, which is ignored"
    assert error.value.render(lambda name: f"--{name}").endswith(
        "; if 255 is the foreground: write 1 instead, and name two classes in --classes"
    )


@pytest.mark.parametrize(("values", "classes"), [((0,), ["road"]), ((1,), CLASSES), ((0,), CLASSES)])
def test_one_class_is_none(folders, tmp_path, values, classes):
    only(tmp_path, *values)
    with pytest.raises(ConfigError) as error:
        check(folders, classes)
    assert "only" in value_of(error) and error.value.allowed == "pixels of two classes at least"
    assert "the background is a class too" in error.value.hint


def test_masks_of_0_and_1_are_good(folders, tmp_path):
    only(tmp_path, 0, 1)
    assert check(folders, ["background", "road"]) == [24, 24]


def test_all_troubles_of_labels_are_told_at_once(folders, tmp_path):
    write(tmp_path / "labels/a.png", np.zeros((4, 6, 3)))
    write(tmp_path / "labels/city/b.c.png", np.full((5, 6), 9))
    (tmp_path / "images/city/b.c.jpg").write_bytes(b"\xff\xd8\xff")
    write(tmp_path / "images/Z.PNG", np.zeros((4, 6, 3)))
    write(tmp_path / "labels/Z.png", np.full((5, 6), 9))
    said = []
    with pytest.raises(ConfigError) as error:
        check_labels(pairs_of(folders), CLASSES, name="mine", say=said.append)
    assert value_of(error).startswith("4 troubles: ")
    listed = "\n".join(said)
    for text in (
        "with mode RGB",
        "Z.png with 6 x 5 pixels",
        "Z.png with the values 9",
        "b.c.jpg, which cannot be read",
    ):
        assert text in listed


def test_unchanged_labels_are_not_opened_again(folders, tmp_path, monkeypatch):
    from acam_kd.data.check import labels

    opened = []
    monkeypatch.setattr(labels, "open_label", lambda path, _open=labels.open_label: opened.append(path) or _open(path))
    first = check(folders)
    assert check(folders) == first and len(opened) == 2
    only(tmp_path, 0, 1, 2)
    assert check(folders) == [16, 16, 16] and len(opened) == 4


def test_images_of_labels_are_checked_as_others_are(folders, tmp_path):
    write(tmp_path / "images/a.jpg", np.zeros((4, 6, 3)))
    os.rename(tmp_path / "images/a.jpg", tmp_path / "images/a.bmp")
    Image.fromarray(np.full((4, 6), 4095, np.uint16)).save(tmp_path / "images/a.png")
    os.remove(tmp_path / "images/a.bmp")
    with pytest.raises(ConfigError) as error:
        check(folders)
    assert "1 images of 16 bits whose largest value is 4095" in value_of(error)
    with pytest.raises(ConfigError) as error:
        check_labels(pairs_of(folders), CLASSES, name="mine", reader="detectron2")
    assert "since Detectron2 cuts larger values off" in error.value.allowed
