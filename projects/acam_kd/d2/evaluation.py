"""Detectron2's evaluators, chosen by the ``evaluator_type`` in a dataset's metadata."""

from __future__ import annotations

from collections.abc import Sequence

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

from ..core.errors import ConfigError

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


def build_evaluator(dataset_name: str, output_folder: str, kpt_oks_sigmas: Sequence[float] = ()) -> DatasetEvaluator:
    """Build the evaluator of a registered dataset.

    Args:
        dataset_name: the name in Detectron2's catalog.
        output_folder: the folder for the predictions.
        kpt_oks_sigmas: TEST.KEYPOINT_OKS_SIGMAS, one per keypoint, for COCO's evaluation of keypoints. Empty for those
            of COCO's 17 keypoints.

    Raises:
        ConfigError: no evaluator is known for the dataset's ``evaluator_type``.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type", None)
    if kind not in EVALUATORS:
        raise ConfigError(
            "DATASETS.TEST",
            f"dataset {dataset_name} with evaluator_type {kind!r}",
            allowed=f"an evaluator_type of {', '.join(EVALUATORS)}",
        )

    def build(evaluator: type[DatasetEvaluator]) -> DatasetEvaluator:
        if evaluator in WITHOUT_FOLDER:
            return evaluator(dataset_name)
        keypoints = {"kpt_oks_sigmas": tuple(kpt_oks_sigmas)} if evaluator is COCOEvaluator else {}
        return evaluator(dataset_name, output_dir=output_folder, **keypoints)

    built = [build(evaluator) for evaluator in EVALUATORS[kind]]
    return built[0] if len(built) == 1 else DatasetEvaluators(built)
