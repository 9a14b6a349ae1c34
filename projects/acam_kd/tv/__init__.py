"""Distillation of torchvision models; the only folder that imports them."""
