"""Detectron2's evaluators, chosen by the ``evaluator_type`` that a dataset's metadata gives."""

from __future__ import annotations

from detectron2.data import MetadataCatalog
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
)

__all__ = ["build_evaluator"]

EVALUATORS = {
    "coco": [COCOEvaluator],
    "coco_panoptic_seg": [SemSegEvaluator, COCOEvaluator, COCOPanopticEvaluator],
    "lvis": [LVISEvaluator],
    "sem_seg": [SemSegEvaluator],
    "cityscapes_instance": [CityscapesInstanceEvaluator],
    "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    "pascal_voc": [PascalVOCDetectionEvaluator],
}
WITHOUT_FOLDER = (CityscapesInstanceEvaluator, CityscapesSemSegEvaluator, PascalVOCDetectionEvaluator)


def build_evaluator(dataset_name: str, output_folder: str) -> DatasetEvaluator:
    """Build the evaluator of a registered dataset.

    Raises:
        ValueError: no evaluator is known for the dataset's ``evaluator_type``.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise ValueError(f"dataset {dataset_name} has evaluator_type {kind!r}; known: {', '.join(EVALUATORS)}")
    built = [
        make(dataset_name) if make in WITHOUT_FOLDER else make(dataset_name, output_dir=output_folder)
        for make in EVALUATORS[kind]
    ]
    return built[0] if len(built) == 1 else DatasetEvaluators(built)
