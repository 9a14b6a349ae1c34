"""Keypoint datasets: the metadata that Detectron2 needs, read from a COCO json, and a check before a run starts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from ..core.errors import ConfigError
from .keypoint_flips import Pairs, flip_pairs, without_partner

__all__ = ["check_keypoints", "keypoint_metadata"]

logger = logging.getLogger("detectron2.acam_kd.keypoints")

TRAIN, TEST = "DATASETS.TRAIN", "DATASETS.TEST"
FLIP_MAPS = ("keypoint_flip_map", "flip_map")
"""The keys of a json's category that may hold the pairs of left and right."""
COCO_KEYPOINTS = 17
"""The number of keypoints that pycocotools itself has sigmas for."""
COLOUR = (255, 128, 0)


def keypoint_metadata(content: dict[str, Any]) -> dict[str, Any]:
    """Read the metadata of keypoint detection from the content of a COCO json.

    A dataset whose keypoints cannot be used can still train a detector of boxes. So nothing is raised here, and
    ``check_keypoints`` refuses the dataset when a run needs its keypoints.

    Args:
        content: the json, which ``check_coco`` has accepted.

    Returns:
        ``keypoint_names``, ``keypoint_flip_map`` and ``keypoint_connection_rules`` as Detectron2 defines them, and
        ``keypoint_problems``. The last has an error at "DATASETS.TRAIN" and at "DATASETS.TEST" if the keypoints cannot
        be used there. The dict is empty if no category has keypoints.
    """
    categories = [category for category in content["categories"] if category.get("keypoints")]
    if not categories:
        return {}
    problem = _problem(_check_categories, categories)
    if problem:
        return {"keypoint_problems": {TRAIN: problem, TEST: problem}}
    names = tuple(categories[0]["keypoints"])
    explicit = [pairs for pairs in map(_explicit_pairs, categories) if pairs is not None]
    problems = {
        TRAIN: _problem(_check_training, content["annotations"], len(names)),
        TEST: _problem(_check_evaluation, content["annotations"], len(names)),
    }
    return {
        "keypoint_names": names,
        "keypoint_flip_map": explicit[0] if explicit else flip_pairs(names),
        "keypoint_connection_rules": _connection_rules(categories[0], names),
        "keypoint_problems": {use: problem for use, problem in problems.items() if problem},
    }


def check_keypoints(cfg: CfgNode, *, training: bool) -> None:
    """Check that the datasets of a config have the keypoints of its head; without MODEL.KEYPOINT_ON do nothing.

    Raises:
        ConfigError: a dataset has no keypoints that can be used, or not as many as the head. Or a left or right one
            has no partner for a flip, TEST.KEYPOINT_OKS_SIGMAS does not fit, or test-time augmentation is on.
    """
    if not cfg.MODEL.KEYPOINT_ON:
        return
    for use, names in ((TRAIN, cfg.DATASETS.TRAIN if training else ()), (TEST, cfg.DATASETS.TEST)):
        for name in names:
            _check_names(cfg, use, name)
    if training and cfg.DATASETS.TRAIN:
        _check_flips(cfg)
    for name in cfg.DATASETS.TEST:
        _check_sigmas(cfg.TEST.KEYPOINT_OKS_SIGMAS, name)
    if cfg.TEST.AUG.ENABLED:
        raise ConfigError(
            "TEST.AUG.ENABLED", True, allowed="False, since Detectron2 has no test-time augmentation for keypoints"
        )


def _check_names(cfg: CfgNode, use: str, name: str) -> None:
    """Refuse a dataset without usable keypoints, or with another number of them than the head's."""
    metadata = MetadataCatalog.get(name)
    problem = metadata.get("keypoint_problems", {}).get(use)
    if problem:
        raise ConfigError(
            use,
            f"dataset {name}: {problem.value}",
            allowed=problem.allowed,
            hint="correct the json, or set MODEL.KEYPOINT_ON to False",
        )
    names = metadata.get("keypoint_names", None)
    if not names:
        raise ConfigError(
            use,
            f"dataset {name} without names of keypoints",
            allowed="the names, as the list 'keypoints' of the json's category",
            hint="add them, or set MODEL.KEYPOINT_ON to False",
        )
    number = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS
    if len(names) != number:
        allowed = f"{len(names)}, the keypoints of dataset {name}: {_listed(names)}"
        raise ConfigError("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", number, allowed=allowed)


def _check_flips(cfg: CfgNode) -> None:
    """Refuse training datasets with different keypoints, or with a left or right one that has no partner."""
    first = cfg.DATASETS.TRAIN[0]
    described = []
    for name in cfg.DATASETS.TRAIN:
        metadata = MetadataCatalog.get(name)
        pairs = metadata.get("keypoint_flip_map", None)
        if pairs is None:  # registered in Python; Detectron2 reads the map even if nothing is flipped
            raise ConfigError(
                TRAIN,
                f"dataset {name} without keypoint_flip_map in its metadata",
                allowed="the pairs of names that a horizontal flip swaps, which may be none",
            )
        described.append((metadata.keypoint_names, pairs))
        if described[-1] != described[0]:
            raise ConfigError(
                TRAIN,
                f"datasets {first} and {name} with different keypoints",
                allowed="the same keypoints, in the same order and with the same pairs of left and right",
            )
    alone = without_partner(*described[0])
    if cfg.INPUT.RANDOM_FLIP != "none" and alone:
        raise ConfigError(
            "INPUT.RANDOM_FLIP",
            cfg.INPUT.RANDOM_FLIP,
            allowed=f"none, since dataset {first} has no opposite of the keypoints {_listed(alone)}",
            hint="or give the json's category a flip_map of all pairs, in which a keypoint may be its own partner",
        )


def _check_sigmas(sigmas: Sequence[float], name: str) -> None:
    """Refuse sigmas that COCO evaluation cannot use for a dataset."""
    number = len(MetadataCatalog.get(name).keypoint_names)
    default = number == COCO_KEYPOINTS
    if default and not sigmas:
        return
    if len(sigmas) != number or not all(isinstance(sigma, (int, float)) and sigma > 0 for sigma in sigmas):
        raise ConfigError(
            "TEST.KEYPOINT_OKS_SIGMAS",
            list(sigmas),
            allowed=f"{number} numbers above 0, one per keypoint of dataset {name}{', or none' if default else ''}",
            hint="a larger one forgives larger distances; COCO's own are from 0.025 to 0.107",
        )


def _problem(check: Callable[..., None], *args: Any) -> ConfigError | None:
    """Return the error of a check instead of raising it."""
    try:
        check(*args)
    except ConfigError as error:
        return error.with_traceback(None)  # which would keep the whole json in memory
    return None


def _check_categories(categories: Sequence[dict[str, Any]]) -> None:
    """Refuse keypoints that are malformed, or that differ between categories."""
    first, maps = categories[0], []
    for category in categories:
        names, described = category["keypoints"], f"category {category['name']}"
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError("keypoints", f"{described} with keypoints {names!r}", allowed="a list of names")
        if len(set(names)) < len(names):
            raise ConfigError("keypoints", f"{described} with keypoints {_listed(names)}", allowed="different names")
        if names != first["keypoints"]:
            both = " and ".join(f"{each['name']} ({_listed(each['keypoints'])})" for each in (first, category))
            raise ConfigError(
                "keypoints",
                f"categories with different keypoints, {both}",
                allowed="the same keypoints for every category that has some",
            )
        pairs = _explicit_pairs(category)
        maps += [] if pairs is None else [pairs]
        if maps and pairs not in (None, maps[0]):
            raise ConfigError("flip_map", f"{described} with another flip_map", allowed="one flip_map for all")


def _explicit_pairs(category: dict[str, Any]) -> Pairs | None:
    """Read the pairs of left and right that a category names, if it does.

    Raises:
        ConfigError: they are not pairs of names, or a name has two partners.
    """
    written = next((category[key] for key in FLIP_MAPS if category.get(key) is not None), None)
    if written is None:
        return None
    partners: dict[str, str] = {}
    pairs: list[tuple[str, str]] = []
    for pair in written.items() if isinstance(written, dict) else written if isinstance(written, list) else [written]:
        named = (
            isinstance(pair, (list, tuple)) and len(pair) == 2 and all(name in category["keypoints"] for name in pair)
        )
        if not named or partners.get(pair[0], pair[1]) != pair[1] or partners.get(pair[1], pair[0]) != pair[0]:
            raise ConfigError(
                "flip_map",
                f"category {category['name']} with flip_map {written!r}",
                allowed="pairs of names of its keypoints, each with one partner",
            )
        if pair[0] not in partners:
            pairs.append((pair[0], pair[1]))
        partners |= {pair[0]: pair[1], pair[1]: pair[0]}
    return tuple(pairs)


def _check_training(annotations: Sequence[dict[str, Any]], number: int) -> None:
    """Refuse annotations that Detectron2 cannot train on; it leaves out crowds and images without keypoints."""
    lacking: dict[Any, int] = {}
    images, visible = set(), False
    for index, annotation in enumerate(annotations):
        if annotation["iscrowd"]:
            continue
        points = annotation.get("keypoints")
        if not points:
            lacking.setdefault(annotation["image_id"], index)
            continue
        _check_points(index, points, number)
        images.add(annotation["image_id"])
        visible = visible or any(value > 0 for value in points[2::3])
    mixed = [index for image, index in lacking.items() if image in images]
    if mixed:
        raise ConfigError(
            "keypoints",
            f"annotations[{mixed[0]}] without keypoints, in an image where others have some",
            allowed=f"{3 * number} numbers, which are 0 for what is not labelled",
        )
    if not visible:
        raise ConfigError(
            "keypoints", "no visible keypoint in any annotation", allowed="a visibility of 1 or 2 somewhere"
        )


def _check_evaluation(annotations: Sequence[dict[str, Any]], number: int) -> None:
    """Refuse annotations that COCO evaluation of keypoints cannot read; it reads crowds too."""
    for index, annotation in enumerate(annotations):
        _check_points(index, annotation.get("keypoints"), number)
        if not isinstance(annotation.get("num_keypoints"), int):
            raise ConfigError(
                "keypoints",
                f"annotations[{index}] without num_keypoints",
                allowed="the number of its labelled keypoints, which COCO evaluation reads",
            )


def _check_points(index: int, points: Any, number: int) -> None:
    """Refuse the keypoints of one annotation if they are not x, y and visibility for each name."""
    allowed = f"{3 * number} numbers, x, y and visibility of {number} keypoints"
    if not isinstance(points, list):
        raise ConfigError("keypoints", f"annotations[{index}] without a list of keypoints", allowed=allowed)
    if len(points) != 3 * number or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in points):
        raise ConfigError("keypoints", f"annotations[{index}] with keypoints {_listed(points)}", allowed=allowed)


def _connection_rules(category: dict[str, Any], names: Sequence[str]) -> list[tuple[str, str, tuple[int, int, int]]]:
    """Name the lines of a skeleton, whose numbers begin with 1; leave out, with a warning, one that does not fit."""
    rules = []
    for line in category.get("skeleton") or []:
        try:
            start, end = line
            if min(start, end) < 1:
                raise IndexError
            rules.append((names[start - 1], names[end - 1], COLOUR))
        except (IndexError, TypeError, ValueError):
            logger.warning(
                f"category {category['name']}: the line {line!r} of its skeleton is not drawn; expected two numbers "
                f"from 1 to {len(names)}"
            )
    return rules


def _listed(values: Sequence[Any]) -> str:
    """Show the first values of a list."""
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
