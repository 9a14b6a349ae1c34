"""Distillation of torchvision models; the only folder that imports them."""

from .. import methods  # noqa: F401  (registers them)
