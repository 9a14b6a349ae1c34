"""The recipes: published settings of each method for each kind of model, or assumptions that are called so.

``RECIPES[method][family]`` serves both engines. A recipe is used where a user leaves a setting open; see
``core/options.py``. Every row names its source. Whatever is not published is marked "assumption". None of the rows
was run on COCO here. The authors' numbers of tokens, 6 on maps and 8 on logits, are the defaults of MasKD and FreeKD.
Families: RetinaNet, FCOS, RepPoints, ``rcnn`` (Faster, Mask, Keypoint and Cascade R-CNN), ``semseg``, ``classifier``,
and ``small_classifier`` for networks of small images, whose rows are published for CIFAR-100.
"""

from __future__ import annotations

from ..core.distiller import FIRST_FOUR, LAST, Recipe
from ..core.features import BACKBONE, CLASSES, LOGITS, NECK_CONVS

__all__ = ["RECIPES"]

MGD_ONE_STAGE = {"alpha": 2e-5, "lambda_mask": 0.65}
MGD_TWO_STAGE = {"alpha": 5e-7, "lambda_mask": 0.45}
CWD_GFL = {"alpha": 10.0, "temperature": 1.0}
KD_CIRKD = {"alpha": 1.0, "temperature": 1.0}
DKD_RCNN = {"alpha": 1.0, "beta": 0.25, "temperature": 1.0}
NKD_IMAGENET = {"alpha": 1.0, "gamma": 1.5, "temperature": 1.0}
MGD_IMAGENET = {"alpha": 7e-5, "lambda_mask": 0.15, "dropped": "channels"}
SCORE_WEIGHTED = {"alpha": 6.0}
FREEKD = {"alpha": 1.0, "lambda_mse": 5.0}
RECONSTRUCTION = (
    "a reconstruction: MGD's weight and its fractions of positions and, for images, of channels (assumption)"
)
SAMKD = {"alpha": 2e-5, "rho_s": 0.65, "rho_c": 0.15, "beta": 1.0, "temperature": 1.0}
MASKED_AND_LOGITS = "a reconstruction: the weights and fractions of DMKD's, and KD's weight for sigmoids (assumption)"
SECOND_LAST = (-2, -1)
GAIN = "the gain of 6 in Ultralytics' documentation, without its factor of the batch, which its task loss has too"
BY_SOFTMAX = "by a softmax in place of the sigmoids, which needs two classes or more"

SCALE_FREE = "measured here, docs/decisions/0010_features_are_standardised.md; the papers compare raw ones"
STANDARDIZED = {
    family: Recipe(SCALE_FREE + measured, {"features": "standardized"})
    for family, measured in (
        ("retinanet", "; with FCOS, not with RetinaNet (assumption)"),
        ("fcos", ""),
        ("reppoints", "; with FCOS, not with RepPoints (assumption)"),
        ("rcnn", "; with FCOS, not with R-CNNs (assumption)"),
    )
}

RECIPES: dict[str, dict[str, Recipe]] = {
    "ACAMKD": STANDARDIZED,
    "AT": {
        "semseg": Recipe(
            "CIRKD's weight; it takes the features just before the classifier instead (assumption)",
            {"alpha": 10000.0}, LAST, (BACKBONE,),
        ),
        "classifier": Recipe("the authors' for ImageNet", {"alpha": 1000.0}),
        "small_classifier": Recipe("the authors' for CIFAR", {"alpha": 1000.0}),
    },
    "CWD": {
        "retinanet": Recipe("MMRazor's for GFL, a one-stage detector", CWD_GFL),
        "fcos": Recipe("MMRazor's for GFL; not published for FCOS (assumption)", CWD_GFL),
        "rcnn": Recipe("MMRazor's for GFL; not published for two-stage detectors (assumption)", CWD_GFL),
        "semseg": Recipe("the authors' run (TorchDistiller)", {"alpha": 3.0, "temperature": 4.0}, taps=(LOGITS,)),
    },
    "DKD": {
        "retinanet": Recipe(f"{BY_SOFTMAX}; the weights of Faster R-CNN (assumption)", DKD_RCNN),
        "fcos": Recipe(f"{BY_SOFTMAX}; the weights of Faster R-CNN (assumption)", DKD_RCNN),
        "rcnn": Recipe("the authors' configs (mdistiller) for Faster R-CNN, which have no warm-up either", DKD_RCNN),
        "semseg": Recipe("the weights of Faster R-CNN (assumption)", DKD_RCNN, taps=(LOGITS,)),
        "classifier": Recipe(
            "the authors' (mdistiller) for ImageNet, ResNet-34 to 18; their warm-up of an epoch is left out",
            {"alpha": 1.0, "beta": 0.5, "temperature": 1.0}, taps=(CLASSES,),
        ),
        "small_classifier": Recipe(
            "the authors' (mdistiller) for CIFAR-100, resnet56 to 20; their warm-up of 20 epochs is left out",
            {"alpha": 1.0, "beta": 2.0, "temperature": 4.0}, taps=(CLASSES,),
        ),
    },
    "DMKD": {
        "retinanet": Recipe(
            RECONSTRUCTION,
            {"alpha": 2e-5, "rho_s": 0.65, "rho_c": 0.15},
        ),
        "fcos": Recipe(
            RECONSTRUCTION,
            {"alpha": 2e-5, "rho_s": 0.65, "rho_c": 0.15},
        ),
        "rcnn": Recipe(
            RECONSTRUCTION,
            {"alpha": 5e-7, "rho_s": 0.45, "rho_c": 0.15}, FIRST_FOUR,
        ),
    },
    "FGD": {
        "retinanet": Recipe(
            "the authors' config",
            {"alpha": 1e-3, "beta": 5e-4, "gamma": 5e-4, "lambda_rel": 5e-6, "temperature": 0.5},
        ),
        "fcos": Recipe(
            "the authors' config",
            {"alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_rel": 8e-6, "temperature": 0.8},
        ),
        "reppoints": Recipe(
            "the authors' config, on the neck before its normalisation; they inherit neck and head, and clip at 35",
            {"alpha": 1.6e-3, "beta": 8e-4, "gamma": 8e-4, "lambda_rel": 8e-6, "temperature": 0.5},
            taps=(NECK_CONVS,),
        ),
        "rcnn": Recipe(
            "the authors' configs for Faster and Mask R-CNN",
            {"alpha": 5e-5, "beta": 2.5e-5, "gamma": 5e-5, "lambda_rel": 5e-7, "temperature": 0.5}, FIRST_FOUR,
        ),
    },
    "FreeKD": {
        "retinanet": Recipe("the authors' config, without its loss on the regression head; they clip at 35", FREEKD),
        "fcos": Recipe("RetinaNet's; no config is published (assumption)", FREEKD),
        "rcnn": Recipe(
            "the authors' config of a Faster R-CNN from a Cascade Mask R-CNN; they clip at 35",
            {**FREEKD, "lambda_mse": 2.0},
        ),
    },
    "KD": {
        "retinanet": Recipe("formula and numbers for sigmoids are not published (assumption)", KD_CIRKD),
        "fcos": Recipe("formula and numbers for sigmoids are not published (assumption)", KD_CIRKD),
        "rcnn": Recipe("CIRKD's for segmentation; not published for detectors (assumption)", KD_CIRKD),
        "semseg": Recipe("CIRKD's released code", KD_CIRKD, taps=(LOGITS,)),
        "classifier": Recipe(
            "mdistiller's for ImageNet, 0.5 beside a cross-entropy of 0.5: their ratio",
            {"alpha": 1.0, "temperature": 1.0}, taps=(CLASSES,),
        ),
        "small_classifier": Recipe(
            "mdistiller's and RepDistiller's for CIFAR-100, 0.9 beside a cross-entropy of 0.1: their ratio",
            {"alpha": 9.0, "temperature": 4.0}, taps=(CLASSES,),
        ),
    },
    "MasKD": {
        "retinanet": Recipe(
            "the authors', R101 to R50, without their loss on the regression head; from X101 they warm up for 8500",
            {"alpha": 7.0, "custom_mask_warmup": 7000},
        ),
        "fcos": Recipe("the authors', R101 to R50", {"alpha": 10.0, "custom_mask_warmup": 5000}),
        "reppoints": Recipe(
            "the authors', X101 to R50, without their losses on the points; they inherit nothing",
            {"alpha": 10.0, "custom_mask_warmup": 5000},
        ),
        "rcnn": Recipe(
            "the authors' for Faster R-CNN, R101 to R50; from a Cascade Mask R-CNN they warm up for 5000",
            {"alpha": 1.0, "custom_mask_warmup": 7330},
        ),
        "semseg": Recipe(
            "the authors' for Cityscapes, without their loss on the auxiliary logits",
            {"alpha": 1.0}, taps=(LOGITS,),
        ),
    },
    "MCMI": {
        "classifier": Recipe(
            "the authors' for CIFAR-100; theirs for ImageNet is not known", {"lambda_cmi": 0.15}, taps=(CLASSES,)
        ),
        "small_classifier": Recipe("the authors' for CIFAR-100", {"lambda_cmi": 0.15}, taps=(CLASSES,)),
    },
    "MGD": {
        "retinanet": Recipe("the authors' config", MGD_ONE_STAGE),
        "fcos": Recipe("the authors' for RetinaNet and RepPoints; not published for FCOS (assumption)", MGD_ONE_STAGE),
        "reppoints": Recipe("the authors' config", MGD_ONE_STAGE),
        "rcnn": Recipe("the authors' configs for Faster and Mask R-CNN", MGD_TWO_STAGE, FIRST_FOUR),
        "semseg": Recipe(
            "the authors' for PSPNet-R18 and DeepLabV3-R18, crops of 512x512; another crop needs another weight",
            {"alpha": 2e-5, "lambda_mask": 0.75}, LAST, (BACKBONE,),
        ),
        "classifier": Recipe("the authors' for ImageNet", MGD_IMAGENET, LAST, (BACKBONE,)),
        "small_classifier": Recipe(
            "the authors' for ImageNet; not published for small images (assumption)", MGD_IMAGENET, LAST, (BACKBONE,)
        ),
    },
    "Mimic": STANDARDIZED,
    "NKD": {
        "retinanet": Recipe(f"{BY_SOFTMAX}; the authors' numbers for ImageNet (assumption)", NKD_IMAGENET),
        "fcos": Recipe(f"{BY_SOFTMAX}; the authors' numbers for ImageNet (assumption)", NKD_IMAGENET),
        "rcnn": Recipe("the authors' numbers for ImageNet (assumption)", NKD_IMAGENET),
        "semseg": Recipe("the authors' numbers for ImageNet (assumption)", NKD_IMAGENET, taps=(LOGITS,)),
        "classifier": Recipe("the authors' for ImageNet", NKD_IMAGENET, taps=(CLASSES,)),
        "small_classifier": Recipe("the authors' numbers for ImageNet (assumption)", NKD_IMAGENET, taps=(CLASSES,)),
    },
    "PSKD": {
        "classifier": Recipe("the authors' for CIFAR-100, 300 epochs (assumption)", {"alpha": 0.8}, taps=(CLASSES,)),
        "small_classifier": Recipe("the authors' for CIFAR-100, 300 epochs", {"alpha": 0.8}, taps=(CLASSES,)),
    },
    "PKD": {
        "retinanet": Recipe("the authors' MMRazor config for a ResNeXt-101 teacher", {"alpha": 10.0}, FIRST_FOUR),
        "fcos": Recipe(
            "the authors' for a RetinaNet from FCOS and for FCOS3D; not published for FCOS (assumption)",
            {"alpha": 10.0}, FIRST_FOUR,
        ),
        "reppoints": Recipe("the authors' MMRazor config", {"alpha": 10.0}, FIRST_FOUR),
        "rcnn": Recipe("the authors' MMRazor config for a ResNet-101 teacher", {"alpha": 6.0}, FIRST_FOUR),
    },
    "SAMKD": {
        "retinanet": Recipe(MASKED_AND_LOGITS, SAMKD, taps=(BACKBONE, CLASSES)),
        "fcos": Recipe(MASKED_AND_LOGITS, SAMKD, taps=(BACKBONE, CLASSES)),
        "reppoints": Recipe(MASKED_AND_LOGITS, SAMKD, taps=(BACKBONE, CLASSES)),
    },
    "ScoreWeighted": {
        "retinanet": Recipe(f"{GAIN}; not published for RetinaNet (assumption)", SCORE_WEIGHTED),
        "fcos": Recipe(f"{GAIN}; not published for FCOS (assumption)", SCORE_WEIGHTED),
        "rcnn": Recipe(f"{GAIN}; by objectness, not published for R-CNNs (assumption)", SCORE_WEIGHTED),
    },
    "USKD": {
        "classifier": Recipe(
            "the authors' numbers for ImageNet, on the second-last stage",
            {"alpha": 1.0, "beta": 0.1, "mu": 0.005}, SECOND_LAST, (BACKBONE, CLASSES),
        ),
        "small_classifier": Recipe(
            "the authors' numbers for CIFAR-100 with a ResNet-18, on the second-last stage",
            {"alpha": 0.1, "beta": 0.1, "mu": 0.1}, SECOND_LAST, (BACKBONE, CLASSES),
        ),
    },
}  # fmt: skip
"""Method -> family -> its recipe. Without one, the constructor's defaults count, on all levels."""
