"""A Detectron2 run on its way to use: the best checkpoint, the average, prediction, export, the doctor."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import pytest
import torch

from acam_kd.cli import main
from acam_kd.cli.runs import detectron2
from acam_kd.d2.best import _Best
from acam_kd.d2.runs import load_run
from acam_kd.d2.train import run as launch_command
from acam_kd.export.exported import load_exported

from .running import run as command

pytestmark = pytest.mark.filterwarnings("ignore")  # the tracers are deprecated, and warn of constants


@pytest.fixture
def run(arguments, tmp_path):  # noqa: F811
    """Makes a run of four iterations, which is evaluated after the second one and the last one."""

    def make(*opts):
        folder = tmp_path / "run"
        command(
            arguments(
                "OUTPUT_DIR", folder, "TEST.EVAL_PERIOD", 2, "DISTILL.METHOD", "", "DISTILL.INHERIT", "never", *opts
            )
        )
        return folder

    return make


def test_best_and_average(run):
    folder = run("DISTILL.EMA", 0.9, "MODEL.RETINANET.PRIOR_PROB", 0.3)
    best = json.loads((folder / "best.json").read_text())
    assert best["metric"] == "bbox/AP" and best["iteration"] in (1, 3)
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"
    final, averaged = (
        torch.load(folder / f"{name}.pth", weights_only=False) for name in ("model_final", "model_average")
    )
    name = "head.cls_score.weight"
    assert torch.equal(averaged["model"][name], final["average"]["tensors"][name])
    assert not torch.equal(averaged["model"][name], final["model"][name])
    assert final["average"]["updates"] == 4
    model, _, weights = load_run(str(folder), checkpoint="last", size=None)
    assert weights == "model_average.pth" and torch.equal(model.state_dict()[name].cpu(), averaged["model"][name])


def test_a_longer_run_knows_the_best_of_the_one_it_resumes(tmp_path):
    def hook(start_iter, max_iter):
        made = _Best(2, SimpleNamespace(folder=tmp_path), "bbox/AP")
        made.trainer = SimpleNamespace(start_iter=start_iter, max_iter=max_iter)
        made.before_train()
        return made

    assert hook(0, 4)._update_best(7.0, 4)  # the evaluation at the end of a run of four iterations
    assert json.loads((tmp_path / "best.json").read_text()) == {"metric": "bbox/AP", "value": 7.0, "iteration": 3}
    assert hook(4, 8).best_metric == 7.0
    assert hook(2, 8).best_metric is None  # the third and the fourth iteration are made again


def test_warnings_about_detectron2s_code_are_not_shown():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        detectron2("runs")
        warnings.warn("torch.meshgrid: in an upcoming release", UserWarning, stacklevel=1)
        warnings.warn("`torch.jit.script` is deprecated", FutureWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert [str(each.message) for each in seen] == ["another"]


def test_no_best_and_no_average(run):
    folder = run("DISTILL.BEST", "")
    assert not {"best.json", "model_best.pth", "model_average.pth"} & {path.name for path in folder.iterdir()}


def test_predict_and_export(run, data, tmp_path, capsys):  # noqa: F811
    folder = run()
    weights = torch.load(folder / "model_final.pth", weights_only=False)
    generator = torch.Generator().manual_seed(1)
    score = weights["model"]["head.cls_score.weight"]
    weights["model"]["head.cls_score.weight"] = torch.randn(score.shape, generator=generator)  # else nothing is found
    weights["model"]["head.cls_score.bias"].zero_()
    torch.save(weights, folder / "model_final.pth")
    pictures = data / "val"
    main(["predict", str(folder), str(pictures), "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert results and {r["category_id"] for r in results} <= {*range(1, 7)}
    main(
        [
            "export",
            str(folder),
            "--format",
            "torchscript",
            "--output",
            str(tmp_path / "x.pt"),
            "--images",
            str(pictures),
        ]
    )
    assert capsys.readouterr().out.count("detections agree at") == 8
    exported = load_exported(tmp_path / "x.pt")
    assert exported.metadata.resize == (64, 1333) and exported.metadata.categories[1] == "plain disc"
    main(["predict", str(tmp_path / "x.pt"), str(pictures), "--output", str(tmp_path / "same")])
    same = json.loads((tmp_path / "same" / "predictions.json").read_text())
    assert [r["score"] for r in same[:20]] == pytest.approx([r["score"] for r in results[:20]], abs=1e-3)
    with pytest.raises(SystemExit, match="the run: found no finished run in .*, expected a folder with model_best.pth"):
        (folder / "model_best.pth").unlink(missing_ok=True)
        main(["predict", str(folder), str(pictures), "--output", str(tmp_path / "b"), "--checkpoint", "best"])


def test_the_doctor_of_several_gpus_looks_once_at_the_step_of_one(arguments, tmp_path, capsys, monkeypatch):  # noqa: F811
    seen = []
    monkeypatch.setattr("acam_kd.d2.doctor.look_at_step", lambda part, student, batch, **_: seen.append(batch))
    with pytest.raises(SystemExit):
        launch_command(arguments("OUTPUT_DIR", tmp_path / "run", flags=["--doctor", "--num-gpus", "2"]))
    assert [len(batch) for batch in seen] == [1] and capsys.readouterr().out.count("versions  ") == 1


def test_the_doctor(arguments, tmp_path, capsys):  # noqa: F811
    with pytest.raises(SystemExit) as error:
        command(arguments("OUTPUT_DIR", tmp_path / "run", flags=["--doctor"]))
    assert error.value.code == 0
    out = capsys.readouterr().out
    assert "own_train: 6 images" in out and "the method's gradient reaches" in out
    assert out.startswith("versions  ") and not (tmp_path / "run").exists()  # no log, and no file of a run
