"""``train_net.py --num-gpus 2`` on a CPU, where Detectron2 itself would ask for the index of a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch
from detectron2.engine import defaults
from torch.nn.parallel import DistributedDataParallel

from acam_kd.d2 import train

WHOLE = train.main


def main(args: Any) -> Any:
    """Train; each process runs this."""
    torch.set_num_threads(1)
    defaults.create_ddp_model = lambda model, **options: DistributedDataParallel(model, **options)
    return WHOLE(args)


if __name__ == "__main__":
    train.main = main
    # Detectron2's own port is one a user, and tests run beside each other.
    train.run(["--num-gpus", "2", "--dist-url", "auto", *sys.argv[1:]])
