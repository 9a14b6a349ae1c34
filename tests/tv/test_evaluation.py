"""The numbers are pycocotools'; a perfect model has 100."""

from __future__ import annotations

import json

import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from acam_kd.data.coco import find_split
from acam_kd.tv.data import CocoImages
from acam_kd.tv.evaluation import CocoEvaluator, SegmentationEvaluator


@pytest.fixture(params=[False, True])
def dataset(request, data):
    return CocoImages(find_split(data, "val"), masks=request.param)


def outputs(dataset, shift=0.0):
    """Yield the ground truth as detections, moved by some pixels, with scores that fall."""
    for index in range(len(dataset)):
        _, target = dataset[index]
        count = len(target["labels"])
        output = {"boxes": target["boxes"] + shift, "labels": target["labels"], "scores": torch.linspace(1, 0.5, count)}
        if dataset.masks:
            output["masks"] = target["masks"][:, None].float() * 0.8
        yield output, target


def evaluated(dataset, **arguments):
    evaluator = CocoEvaluator(dataset)
    evaluator.add(*zip(*outputs(dataset, **arguments)))
    return evaluator


def test_the_truth_has_100_and_nothing_has_0(dataset):
    found = evaluated(dataset).metrics()
    assert found["AP"] == pytest.approx(100) and found["AP75"] == pytest.approx(100)
    assert ("segm/AP" in found) == dataset.masks
    if dataset.masks:
        assert found["segm/AP"] == pytest.approx(100)
    assert CocoEvaluator(dataset).metrics()["AP"] == 0


def test_it_is_what_pycocotools_says_of_the_written_file(dataset, tmp_path):
    evaluator = evaluated(dataset, shift=2.0)
    (tmp_path / "r.json").write_text(json.dumps(evaluator.results))
    truth = COCO(dataset.split.json_file)
    direct = COCOeval(truth, truth.loadRes(str(tmp_path / "r.json")), "bbox")
    direct.evaluate()
    direct.accumulate()
    direct.summarize()
    found = evaluator.metrics()
    assert 0 < found["AP"] < 100
    for name, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), direct.stats):
        assert found[name] == pytest.approx(100 * value) if value > -1 else found[name] != found[name]
    assert evaluator.metrics() == pytest.approx(found, nan_ok=True)  # asking changes nothing


def test_labels_are_category_ids_again_and_unknown_ones_are_dropped(dataset):
    evaluator = CocoEvaluator(dataset)
    box = torch.tensor([[1.0, 2, 5, 8]] * 2)
    output = {"boxes": box, "labels": torch.tensor([3, 77]), "scores": torch.tensor([0.5, 0.4])}
    evaluator.masks = False
    evaluator.add([output], [{"image_id": 2}])
    assert evaluator.results == [{"image_id": 2, "category_id": 3, "bbox": [1.0, 2.0, 4.0, 6.0], "score": 0.5}]


def test_mean_iou_by_hand(data):
    evaluator = SegmentationEvaluator(CocoImages(find_split(data, "val"), semantic=True))
    truth = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 255]])
    predicted = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 2]])
    evaluator.add([{"semantic": predicted}], [{"semantic": truth}])
    found = evaluator.metrics()  # class 0: 3 of 4; class 1: 2 of 4; class 2 is not in the labels
    assert found["mIoU"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert found["accuracy"] == pytest.approx(100 * 5 / 7)
    evaluator.add([{"semantic": truth}], [{"semantic": truth}])  # summed over images, not averaged
    assert evaluator.metrics()["accuracy"] == pytest.approx(100 * 12 / 14, rel=0.2)
