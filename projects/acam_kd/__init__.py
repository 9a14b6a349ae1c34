"""Knowledge distillation for dense prediction: ACAM-KD and its controls."""

__version__ = "0.1.0"
