"""One of two processes that share a batch, for ``test_pskd.py``."""

from __future__ import annotations

import sys

import torch
from torch import distributed

from acam_kd.core import FeatureSpec, Targets
from acam_kd.methods import PSKD


def main(rank: int, address: str, output: str) -> None:
    """Make two steps on this process's half of four images, and write the table."""
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    spec = {"classes": FeatureSpec(3, 0, logits=True)}
    method = PSKD(spec, spec, epochs=2)
    logits = torch.arange(12.0).sin().reshape(4, 3)[rank::2]
    known = Targets(labels={"classes": torch.zeros(2, 1, 1, dtype=torch.int64)}, ids=torch.arange(4)[rank::2])
    maps = {"classes": logits[:, :, None, None].requires_grad_()}
    losses = [method(maps, maps, known)["loss_pskd_past"].item() for _ in range(2)]
    torch.save({"losses": losses, **method.past.state()}, f"{output}{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
