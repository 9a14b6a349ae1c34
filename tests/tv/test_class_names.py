"""A student of a few of the teacher's classes, by name, in torchvision's engine."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

import acam_kd
from acam_kd import cli
from acam_kd.core import ConfigError, FrozenTeacher
from acam_kd.core.class_names import BACKGROUND, UNUSED
from acam_kd.core.classes import CommonClasses
from acam_kd.data.coco import find_split
from acam_kd.data.shapes import CLASSES
from acam_kd.methods.kd import binary_kd_loss, kd_loss
from acam_kd.tv import build as building
from acam_kd.tv.class_names import names_of_labels, names_of_weights, with_background
from acam_kd.tv.data import CocoImages
from acam_kd.tv.folder import RunFolder
from acam_kd.tv.models import build_model
from acam_kd.tv.training import train
from acam_kd.tv.written import as_dict

from .conftest import STUDENT, refuses, tiny
from .test_class_heads import HEADS, IMAGES, class_weight, spy
from .test_cli import quick, run

LRASPP = "lraspp_mobilenet_v3_large"
FEW = [CLASSES[3], CLASSES[0], "tram"]
"""The student's three classes: two of the teacher's six, in another order, and one of its own."""
TARGETS = [
    {"boxes": torch.tensor([[5.0, 5, 50, 50], [20, 10, 60, 40]]), "labels": torch.tensor([1, 3])},
    {"boxes": torch.tensor([[5.0, 50, 40, 90]]), "labels": torch.tensor([2])},
]


@pytest.fixture(scope="module")
def few(data, tmp_path_factory):
    """The drawn images with three of their six classes, of which the third has another name."""
    folder = tmp_path_factory.mktemp("few") / "data"
    shutil.copytree(data, folder)
    numbers = {4: 1, 1: 2, 6: 3}
    for file in (folder / "train.json", folder / "val.json"):
        content = json.loads(file.read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(FEW, 1)]
        kept = [a for a in content["annotations"] if a["category_id"] in numbers]
        content["annotations"] = [{**a, "category_id": numbers[a["category_id"]]} for a in kept]
        file.write_text(json.dumps(content))
    return folder


@pytest.fixture
def settings(few):
    return tiny(few)


def models(kind, classes=7):
    torch.manual_seed(2)
    return (build_model(HEADS[kind], num_classes=n, size=64) for n in (4, classes))


NAMES = {"student_class_names": FEW, "teacher_class_names": list(CLASSES)}


@pytest.mark.parametrize("kind", HEADS)
def test_class_heads_with_the_background_first(kind, monkeypatch):
    student, teacher = models(kind)
    with torch.no_grad():
        class_weight(teacher).mul_(30)
    acam_kd.distill(student, teacher, method="KD", **NAMES)
    assert student.distillation.classes["classes"] == CommonClasses((0, 1, 2), (0, 4, 1), (4, 7))
    whole, seen, ask = [], spy(student), FrozenTeacher.__call__
    monkeypatch.setattr(FrozenTeacher, "__call__", lambda *args: whole.append(ask(*args)) or whole[-1])
    loss = student.train()(IMAGES, TARGETS)["loss_kd_kl"]
    ((ours, theirs, _),) = seen
    assert torch.equal(theirs["classes"], whole[0]["classes"][:, [0, 4, 1]]) and ours["classes"].shape[1] == 3
    formula = kd_loss if kind == "faster rcnn" else binary_kd_loss
    assert torch.equal(loss, formula(ours["classes"], theirs["classes"])) and loss > 0
    loss.backward()
    by_class = class_weight(student).grad.flatten(1).abs().sum(1).view(-1, 4).sum(0)
    assert by_class[3] == 0 and (by_class[:3] > 0).all()


@pytest.mark.parametrize("method", ["DKD", "NKD"])
@pytest.mark.parametrize("kind", HEADS)
def test_labels_of_a_class_that_the_teacher_lacks_are_left_out(kind, method):
    student, teacher = models(kind)
    acam_kd.distill(student, teacher, method=method, **NAMES)
    seen = spy(student)
    losses = student.train()(IMAGES, TARGETS)
    ((_, _, targets),) = seen
    background = 0 if kind == "faster rcnn" else 3  # dense heads have no channel for it as a label
    assert set(targets.labels["classes"].unique().tolist()) == {-1, background, 1, 2}
    sum(x for name, x in losses.items() if method.lower() in name).backward()
    by_class = class_weight(student).grad.flatten(1).abs().sum(1).view(-1, 4).sum(0)
    assert by_class[3] == 0 and (by_class[1:3] > 0).all()


@pytest.mark.parametrize("names", [["a", "b"], ["a"]])
@pytest.mark.parametrize("method", ["DKD", "NKD"])
@pytest.mark.parametrize("kind", ["fcos", "retinanet"])
def test_one_common_class_of_a_dense_head_is_refused_where_a_softmax_needs_several(kind, method, names):
    """The channel of the background is there, but nothing is ever labelled as it."""
    student, teacher = (build_model(HEADS[kind], num_classes=1 + n, size=64) for n in (1, len(names)))
    with pytest.raises(ConfigError) as error:
        acam_kd.distill(student, teacher, method=method, student_class_names=["a"], teacher_class_names=names)
    assert (error.value.argument, error.value.value) == (f"{method}.levels", "classes with 1 class")
    acam_kd.distill(student, teacher, method="KD", student_class_names=["a"], teacher_class_names=names)


@pytest.mark.parametrize("options", [[], ["--class-map", f"tram={CLASSES[5]}"]])
def test_the_command_with_a_teacher_of_more_classes(few, finished, tmp_path, capsys, options):
    run(*quick(few, tmp_path / "run", "--teacher", finished, "--method", "KD", *options))
    (line,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("classes: ")]
    if options:
        assert (
            line == f"classes: 3 of the student's 3 are among the teacher's 6: {FEW[0]}, {FEW[1]}, tram ({CLASSES[5]})"
        )
    else:
        start = f"classes: 2 of the student's 3 are among the teacher's 6: {FEW[0]}, {FEW[1]}"
        assert line == f"{start}; left out, as the teacher does not know them: tram"
    assert json.loads((tmp_path / "run/student.json").read_text())["categories"]["3"] == "tram"
    state = torch.load(tmp_path / "run/student.pth", weights_only=True)
    build_model(STUDENT, num_classes=4, size=64).load_state_dict(state)


@pytest.mark.parametrize("method", ["KD", "CWD", "DKD"])
def test_segmentation_on_the_common_classes(settings, data, few, tmp_path, method):
    folder = tmp_path / "teacher"
    train(replace(tiny(data), student=LRASPP, iterations=1), folder)
    asked = replace(settings, student=LRASPP, teacher=str(folder), method=method, iterations=1)
    student = building.build(asked, CocoImages(asked.train_split, semantic=True))
    assert student.distillation.classes["logits"] == CommonClasses((0, 1, 2), (0, 4, 1), (4, 7))
    result = train(asked, tmp_path / "run")
    assert 0 <= result["metrics"]["mIoU"] <= 100


def test_a_teacher_that_shares_no_class_or_has_no_names(settings, few, finished, tmp_path):
    own = CocoImages(settings.train_split)
    own.categories = {1: "Kreis", 2: "Quadrat", 3: "Dreieck"}
    asked = replace(settings, teacher=str(finished), method="KD")
    with refuses("teacher", f"the classes {', '.join(CLASSES)}", "student's Kreis, Quadrat, Dreieck", "by {class_map}"):
        building.build(asked, own)
    assert building.build(replace(asked, class_map=("Kreis=plain disc",)), own).distillation.classes
    assert not building.build(replace(asked, method="PKD"), own).distillation.classes  # features have no classes
    data = CocoImages(settings.train_split)
    file = replace(asked, teacher=STUDENT, teacher_weights=str(finished / "student.pth"), teacher_classes=7)
    with refuses(
        "teacher", "7 classes at classes", "the student's 4", "name the classes by {teacher_class_names}, and"
    ):
        building.build(file, data)
    named = replace(file, teacher_classes=0, teacher_class_names=CLASSES)  # their number is the file's
    wanted = CommonClasses((0, 1, 2), (0, 4, 1), (4, 7))
    assert building.build(named, data).distillation.classes["classes"] == wanted
    named = replace(file, teacher_class_names=(BACKGROUND, *CLASSES))
    assert building.build(named, data).distillation.classes["classes"] == wanted
    with refuses("teacher_class_names", "4 names, the background among them", "7, one for each"):
        building.build(replace(file, teacher_class_names=CLASSES[:3]), data)


def test_names_are_read_from_text_or_a_file(few, finished, tmp_path):
    common = ["--data", few, "--student", STUDENT, "--output", "x", "--teacher", STUDENT]
    (tmp_path / "names.txt").write_text("__background__\nN/A\nN/A\n")
    for given, names in (("a, b", ("a", "b")), (tmp_path / "names.txt", (BACKGROUND, UNUSED, UNUSED))):
        options = [*common, "--teacher-class-names", given, "--class-map", "a=b", "c=d", "--class-map", "e=f"]
        asked = cli.train_settings([str(x) for x in options])
        assert asked.teacher_class_names == names and asked.class_map == ("a=b", "c=d", "e=f")
    with refuses("teacher_class_names", "no file ", "names with commas between them"):
        cli.train_settings([str(x) for x in [*common, "--teacher-class-names", "gone.txt"]])


def test_torchvisions_own_weights_know_their_classes(settings, monkeypatch):
    names = names_of_weights("fasterrcnn_resnet50_fpn", "DEFAULT")
    assert len(names) == 91 and names[0] == BACKGROUND and names.count(UNUSED) == 10 and names[3] == "car"
    assert names_of_weights("deeplabv3_resnet50", "DEFAULT")[:2] == [BACKGROUND, "aeroplane"]
    assert names_of_weights("fcos_resnet18_fpn64", "DEFAULT") == names_of_weights("fcos_resnet50_fpn", "x.pth") == []
    kind = HEADS["faster rcnn"]
    load = building.load_model

    def without_download(name, weights, *, role, **arguments):
        if role == "teacher":
            return build_model(kind, num_classes=91), None
        return load(name, weights, role=role, **arguments)

    monkeypatch.setattr(building, "load_model", without_download)
    data = CocoImages(settings.train_split)
    data.categories = {1: "dog", 2: "car", 3: "tram"}
    teacher = {"teacher": "fasterrcnn_resnet50_fpn", "teacher_weights": "DEFAULT"}
    student = building.build(replace(settings, student=kind, method="KD", **teacher), data)
    found = student.distillation.classes["classes"]
    assert found == CommonClasses((0, 1, 2), (0, names.index("dog"), names.index("car")), (4, 91))


def test_labels_have_names():
    assert names_of_labels({1: "a", 3: "b"}, 4) == [BACKGROUND, "a", UNUSED, "b"]
    assert names_of_labels({0: "sky", 1: "sea"}, 2) == ["sky", "sea"] and names_of_labels({}, 2) == []
    assert with_background(["a"], STUDENT) == with_background([BACKGROUND, "a"], STUDENT) == [BACKGROUND, "a"]
    assert with_background(["a"], LRASPP) == ["a"] and with_background((), STUDENT) == []


@pytest.mark.parametrize("kind", ["fcos", "faster rcnn", "segmentor", "ssd"])
def test_class_layers_of_other_classes_are_not_inherited(kind, tmp_path):
    """Their shapes agree: seven and seven, in another order."""
    from acam_kd.core import Plan
    from acam_kd.tv.distillation import build_distillation
    from acam_kd.tv.models import plain

    name = {"segmentor": LRASPP, "ssd": "ssdlite320_mobilenet_v3_large"}.get(kind) or HEADS[kind]
    student, teacher = (build_model(name, num_classes=4, size=64) for _ in range(2))
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in plain(teacher).parameters():
            parameter.copy_(torch.randn_like(parameter))
    start = {n: x.clone() for n, x in plain(student).state_dict().items()}
    names = [BACKGROUND, "a", "b", "c"]
    marks = (
        "classification_head.cls_logits",
        "classification_head.module_list",
        "box_predictor",
        "low_classifier",
        "high_classifier",
    )
    for theirs, inherits in ((["b", "a", "c"], False), (["a", "b", "c"], True)):
        build_distillation(
            student, teacher, Plan(inherit="always"), student_class_names=names,
            teacher_class_names=[BACKGROUND, *theirs],
        )  # fmt: skip
        moved = {n for n, x in plain(student).state_dict().items() if not torch.equal(x, start[n])}
        of_classes = {n for n, _ in plain(student).named_parameters() if any(mark in n for mark in marks)}
        assert of_classes and bool(of_classes & moved) == inherits and moved - of_classes


def test_a_run_that_is_older_than_the_settings_resumes(settings, tmp_path):
    before = as_dict(settings)
    for name in ("class_map", "teacher_class_names"):
        del before[name]
    (tmp_path / "settings.json").write_text(json.dumps(before))
    RunFolder(tmp_path).check(settings, resume=True)
    with refuses("class_map", "['a=b']", "[], as in the run in"):
        RunFolder(tmp_path).check(replace(settings, class_map=("a=b",)), resume=True)


def test_find_split_reads_the_few(few):
    assert CocoImages(find_split(few, "train")).categories == dict(enumerate(FEW, 1))
