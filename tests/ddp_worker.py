"""One of two processes that train an attached student with DistributedDataParallel; run by attached/test_ddp.py."""

from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import acam_kd

LEVELS = {"c3": "body.1", "c4": "body.3"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU()
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss_cls": self.head(self.body(x).mean((2, 3))).square().mean()}


def main(rank: int, kind: str, port: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    student, teacher = Net(), Net()
    period = 2 if kind == "period" else 1
    example = torch.zeros(1, 3, 16, 16)
    acam_kd.distill(
        student, teacher, method="MGD", period=period, student_levels=LEVELS, teacher_levels=LEVELS,
        example_inputs=example,
    )  # fmt: skip
    model = DistributedDataParallel(student.train(), static_graph=kind == "static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    for step in range(4):
        losses = model(torch.randn(2, 3, 16, 16))
        assert len(losses) == (2 if step % period == 0 else 1), losses
        if kind == "unlabelled":
            losses |= student.distillation.unlabelled(torch.randn(3, 3, 24, 24), update_statistics=bool(step % 2))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    mine = torch.cat([p.detach().flatten() for p in student.parameters()])
    other = [torch.empty_like(mine) for _ in range(2)]
    torch.distributed.all_gather(other, mine)
    assert torch.equal(other[0], other[1]) and mine.isfinite().all()
    torch.distributed.destroy_process_group()
    print("in step")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
