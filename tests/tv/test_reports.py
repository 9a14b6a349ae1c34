"""Everything that is seen before and while a run runs: the teacher's metric, the progress line, pictures, words."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from acam_kd.data.coco import find_split
from acam_kd.data.splits import find_any_split
from acam_kd.report import progress as module
from acam_kd.report.progress import Progress, duration
from acam_kd.report.results import Detections
from acam_kd.report.samples import GAP, HEAD, SIDE, Sample, sheet, spread
from acam_kd.tv.build import load_model
from acam_kd.tv.data import CocoImages
from acam_kd.tv.evaluation import CocoEvaluator
from acam_kd.tv.pictures import draw, draw_masks
from acam_kd.tv.teacher_check import check_teacher
from acam_kd.tv.training import train

from .conftest import tiny

CPU = torch.device("cpu")


# The folder.


def test_a_folder_explains_itself(finished, settings, tmp_path):
    lines = (finished / "README.txt").read_text().splitlines()
    assert len(lines) == 5 and settings.student in lines[0]
    named = set(re.findall(r"[\w]+\.(?:jsonl|json|pth|ckpt|txt|yaml)|\w+/", " ".join(lines)))
    there = {f"{path.name}/" if path.is_dir() else path.name for path in finished.iterdir()} - {"README.txt"}
    assert named - {"run.lock"} == there
    train(replace(settings, teacher=str(finished), method="Mimic", iterations=1), tmp_path / "run")
    assert f"distilled from {finished} by Mimic" in (tmp_path / "run/README.txt").read_text()


# Pictures.


def test_every_evaluation_has_a_picture_in_folder_and_tensorboard(finished):
    assert sorted(path.name for path in (finished / "pictures").iterdir()) == ["step_2.jpg", "step_4.jpg"]
    picture = cv2.imread(str(finished / "pictures/step_4.jpg"))
    rows = 2  # three images, two pairs in a row
    assert picture.shape == (HEAD + rows * (SIDE + GAP), 2 * (2 * (SIDE + GAP) + GAP), 3)
    board = EventAccumulator(str(finished / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [event.step for event in board.Images("validation")] == [2, 4]
    assert {"AP", "loss", "lr"} <= {*board.Tags()["scalars"]}


def test_the_masks_of_validation_images_are_a_picture_of_every_evaluation(data, finished, settings, tmp_path):
    distilled = replace(
        settings, teacher=str(finished), inherit="never", iterations=4, eval_period=2, checkpoint_period=4
    )
    train(replace(distilled, method="ACAMKD"), tmp_path / "acam")
    files = sorted(path.name for path in (tmp_path / "acam/pictures").iterdir())
    assert files == ["masks_step_2.jpg", "masks_step_4.jpg", "step_2.jpg", "step_4.jpg"]
    board = EventAccumulator(str(tmp_path / "acam/tensorboard"), size_guidance={"images": 0})
    board.Reload()
    assert [event.step for event in board.Images("masks")] == [2, 4]
    student, _ = load_model(str(tmp_path / "acam"), "", num_classes=None, size=None, role="student")
    assert draw_masks(student, CocoImages(find_split(data, "val")), CPU) is None  # nothing is attached
    train(replace(distilled, method="Mimic"), tmp_path / "mimic")
    assert not [*(tmp_path / "mimic/pictures").glob("masks*")]


class Oracle(torch.nn.Module):
    """Predicts the truth of the images that it is shown, in order, and one box too many below the threshold."""

    def __init__(self, data, indices):
        super().__init__()
        self.targets = iter([data[index][1] for index in indices])

    def forward(self, images):
        target = next(self.targets)
        if "semantic" in target:
            return [{"semantic": target["semantic"]}]
        boxes = torch.cat([target["boxes"], torch.tensor([[1.0, 1, 60, 60]])])
        labels = torch.cat([target["labels"], torch.tensor([1])])
        return [{"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.1, len(labels))}]


def halves(picture):
    """The left and the right half of each pair on a sheet with one column."""
    width = SIDE + GAP
    return picture[HEAD:, :width], picture[HEAD:, width : 2 * width]


def test_label_maps_are_drawn_beside_the_truth(data):
    images = CocoImages(find_split(data, "val"), semantic=True)
    picture = draw(Oracle(images, [0]), images, CPU, count=1)
    truth, predicted = halves(picture)
    assert (truth == predicted).all() and truth.std() > 0


def test_detections_are_drawn_beside_the_truth_with_their_scores(data):
    images = CocoImages(find_split(data, "val"))
    truth, predicted = halves(draw(Oracle(images, [0]), images, CPU, count=1))
    pixels = (images[0][0] * 255).round().byte().permute(1, 2, 0).numpy()
    bare, _ = halves(sheet([Sample(pixels, *2 * [Detections(np.zeros((0, 4)), [])])], ["a"], columns=1))
    assert 0 < (truth != bare).mean() < 0.9 and (truth != predicted).any()  # the scores
    x, y = (images[0][1]["boxes"][0] * SIDE / 64).int().tolist()[:2]
    assert (truth[y + 3, x] == predicted[y + 3, x]).all() and (truth[y + 3, x] != bare[y + 3, x]).any()  # the same edge


def test_pixels_that_do_not_count_stay_as_they_are():
    image = np.full((320, 320, 3), 100, np.uint8)
    labels = np.full((320, 320), 255)
    labels[:, 160:] = 1
    truth, predicted = halves(sheet([Sample(image, labels, np.full_like(labels, -1))], ["a", "b"], columns=1))
    assert (truth[:SIDE, :160] == 100).all() and (truth[:SIDE, 160:320] != 100).any(-1).all()
    assert (predicted[:SIDE, :SIDE] == 100).all()


def test_eight_images_are_spread_over_the_data():
    assert spread(3, 8) == [0, 1, 2] and spread(8, 8) == [*range(8)] and spread(16, 8) == [*range(0, 16, 2)]
    assert len(spread(1001, 8)) == 8 and spread(1001, 8)[0] == 0


def test_drawing_restores_every_mode_and_no_random_number(data, finished):
    model, _ = load_model(str(finished), "", num_classes=None, size=None, role="student")
    model.train()
    model.backbone.eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = torch.get_rng_state()
    draw(model, CocoImages(find_split(data, "val")), CPU)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)


# The teacher's metric.


def test_the_teacher_is_measured_on_the_chosen_images_only(data, caplog):
    caplog.set_level(logging.INFO)
    images = CocoImages(find_split(data, "train"))
    assert check_teacher(Oracle(images, [0, 3]), images, CPU, count=2) > 60
    assert "the teacher's AP on 2 of 6 validation images: " in caplog.text and "belong" not in caplog.text
    evaluator = CocoEvaluator(images, [images.ids[0]])
    evaluator.add(Oracle(images, [0])([None]), [images[0][1]])
    everywhere = CocoEvaluator(images)
    everywhere.results = evaluator.results
    assert evaluator.metrics()["AP"] > everywhere.metrics()["AP"]


@pytest.mark.parametrize("semantic", [False, True])
def test_a_teacher_that_finds_nothing_is_a_warning(data, caplog, semantic):
    class Blind(torch.nn.Module):
        def forward(self, images):
            empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
            wrong = {"semantic": torch.full(images[0].shape[-2:], 6)}
            return [wrong if semantic else empty]

    images = CocoImages(find_split(data, "val"), semantic=semantic)
    assert check_teacher(Blind(), images, CPU) < 1.1 or semantic
    assert semantic or "do its weights, its classes and its pixels' order belong to this data?" in caplog.text


@pytest.mark.slow
def test_a_run_measures_its_teacher_before_the_first_step(settings, finished, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    own = replace(settings, teacher=str(finished), method="Mimic", iterations=1)

    def said(run, changed, resume=False):
        caplog.clear()
        train(changed, tmp_path / run, resume=resume)
        return "the teacher's AP on 3 of 3 validation images" in caplog.text

    assert said("a", own)
    assert not said("b", replace(own, no_teacher_check=True))
    assert not said("c", replace(own, teacher="", method=""))
    for name in ("student.pth", "result.json"):
        (tmp_path / "a" / name).unlink()
    assert not said("a", own, resume=True)
    students = [torch.load(tmp_path / run / "student.pth", weights_only=True) for run in ("a", "b")]
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())  # it moves nothing


def test_a_teacher_of_other_classes_is_not_measured(settings, finished, data, tmp_path, caplog):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    for split in ("train", "val"):
        content = json.loads((copy / f"{split}.json").read_text())
        content["categories"][0]["name"] = "other"
        (copy / f"{split}.json").write_text(json.dumps(content))
    caplog.set_level(logging.INFO)
    own = replace(tiny(copy), teacher=str(finished), method="Mimic", iterations=1, taps=("backbone",))
    train(own, tmp_path / "run")
    assert "the teacher's" not in caplog.text


# The progress line.


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self, width=80):
        """The lines that a terminal shows."""
        shown, line = [], ""
        for part in re.findall(r"\r\x1b\[K|\n|[^\r\n]+", self.getvalue()):
            if part == "\n":
                shown.append(line)
                line = ""
            else:
                line = "" if part.startswith("\r") else line + part
        return [*shown, line]


@pytest.fixture
def terminal(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(module.shutil, "get_terminal_size", lambda: module.shutil.os.terminal_size((60, 20)))
    stream = Terminal()
    stream.clock = clock
    return stream


def test_messages_stand_above_the_line(terminal):
    handler = logging.StreamHandler(terminal)
    logging.getLogger().addHandler(handler)
    try:
        with Progress(100, 8, stream=terminal) as line:
            for step in (1, 2, 3):
                terminal.clock[0] += 0.5
                line.count()
                assert line.due()
                line.draw(line.text(step, {"loss": 1.5, "loss_a": 0.5}, rate=0.01))
                assert not line.due()
                if step == 2:
                    logging.getLogger("acam_kd").warning("a message")
                    assert line.due()
            shown = terminal.screen()
            assert shown[0] == "a message" and len(shown) == 2 and "a message" not in shown[1]
            assert (
                shown[1].startswith("step 3/100  0:00:48 left  16 images/s  lr 0.01  loss 1.5") and len(shown[1]) <= 59
            )
        logging.getLogger("acam_kd").warning("the end")
        assert terminal.screen() == ["a message", "the end", ""]
    finally:
        logging.getLogger().removeHandler(handler)


def test_the_line_says_what_is_left_by_hand(terminal):
    line = Progress(100, 8, stream=terminal)
    for _ in range(10):
        terminal.clock[0] += 2.0
        line.count()
    terminal.clock[0] += 20.0  # an evaluation
    line.start()
    line.metrics = "AP 12.00 at 10"
    for _ in range(10):
        terminal.clock[0] += 2.0
        line.count()
    text = line.text(20, {"loss": 2.0}, rate=1e-3)  # 60 s for 20 steps
    assert text == "step 20/100  0:04:00 left  4 images/s  AP 12.00 at 10  lr 0.001  loss 2"
    assert duration(59.6) == "0:01:00" and duration(86399) == "23:59:59"


def test_in_a_file_the_same_is_a_message(settings, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    train(replace(settings, iterations=3, eval_period=2), tmp_path / "run")
    (line,) = [text for text in caplog.messages if text.startswith("step 3/3  0:00:00 left  ")]
    assert re.search(r"  [\d.e+]+ images/s  AP [\d.]+ at 2  lr [\d.e-]+  loss [\d.]+  classification ", line)
    steps = [json.loads(x)["step"] for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 3, 3]  # a short run has its last step's losses at least


def test_no_line_where_nobody_looks(terminal):
    for line in (Progress(2, 1, stream=io.StringIO()), Progress(2, 1, shown=False, stream=terminal)):
        with line:
            assert not line.live and not line.due()
            line.draw("text")
        assert line.stream.getvalue() == ""


# Label images.


def test_label_images_have_fingerprints_and_pictures(data, tmp_path):
    root = tmp_path / "data"
    for split in ("train", "val"):
        shutil.copytree(data / split, root / split / "images")
        shutil.copytree(data / f"{split}_labels", root / split / "labels")
    names = "background,disc,barred disc,triangle,barred triangle,square,barred square"
    splits = {f"{split}_split": find_any_split(root, split, names) for split in ("train", "val")}
    own = replace(tiny(data), student="lraspp_mobilenet_v3_large", iterations=2, **splits)

    def stop(_, step):
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(own, tmp_path / "run", observers=[stop])
    assert (tmp_path / "run/pictures/step_2.jpg").is_file()
    found = json.loads((tmp_path / "run/data.json").read_text())
    assert found["train_split"]["files"] == 12 and found["train_split"]["annotations"] == ""
    label = sorted((root / "train/labels").iterdir())[0]
    Image.open(label).save(label, compress_level=0)
    with pytest.raises(ValueError, match="train_split: found other sizes of image files"):
        train(own, tmp_path / "run", resume=True)
