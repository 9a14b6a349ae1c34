"""Pascal VOC's format as tools write it: layouts, lists, xml files, and each fault by file and line."""

from __future__ import annotations

import pytest

from acam_kd.data.splits import find_any_split, find_whole, named_split

from .drawn import content, draw, objects, own_cache, refused, write  # noqa: F401

DOG = [("dog", 15, 5, 10, 10)]


def thing(name="dog", box=(16, 6, 25, 15), more=""):
    """Pixels 16 to 25 and 6 to 15, counted from 1."""
    bounds = "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    return f"<object>\n<name>{name}</name>\n{more}<bndbox>{bounds}</bndbox>\n</object>\n"


def xml(*things, size=(40, 20), before=""):
    return (
        f"{before}<annotation>\n<filename>x.png</filename>\n"
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>\n{''.join(things)}</annotation>\n"
    )


@pytest.fixture
def folder(tmp_path):
    """Make the layout of the challenge: two images to train on, one to validate on, a cat in one of them."""
    folder = tmp_path / "VOC2012"
    for name in "abc":
        draw(folder / f"JPEGImages/{name}.jpg")
        write(folder / f"Annotations/{name}.xml", xml(thing()))
    write(folder / "Annotations/c.xml", xml(thing(), thing("cat", (1, 1, 40, 20))))
    write(folder / "ImageSets/Main/train.txt", "a\nb\n")
    write(folder / "ImageSets/Main/val.txt", "c\n")
    return folder


def test_boxes(folder, caplog):
    train, val = (find_any_split(folder, split) for split in ("train", "val"))
    assert objects(train) == {"a.jpg": DOG, "b.jpg": DOG}
    assert objects(val) == {"c.jpg": [*DOG, ("cat", 0, 0, 40, 20)]}
    assert [content(split)["categories"] for split in (train, val)] == [
        [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]  # by alphabet, the same for both
    ] * 2
    said = [record.getMessage() for record in caplog.records if "the classes are" in record.getMessage()]
    assert said == [f"{folder}: the classes are cat (1 objects), dog (3 objects)"]


def test_given_classes_have_their_order(folder):
    write(folder / "classes.txt", "dog\ncat\nbird\n")
    assert [c["name"] for c in content(find_any_split(folder, "train"))["categories"]] == ["dog", "cat", "bird"]
    assert [c["name"] for c in content(find_any_split(folder, "train", "cat,dog"))["categories"]] == ["cat", "dog"]


def test_coordinates_from_zero_and_fractions(folder):
    """Some tools count from 0; a box never begins outside of its image for that."""
    write(folder / "Annotations/a.xml", xml(thing(box=(0, 0, 40, 20)), thing(box=(1.5, 2.25, 3.5, 4))))
    assert objects(find_any_split(folder, "train"))["a.jpg"] == [("dog", 0, 0, 40, 20), ("dog", 0.5, 1.25, 3, 2.75)]


def test_difficult_objects_are_crowds(folder):
    write(
        folder / "Annotations/a.xml",
        xml(thing(more="<difficult>1</difficult>"), thing(more="<difficult>0</difficult>")),
    )
    entries = content(find_any_split(folder, "train"))["annotations"]
    assert [entry["iscrowd"] for entry in entries] == [1, 0, 0]


def test_parts_of_a_person_are_no_objects(folder):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    write(folder / "Annotations/a.xml", xml(thing(more=part)))
    assert objects(find_any_split(folder, "train"))["a.jpg"] == DOG


@pytest.mark.parametrize("layout", ["beside", "kaggle", "flat"])
def test_other_layouts(tmp_path, layout):
    """Roboflow's, with xml files beside the images of a split; and folders without a split."""
    if layout == "beside":
        for split in ("train", "valid"):
            draw(tmp_path / split / "a.jpg")
            write(tmp_path / split / "a.xml", xml(thing("cat" if split == "valid" else "dog")))
        assert objects(find_any_split(tmp_path, "train")) == {"a.jpg": DOG}
        assert objects(find_any_split(tmp_path, "val")) == {"a.jpg": [("cat", 15, 5, 10, 10)]}
        assert len(content(find_any_split(tmp_path, "val"))["categories"]) == 2
        return
    xmls, images = {"kaggle": ("annotations", "images"), "flat": (".", ".")}[layout]
    draw(tmp_path / images / "a.png")
    write(tmp_path / xmls / "a.xml", xml(thing()))
    assert objects(find_whole(tmp_path)) == {"a.png": DOG}
    assert objects(named_split(str(tmp_path / images), str(tmp_path / xmls))) == {"a.png": DOG}


def test_lists(folder):
    """Names with spaces, blank lines, lists of one class, and trainval beside test alone."""
    lists = folder / "ImageSets/Main"
    draw(folder / "JPEGImages/my image 1.jpg")
    write(folder / "Annotations/my image 1.xml", xml(thing()))
    write(lists / "train.txt", "a  1\n\nb -1\nmy image 1\n")
    assert list(objects(find_any_split(folder, "train"))) == ["a.jpg", "b.jpg", "my image 1.jpg"]
    (lists / "train.txt").rename(lists / "trainval.txt")
    with refused("no train split", argument="data"):  # trainval would have the images of val
        find_any_split(folder, "train")
    (lists / "val.txt").rename(lists / "test.txt")
    assert len(objects(find_any_split(folder, "train"))) == 3 and len(objects(find_any_split(folder, "val"))) == 1
    write(lists / "test.txt", "c\ngone\n")
    with refused(f"{lists}/test.txt:2: no image gone", f"an image of that name in {folder}/JPEGImages"):
        find_any_split(folder, "val")


def test_an_image_without_an_xml_file_has_no_objects(folder, caplog):
    (folder / "Annotations/b.xml").unlink()
    assert objects(find_any_split(folder, "train")) == {"a.jpg": DOG, "b.jpg": []}
    assert "1 of 2 images have no label file, so no objects; the first is" in caplog.text


@pytest.mark.parametrize(
    ("text", "value", "allowed"),
    [
        (xml(thing())[:-30], ":6: xml that does not parse (", "a whole xml file"),
        ("", ":1: xml that does not parse (no element found)", "a whole xml file"),
        ("<annotation>\n<object>\n</annotation>", ":3: xml that does not parse (mismatched tag)", "a whole xml file"),
        ("\n<?xml version='1.0'?>\n<annotation/>", ":2: xml that does not parse (", "a whole xml file"),
        (
            "<?xml version='1.0' encoding='klingon'?>\n<annotation/>",
            ":1: xml that does not parse (",
            "a whole xml file",
        ),
        (xml(thing("bird")), ":5: an object bird", "one of cat, dog"),
        (xml(thing("")), ":5: an object without a name", "one of cat, dog"),
        (xml("<object>\n<name>dog</name></object>"), ":4: an object without bndbox", "a box for each object"),
        (xml(thing(), thing(box=("x", 1, 2, 3))), ":10: xmin x", "a finite number of pixels"),
        (xml(thing(box=(1, "nan", 2, 3))), ":6: ymin nan", "a finite number"),
        (xml(thing(box=(1, 1, "", 3))), ":6: xmax missing", "a finite number"),
        (xml(thing(box=(1, 1, 3))), ":6: ymax missing", "a finite number"),
        (xml(thing(box=(9, 1, 3, 4))), ":6: a box from 9, 1 to 3, 4", "xmin <= xmax and ymin <= ymax"),
        (xml(thing(box=(90, 1, 93, 4))), ":6: a box from 90, 1 to 93, 4", "a box in 40 x 20 pixels"),
        (xml(thing(box=(1, 1, "1e308", 4))), ":6: a box from 1, 1 to 1e+308, 4", "a box in 40 x 20 pixels"),
        (xml(thing(), size=(20, 40)), ":3: a size of 20 x 40", "40 x 20, as its image is read"),
    ],
)
def test_xml_files_that_are_wrong(folder, text, value, allowed):
    write(folder / "classes.txt", "cat\ndog\n")
    write(folder / "Annotations/a.xml", text)
    with refused(f"{folder}/Annotations/a.xml{value}", allowed):
        find_any_split(folder, "train")


def test_xml_files_that_are_wrong_are_named_when_classes_are_counted(folder):
    write(folder / "Annotations/c.xml", "<annotation>")
    with refused(f"{folder}/Annotations/c.xml:1: xml that does not parse"):
        find_any_split(folder, "train")


def test_entities_are_refused(folder):
    """A few lines of them fill any memory."""
    before = "<!DOCTYPE x [\n<!ENTITY a 'dog'>\n<!ENTITY b '&a;&a;'>]>\n"
    write(folder / "Annotations/a.xml", xml(thing("&b;"), before=before))
    with refused("a.xml:2: an entity", "xml without declarations"):
        find_any_split(folder, "train")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "iso-8859-1"])
def test_names_in_other_alphabets(folder, encoding):
    text = xml(thing("café"), before=f"<?xml version='1.0' encoding='{encoding}'?>\n")
    (folder / "Annotations/a.xml").write_bytes(text.encode(encoding))
    assert objects(find_any_split(folder, "train"))["a.jpg"] == [("café", 15, 5, 10, 10)]


def test_no_size_or_none_that_says_anything(folder):
    write(folder / "Annotations/a.xml", xml(thing(), size=(0, 0)))
    write(folder / "Annotations/b.xml", f"<annotation>{thing()}</annotation>")
    assert objects(find_any_split(folder, "train")) == {"a.jpg": DOG, "b.jpg": DOG}


def test_images_and_xml_files_that_have_no_partner(folder):
    (folder / "ImageSets/Main/train.txt").unlink()
    (folder / "ImageSets/Main/val.txt").unlink()
    (folder / "JPEGImages/b.jpg").unlink()
    with refused(f"{folder}/Annotations/b.xml without its image", f"an image of that name in {folder}/JPEGImages"):
        find_whole(folder)
    (folder / "Annotations/b.xml").unlink()
    draw(folder / "JPEGImages/a.png")
    with refused(f"{folder}/JPEGImages/a.jpg and a.png", "one image for an xml file"):
        find_whole(folder)


def test_no_objects_at_all(folder):
    for name in "abc":
        write(folder / f"Annotations/{name}.xml", xml())
    with refused("3 xml files and no object", "at least one object"):
        find_any_split(folder, "train")
