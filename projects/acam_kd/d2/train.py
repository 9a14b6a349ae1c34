"""Training and evaluation with Detectron2's DefaultTrainer, as ``train_net.py`` runs them."""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.multiprocessing.spawn import ProcessExitedException

from ..core.errors import ConfigError, RunError, one_line_errors
from ..core.interrupts import PassedOn, Signals, one_line_interruption
from ..core.lost import lost_processes
from ..lock import Lock
from .best import main_metric, with_best
from .checkpoint import check_after_backward, checkpoint_distiller, guard_gradients
from .config import add_distillation_config, check_student, exported_student_config, merge, student_config
from .datasets import add_dataset_options, check_datasets, register_datasets
from .doctor import doctor
from .evaluation import build_evaluator
from .interrupts import saving_what_is_done, with_quiet_workers
from .names import key
from .progress import progress_line
from .runs import write_classes
from .sem_seg_data import build_sem_seg_mapper
from .solver import build_lr_scheduler, build_optimizer
from .teacher_check import check_teacher
from .token_learning import with_tokens
from .trunk import load_classifier
from .unlabelled import build_unlabelled_loader, check_unlabelled, feed_unlabelled
from .weights_file import read_safely
from .whole_files import write_safely

__all__ = ["Trainer", "evaluate", "main", "parser", "run", "setup"]

PROGRAM = "train_net.py"
AGAIN = "the same command with --resume"


class Trainer(DefaultTrainer):
    """DefaultTrainer that keeps the method in its checkpoints, and bad gradients out of them."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        read_safely(self.checkpointer)
        write_safely(self.checkpointer)
        checkpoint_distiller(self)
        check_after_backward(self._trainer)
        if cfg.DATASETS.UNLABELLED:
            node = cfg.DISTILL.UNLABELLED
            options = {"weight": node.WEIGHT, "start": node.START, "keep_norms": node.KEEP_NORMS}
            feed_unlabelled(self._trainer.model, with_quiet_workers(build_unlabelled_loader(cfg)), **options)
        if cfg.TEST.AUG.ENABLED:
            self.register_hooks([hooks.EvalHook(0, lambda: self.test_with_tta(cfg, self.model))])

    def build_hooks(self) -> Any:
        """Build Detectron2's, with the average of the weights, the best checkpoint, and the line on a terminal."""
        return [*with_best(self, super().build_hooks()), *progress_line(self, main_metric(self.cfg))]

    def resume_or_load(self, resume: bool = True) -> Any:
        """Resume from the last checkpoint, or load MODEL.WEIGHTS: a checkpoint, or the file of a classifier.

        Raises:
            ConfigError: the file of a classifier does not fit the trunk.
            RunError: the last checkpoint is gone, or belongs to a run of other parameters.
        """
        last = self.checkpointer.get_checkpoint_file() if resume and self.checkpointer.has_checkpoint() else ""
        if last and not os.path.isfile(last):
            raise RunError("the checkpoint that last_checkpoint names is gone", last, "name another one in that file")
        if not last and load_classifier(self.checkpointer.model, self.cfg):
            return None
        return super().resume_or_load(resume=resume)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer of the config, with clipping over the whole model."""
        optimizer = build_optimizer(cfg, model)
        guard_gradients(optimizer, model, cfg.DISTILL.MAX_GRADIENT_NORM)
        return optimizer

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer) -> Any:
        """Build Detectron2's, or the polynomial one of semantic segmentation."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Build Detectron2's, with the augmentations of semantic segmentation for students of that kind."""
        dense = student_config(cfg).MODEL.META_ARCHITECTURE == "SemanticSegmentor"
        return with_quiet_workers(
            build_detection_train_loader(cfg, mapper=build_sem_seg_mapper(cfg) if dense else None)
        )

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build Detectron2's."""
        return with_quiet_workers(super().build_test_loader(cfg, dataset_name))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """Build the evaluators for a dataset, by its metadata."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return build_evaluator(dataset_name, folder, kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS)

    @classmethod
    def test_with_tta(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation, which Detectron2 has for R-CNNs."""
        model = getattr(model, "module", model)
        folder = os.path.join(cfg.OUTPUT_DIR, "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(student_config(cfg), model), evaluators)
        return {f"{name}_TTA": value for name, value in results.items()}


def setup(args: argparse.Namespace) -> CfgNode:
    """Build and check the config, register its datasets, write it and the student's own to the output folder.

    Raises:
        ConfigError: a key, a value or a dataset is wrong.
    """
    cfg = _read(args)
    _prepare(cfg, args)
    return cfg


def _read(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    add_distillation_config(cfg)
    merge(cfg, args.config_file, args.opts)
    cfg.DATASETS.COCO_FORMAT = [*cfg.DATASETS.COCO_FORMAT, *args.dataset]
    cfg.DATASETS.SEM_SEG = [*cfg.DATASETS.SEM_SEG, *args.sem_seg_dataset]
    cfg.freeze()
    return cfg


def _prepare(cfg: CfgNode, args: argparse.Namespace) -> None:
    student = student_config(cfg)
    register_datasets(cfg, training=not args.eval_only)
    check_datasets(student, training=not args.eval_only)
    check_student(student, resume=args.resume)
    if not args.eval_only:
        check_unlabelled(cfg)
    if args.doctor:  # which leaves OUTPUT_DIR and the terminal to the run
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED)
        return
    try:
        default_setup(cfg, args)
        if comm.is_main_process():
            with open(os.path.join(cfg.OUTPUT_DIR, "student_config.yaml"), "w") as file:
                file.write(exported_student_config(cfg).dump())
            write_classes(cfg)
    except OSError as error:
        value = f"{cfg.OUTPUT_DIR}, which cannot be written ({error.strerror or error})"
        raise ConfigError("output", value, "a folder to write into") from error


def evaluate(cfg: CfgNode, resume: bool) -> dict[str, Any]:
    """Evaluate the student's weights; no teacher is needed."""
    model = Trainer.build_model(student_config(cfg))
    read_safely(DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR)).resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_tta(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return dict(results)


def main(args: argparse.Namespace) -> Any:
    """Train or evaluate; every process runs this.

    While a run trains, its first process holds the lock of OUTPUT_DIR; an evaluation and the doctor need none. Ctrl-C
    and SIGTERM end a training after a whole step, which is saved.
    """
    first, training = comm.is_main_process(), not (args.eval_only or args.doctor)
    with (
        one_line_interruption(PROGRAM, AGAIN if training else "", said=first),
        one_line_errors(PROGRAM, key),
        Signals() as signals,
        contextlib.ExitStack() as held,
    ):
        cfg = _read(args)
        if first and training:
            held.enter_context(Lock(cfg.OUTPUT_DIR))
        _prepare(cfg, args)
        if args.eval_only:
            return evaluate(cfg, args.resume)
        if args.doctor:
            looked = doctor(_share(cfg, args.num_gpus * args.num_machines), Trainer)
            print(looked.table())
            raise SystemExit(looked.status)
        trainer = Trainer(with_tokens(cfg))
        trainer.resume_or_load(resume=args.resume)
        if trainer.start_iter == 0:
            check_teacher(cfg)
        with lost_processes(), saving_what_is_done(trainer, signals):
            return trainer.train()


def _share(cfg: CfgNode, gpus: int) -> CfgNode:
    """Return the config of a run with the images of one of its GPUs in a batch."""
    shared: CfgNode = cfg.clone()
    shared.defrost()
    shared.SOLVER.IMS_PER_BATCH = max(1, cfg.SOLVER.IMS_PER_BATCH // max(1, gpus))
    shared.freeze()
    return shared


def parser() -> argparse.ArgumentParser:
    """Return Detectron2's options and those that register datasets."""
    built: argparse.ArgumentParser = default_argument_parser()
    built.add_argument("--doctor", action="store_true", help="look at the set-up, and do not train")
    add_dataset_options(built)
    return built


def run(arguments: list[str] | None = None) -> None:
    """Run the command, in as many processes as it asks for."""
    args = parser().parse_args(arguments)
    if args.doctor:  # one process looks
        main(args)
    several = args.num_gpus * args.num_machines > 1  # else Detectron2 starts no process, and main has the signals
    with PassedOn() if several else contextlib.nullcontext() as passed:
        try:
            launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args=(args,))
        except ProcessExitedException as error:
            if error.signal_name:
                ended = f"process {error.error_index} of the run was ended by {error.signal_name}"
                raise SystemExit(f"{PROGRAM}: {ended}; then --resume resumes the run") from None
            received = passed.received if passed is not None else 0
            raise SystemExit(128 + received if received else error.exit_code) from None  # the process has said why


if __name__ == "__main__":
    run()
