"""One process of a run with HARD: trains by the command, then writes its own augmentor and student to a file.

python -m torch.distributed.run --nproc-per-node 2 hard_worker.py FOLDER OPTIONS...
"""

import os
import sys
from pathlib import Path

import torch

from acam_kd.cli import main
from acam_kd.tv.hard import HardAugmentor

made = []


class Kept(HardAugmentor):
    """Remembers itself."""

    def __init__(self, *args):
        super().__init__(*args)
        made.append(self)


if __name__ == "__main__":
    import acam_kd.tv.loop

    acam_kd.tv.loop.HardAugmentor = Kept
    main(["train", *sys.argv[2:]])
    (hard,) = made
    state = {
        "augmentor": hard.augmentor.state_dict(),
        "turns": hard.turns.augmentors,
        "student": dict(hard.student.network.named_parameters()),  # statistics are those of a process's own images
    }
    torch.save(state, Path(sys.argv[1]) / f"rank{os.environ['RANK']}.pt")
