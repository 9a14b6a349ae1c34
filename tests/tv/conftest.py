"""A dataset of a few images and models of a few channels."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from acam_kd.core.errors import ConfigError
from acam_kd.data import shapes
from acam_kd.data.coco import find_split
from acam_kd.tv.names import option
from acam_kd.tv.run import Settings

STUDENT = "fcos_mobilenet_v3_small_fpn64"


def snapshot(model):
    """Everything in the ``__dict__`` of every module by identity, with its hooks."""
    return {
        name: {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else (id(value), value is True)
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


@contextmanager
def refuses(argument, value="", allowed="", hint=""):
    """Expect a ConfigError with these parts, in one line of the command's words."""
    with pytest.raises(ConfigError) as error:
        yield error
    found = error.value
    assert found.argument == argument, found
    for part, text in ((value, found.value), (allowed, found.allowed), (hint, found.hint)):
        assert part in str(text), found
    line = found.render(option)
    assert "\n" not in line and "DISTILL" not in line and "{taps}" not in line and "{method}" not in line, line


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "SPLITS", {"train": 6, "val": 3})
        return shapes.make_shapes(tmp_path_factory.mktemp("data"), size=64)


def tiny(data):
    """Four steps on a CPU."""
    return Settings(
        find_split(data, "train"),
        find_split(data, "val"),
        STUDENT,
        size=64,
        iterations=4,
        batch_size=2,
        learning_rate=0.01,
        eval_period=2,
        checkpoint_period=1,
        workers=0,
        accelerator="cpu",
        inherit="never",
    )


@pytest.fixture
def settings(data):
    return tiny(data)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder of a complete run without a teacher: a teacher for the others."""
    from acam_kd.tv.training import train

    folder = tmp_path_factory.mktemp("runs") / "teacher"
    train(tiny(data), folder)
    return folder
