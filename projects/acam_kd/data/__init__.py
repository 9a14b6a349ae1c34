"""Readers of datasets, and a dataset that is drawn. Neither Detectron2 nor torchvision is needed."""
