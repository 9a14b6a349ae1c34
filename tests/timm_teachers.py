"""Small random networks of timm, as teachers: plain ViTs with class and register tokens, Swin, a CNN."""

from __future__ import annotations

import timm
import torch


def vit(patch=16, registers=4):
    """A plain ViT for images of all sizes: a class token, then the registers, then the patches."""
    torch.manual_seed(3)
    return timm.create_model(
        "vit_tiny_patch16_224", patch_size=patch, reg_tokens=registers, depth=2, embed_dim=24, num_heads=2,
        dynamic_img_size=True, num_classes=0,
    ).eval()  # fmt: skip


def swin():
    """A Swin, whose stages give (N, H, W, C)."""
    torch.manual_seed(3)
    size = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "num_classes": 0}
    return timm.create_model("swin_tiny_patch4_window7_224", strict_img_size=False, **size).eval()


def cnn(**options):
    torch.manual_seed(3)
    return timm.create_model("mobilenetv3_small_050", num_classes=0, **options).eval()


TEACHERS = {
    "vit": (vit, {"p4": "blocks.1"}, {"p4": 16}),
    "vit, patches of 14": (lambda: vit(14), {"p4": "blocks.1"}, {"p4": 14}),
    "swin": (swin, {"p3": "layers.1", "p4": "layers.2", "p5": "layers.3"}, {"p3": 8, "p4": 16, "p5": 32}),
    "cnn": (cnn, {"p3": "blocks.1", "p4": "blocks.3"}, {"p3": 8, "p4": 16}),
    "cnn, features only": (lambda: cnn(features_only=True), {"p4": "blocks.3"}, {"p4": 16}),
}
"""Name -> a function that builds it, ``teacher_levels``, and the strides there."""


def normalised(model, image):
    """The image, RGB from 0 to 1, as a network of timm wants it."""
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    return (image - mean) / std
