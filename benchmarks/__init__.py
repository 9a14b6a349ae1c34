"""Measurements of the cost of distillation: time, memory and FLOPs, recorded together with the machine."""
