"""What distillation costs: time, memory and FLOPs, measured, and written down with what they were measured on."""
