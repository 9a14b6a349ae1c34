"""The inputs on which something failed once."""

from __future__ import annotations

import pytest

from acam_kd.core.errors import ConfigError, RunError

from .edits import damaged
from .inputs import TARGETS

NAMED = "it is no checkpoint of acam-kd (see state_dict)"
ODD = "it is the checkpoint of another student (see "
FOUND = [
    ("tokens", lambda data: damaged(data, [("flip", 0.0, 1, b"")]), "which holds no learnt tokens"),
    ("checkpoint", {"state_dict": None}, NAMED),
    ("checkpoint", {"state_dict": [["a"]]}, NAMED),
    ("checkpoint", {"state_dict": {1: 2}}, NAMED),
    ("checkpoint", {"global_step": "3"}, f"{ODD}global_step and seconds"),
    ("checkpoint", {"seconds": float("nan")}, f"{ODD}global_step and seconds"),
    ("checkpoint", {"rng": None}, f"{ODD}checkpoint.rng"),
    ("checkpoint", {"lr_schedulers": [{"last_epoch": "x"}]}, f"{ODD}checkpoint.lr_schedulers[0].last_epoch"),
    ("checkpoint", {"optimizer_states": [{"state": {99: {}}, "param_groups": []}]}, f"{ODD}optimizer.state.99"),
    ("checkpoint", {"optimizer_states": []}, f"{ODD}optimizer_states"),
]


@pytest.mark.parametrize(("name", "damage", "message"), FOUND)
def test_it_is_one_line_now(name, damage, message, tmp_path):
    target = TARGETS[name](tmp_path)
    read = target.prepare(tmp_path)
    read(tmp_path)
    changed = damage(target.file.read_bytes()) if callable(damage) else target.encode({**target.content, **damage})
    target.file.write_bytes(changed)
    with pytest.raises((ConfigError, RunError)) as error:
        read(tmp_path)
    assert message in str(error.value), error.value
