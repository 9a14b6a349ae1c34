"""Classification: models, evaluation, and runs from the command."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from acam_kd.cli import train_settings
from acam_kd.core.errors import ConfigError
from acam_kd.data.splits import find_any_split
from acam_kd.tv.adapter import adapt
from acam_kd.tv.build import build_models, evaluate
from acam_kd.tv.cifar_nets import CIFAR_NETS, build_cifar_net
from acam_kd.tv.class_evaluation import ClassificationEvaluator, calibration_error, confusion
from acam_kd.tv.class_images import ClassImages, reduce_classes
from acam_kd.tv.classification import Classifier
from acam_kd.tv.labels import load_data
from acam_kd.tv.models import build_model, plain
from acam_kd.tv.preparation import prepare
from acam_kd.tv.run import Settings
from acam_kd.tv.training import train
from acam_kd.tv.trunk import TrunkSettings, set_up, trunk_of
from tests.tv.conftest import refuses
from tests.tv.test_training import interrupted, same, student_of

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Noise whose brightest channel is the class."""
    root, draw = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 4)):
        for channel, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 100, (20, 24, 3), dtype=np.uint8)
                pixels[:, :, channel] += 100
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return root


def tiny(folders, **changes):
    settings = Settings(
        find_any_split(folders, "train"), find_any_split(folders, "val"), "resnet8", size=16, iterations=8,
        batch_size=6, learning_rate=0.05, eval_period=4, checkpoint_period=1, workers=0,
    )  # fmt: skip
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="session")
def teacher(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(tiny(folders, student="resnet14", iterations=12), folder)
    return folder


@pytest.mark.parametrize(("name", "count"), [("resnet20", 272474), ("resnet56", 855770), ("wrn_16_1", 175066)])
def test_small_nets_have_their_usual_size(name, count):
    net = build_cifar_net(name, 10)
    if name != "wrn_16_1":
        assert sum(p.numel() for p in net.parameters()) == count
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10) and name in CIFAR_NETS


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_0", "googlenet", "regnet_y_400mf"])
def test_classifiers_of_torchvision_by_name(name):
    model = build_model(name, num_classes=4, size=64).train()
    losses = model([torch.rand(3, 64, 64), torch.rand(3, 80, 70)], [{"label": 0}, {"label": 3}])
    assert losses["loss_classification"].isfinite()
    assert adapt(model) is not None
    state = plain(model).state_dict()
    assert plain(build_model(name, num_classes=4)).load_state_dict(state)


def test_the_loss_is_the_cross_entropy_of_normalised_images():
    model = Classifier(build_cifar_net("resnet8", 3), size=32)
    images = [torch.rand(3, 32, 32) for _ in range(4)]
    loss = model(images, [{"label": k} for k in (0, 1, 2, 0)])["loss_classification"]
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (model.image_mean, model.image_std))
    logits = model.network((torch.stack(images) - mean) / std)
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).item(), rel=1e-5)


def test_levels_of_a_classifier():
    small = adapt(Classifier(build_cifar_net("resnet8", 3), size=16))
    levels = small.levels(("backbone", "classes"))
    assert {name: (spec.channels, spec.stride) for name, spec in levels.items()} == {
        "c0": (16, 1), "c1": (32, 2), "c2": (64, 4), "classes": (3, 0),
    }  # fmt: skip
    transformer = adapt(build_model("vit_b_16", num_classes=3, size=32))
    assert transformer.levels(("backbone",))["token"].channels == 768


def test_calibration_by_hand():
    assert calibration_error([0.95, 0.95, 0.55, 0.55], [True, False, True, True]) == pytest.approx(0.45)
    assert calibration_error([1.0], [True]) == 0


def test_metrics_by_hand():
    evaluator = ClassificationEvaluator({k: str(k) for k in range(6)})
    scores = torch.tensor([[0.5, 0.3, 0.1, 0.1, 0, 0], [0.2, 0.3, 0.3, 0.1, 0.1, 0], [0.4, 0.2, 0.2, 0.1, 0.1, 0]])
    targets = [{"image_id": k, "label": label} for k, label in enumerate((0, 1, 5))]
    evaluator.add([{"scores": s} for s in scores], targets)
    metrics = evaluator.metrics()
    assert metrics["top1"] == pytest.approx(100 / 3)  # a tie is no hit
    assert metrics["top5"] == pytest.approx(200 / 3)
    assert metrics["top1/0"] == 100 and metrics["top1/1"] == 0 and np.isnan(metrics["top1/3"])
    assert confusion(evaluator.results, 6)[5, 0] == 1


def test_augmentation_is_decided_by_the_seed(folders):
    data = ClassImages(find_any_split(folders, "train"), size=16)
    assert torch.equal(data[0, 5][0], data[0, 5][0]) and not torch.equal(data[0, 5][0], data[0, 6][0])
    assert data[0, 5][0].shape == (3, 16, 16) and data[3][1] == {"label": 0, "image_id": 3}
    large = ClassImages(find_any_split(folders, "train"), size=128)
    assert large[0, 1][0].shape == (3, 128, 128)


def test_a_run_learns_and_leaves_a_plain_network(folders, teacher):
    result = json.loads((teacher / "result.json").read_text())
    assert result["metrics"]["top1"] > 60
    state = torch.load(teacher / "student.pth", weights_only=True)
    assert build_cifar_net("resnet14", 3).load_state_dict(state)
    picture, split = str(folders / "confusion.png"), find_any_split(folders, "val")
    assert evaluate(str(teacher), "", split, confusion=picture)["top1"] == result["metrics"]["top1"]
    with open(picture, "rb") as file:
        assert file.read(4)[1:] == b"PNG"
    assert len(json.loads((teacher / "predictions.json").read_text())) == 12
    assert (teacher / "pictures" / "step_12.jpg").is_file()


@pytest.mark.parametrize("method", ["KD", "DKD", "NKD", "PKD", "AT", "CWD", "MGD", "NKD+PKD"])
def test_methods_distil_a_classifier(folders, teacher, method):
    data = load_data(find_any_split(folders, "train"), "resnet8", name="data", size=16)
    student = build_models(tiny(folders, teacher=str(teacher), method=method), data).student.train()
    images, targets = zip(*(data[k, 1] for k in (0, 9, 17)))
    losses = student(list(images), list(targets))
    assert len(losses) > 1 and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert not any("distillation" in name for name in student.state_dict())


def test_a_resumed_run_is_the_uninterrupted_one(folders, teacher, tmp_path):
    settings = tiny(folders, teacher=str(teacher), method="NKD")
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "parts", after=4)
    train(settings, tmp_path / "parts", resume=True)
    assert same(student_of(tmp_path / "whole"), student_of(tmp_path / "parts"))


def test_models_and_data_of_other_tasks_are_refused(folders, data):
    with refuses("student", "class for each image", "a classifier"):
        load_data(find_any_split(folders, "train"), "fcos_resnet18_fpn", name="training data")
    with refuses("student", "a classifier, for", "a detector"):
        load_data(find_any_split(data, "train"), "resnet18", name="training data")
    with refuses("crop", "", "square"):
        load_data(find_any_split(folders, "train"), "resnet18", name="training data", crop=(8, 8))


def test_bad_weights_are_one_line():
    with refuses("weights", "resnet20", "a file"):
        build_model("resnet20", num_classes=3, weights="DEFAULT")
    with refuses("weights", "NONE for resnet18", "DEFAULT"):
        build_model("resnet18", num_classes=3, weights="NONE")


@pytest.mark.parametrize(
    ("name", "size", "why"),
    [("vit_b_16", 50, "patch size"), ("inception_v3", 32, "Kernel size"), ("maxvit_t", 32, "is invalid for input")],
)
def test_a_size_that_a_network_does_not_take_is_one_line(name, size, why):
    with refuses("size", f"{size}, which {name} does not take (", "a size that it takes, as 2") as error:
        build_model(name, num_classes=3, size=size)
    assert why in error.value.value


def test_an_image_that_cannot_be_read_is_named(folders, tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.png").write_bytes(b"no image")
    with refuses("dataset", "x.png, which cannot be read", "a whole image file"):
        ClassImages(find_any_split(tmp_path, "train"), size=16)


def test_a_student_learns_from_itself(folders, tmp_path):
    settings = tiny(folders, method="USKD", options=("mu=0.1",))
    result = train(settings, tmp_path / "run")
    assert result["metrics"]["top1"] >= 0
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)
    assert state["distiller"]["weak_head.weight"].shape == (3, 32)  # the second-last stage
    assert not any("weak" in name for name in torch.load(tmp_path / "run" / "student.pth", weights_only=True))


def test_uskd_on_a_transformer_takes_the_class_token(folders):
    data = load_data(find_any_split(folders, "train"), "vit_b_16", name="data", size=32)
    student = build_models(tiny(folders, student="vit_b_16", size=32, method="USKD"), data).student
    images, targets = zip(*(data[k, 1] for k in (0, 9)))
    losses = student.train()(list(images), list(targets))
    assert losses["loss_uskd_weak"] > 0
    block = student.network.encoder.layers
    sum(loss for name, loss in losses.items() if "weak" in name).backward()
    assert block[5].mlp[0].weight.grad.abs().sum() > 0 and block[6].mlp[0].weight.grad is None


def test_methods_for_classifiers_refuse_other_models(data):
    images = load_data(find_any_split(data, "train"), "fcos_mobilenet_v3_small_fpn64", name="data")
    settings = Settings(
        find_any_split(data, "train"), find_any_split(data, "val"), "fcos_mobilenet_v3_small_fpn64", size=64,
        method="USKD",
    )  # fmt: skip
    with refuses("method", "USKD", "meaning for a FCOS"):
        build_models(settings, images)


def test_a_teacher_beside_a_method_that_needs_none_is_refused(folders, teacher):
    data = load_data(find_any_split(folders, "train"), "resnet8", name="data", size=16)
    with pytest.raises(ConfigError) as error:
        build_models(tiny(folders, teacher=str(teacher), method="USKD"), data)
    assert error.value.argument == "teacher" and "USKD learns from the student alone" in error.value.hint


def test_past_predictions_outlive_an_interruption_within_an_epoch(folders, tmp_path):
    settings = tiny(folders, method="PSKD", iterations=11, eval_period=5, batch_size=6)  # 24 images: epochs of 4 steps
    train(settings, tmp_path / "whole")
    interrupted(settings, tmp_path / "parts", after=5)
    train(settings, tmp_path / "parts", resume=True)
    one, two = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(one["state_dict"][name], two["state_dict"][name]) for name in one["state_dict"])
    tables = [state["distiller"]["_extra_state"] for state in (one, two)]
    assert torch.equal(tables[0]["table"], tables[1]["table"]) and tables[0]["seen"].sum() == 66
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert any("loss_pskd_past" in line for line in logged)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_teacher_learns_on_by_mcmi(folders, teacher, tmp_path, mode):
    settings = tiny(folders, student=str(teacher), method="MCMI", options=(f"centroids={mode}",), iterations=2)
    train(settings, tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["distiller"]
    assert state["taken"] and state["table"].argmax(1).tolist() == [0, 1, 2]
    assert state["table"].sum(1).tolist() == pytest.approx([1, 1, 1])


def test_centroids_move_no_statistics_in_eval_mode(folders, teacher):
    data = load_data(find_any_split(folders, "train"), "resnet14", name="data", size=16)
    for mode, unmoved in (("eval", True), ("train", False)):
        settings = tiny(folders, student=str(teacher), method="MCMI", options=(f"centroids={mode}",))
        student = build_models(settings, data).student.train()
        before = student.network.bn1.running_mean.clone()
        prepare(student, data, settings, torch.device("cpu"))
        assert torch.equal(before, student.network.bn1.running_mean) is unmoved and student.training


def test_a_classifier_with_a_teacher_gets_kd(folders):
    options = ["--data", str(folders), "--student", "resnet8", "--output", "run"]
    assert train_settings([*options, "--teacher", "output/teacher"]).method == "KD"
    assert (
        train_settings(options).method == "" == train_settings([*options, "--teacher", "t", "--method", "none"]).method
    )


def test_small_networks_have_the_weights_of_cifar(folders, teacher):
    data = load_data(find_any_split(folders, "train"), "resnet8", name="data", size=16)
    student = build_models(tiny(folders, teacher=str(teacher), method="KD"), data).student
    assert (student.distillation.method.alpha, student.distillation.method.temperature) == (9.0, 4.0)
    assert adapt(build_model("resnet18", num_classes=3)).family == "classifier"


def test_few_shots_are_balanced_and_classes_can_be_left_out(folders):
    split = find_any_split(folders, "train")
    data = ClassImages(split, size=16)
    reduce_classes(data, 0.25, (), 3)
    assert data.labels == (0, 0, 1, 1, 2, 2) and len({*data.ids}) == 6 and data[5][1]["label"] == 2
    other = ClassImages(split, size=16)
    reduce_classes(other, 1.0, ("bee",), 0)
    assert {*other.labels} == {0, 2} and other.num_classes == 3


@pytest.mark.parametrize(
    ("fraction", "leave_out", "argument", "value"),
    [(1.5, (), "fraction", ""), (1.0, ("dog",), "leave_out", "dog"), (1.0, ("ant", "bee"), "leave_out", "ant, bee")],
)
def test_bad_reductions_are_one_line(folders, fraction, leave_out, argument, value):
    with refuses(argument, value):
        reduce_classes(ClassImages(find_any_split(folders, "train"), size=16), fraction, leave_out, 0)


def test_only_classes_can_be_reduced(data):
    images = load_data(find_any_split(data, "train"), "fcos_mobilenet_v3_small_fpn64", name="data")
    with refuses("fraction", "boxes"):
        reduce_classes(images, 0.5, (), 0)


def test_a_trunk_goes_from_a_classifier_into_a_detector(tmp_path):
    classifier = build_model("resnet18", num_classes=3)
    torch.save(plain(classifier).state_dict(), tmp_path / "student.pth")
    detector = build_model("fcos_resnet18_fpn", num_classes=2)
    set_up(detector, TrunkSettings(str(tmp_path / "student.pth")))
    given = dict(plain(classifier).named_parameters())
    found = dict(trunk_of(detector).named_parameters())
    assert len(found) > 10 and all(torch.equal(value, given[name]) for name, value in found.items())
