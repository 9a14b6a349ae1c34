"""Datasets that the project can make itself. Neither Detectron2 nor torchvision is needed."""
