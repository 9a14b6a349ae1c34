"""Two processes whose shared weight follows the gradients of both; run by test_weighting.py."""

from __future__ import annotations

import sys

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import acam_kd


class Net(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.backbone, self.head, self.scale = nn.Conv2d(3, 4, 3, stride=8, padding=1), nn.Conv2d(4, 2, 1), scale

    def forward(self, batch):
        return {"loss_cls": self.scale * self.head(self.backbone(batch)).square().mean()}


distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
student, teacher = Net(10.0**rank), Net(1.0)
levels = {"p3": "backbone"}
acam_kd.distill(student, teacher, method="Mimic", weight="share", student_levels=levels, teacher_levels=levels)
model = DistributedDataParallel(student)
torch.manual_seed(rank)
for _ in range(2):
    sum(model(torch.randn(2, 3, 32, 32)).values()).backward()
scales = [torch.zeros(1) for _ in range(2)]
distributed.all_gather(scales, torch.tensor([student.distillation.weighting.scale]))
assert torch.equal(*scales) and scales[0] != 1e-3, scales
distributed.destroy_process_group()
sys.exit(0)
