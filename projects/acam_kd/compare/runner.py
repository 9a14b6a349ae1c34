"""A comparison's missing runs, each in a process of its own, and its records, tables and plot."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, RunError
from ..files import to_json, write_atomically
from ..report.comparison import TEACHER, Panel, check_equal, plot, section
from .confusions import confusion_picture
from .plan import Run, Setting, runs_of, slug
from .processes import Processes
from .records import about, best, key_of, read_records, read_run, threads_of

__all__ = ["Comparison"]


class Comparison:
    """The runs of a plan, and their records.

    Args:
        settings: the settings of the plan.
        output: the folder of all runs.
        jobs: the number of runs at once.

    Raises:
        ConfigError: the folder has runs of another plan, or runs that cannot be compared.
        RunError: a line of its records is broken.
    """

    def __init__(self, settings: Sequence[Setting], output: Path, jobs: int) -> None:
        self.settings, self.output, self.jobs = settings, output, jobs
        self.path = output / "results.jsonl"
        self.records = read_records(self.path)
        if self.path.is_file():  # rewritten without half a line at its end
            write_atomically(self.path, "".join(to_json(record) + "\n" for record in self.records))
        self.failed: dict[Run, str] = {}
        self.processes = Processes(jobs)
        self.lock = threading.Lock()
        self._check_records()

    def _check_records(self) -> None:
        for setting in self.settings:
            teacher, tuning, students = runs_of(setting, self.output)
            self._missing([*teacher, *tuning, *self._chosen(students)])
            check_equal(self.panel(setting))

    def run(self) -> int:
        """Make the missing runs, one setting after the other, and return the exit status."""
        self.report(confusions=False)
        for setting in self.settings:
            self._run_setting(setting)
        problems = self.report()
        print((self.output / "table.md").read_text())
        problems += [f"{run} failed: {reason}" for run, reason in self.failed.items()]
        for problem in problems:
            print(f"acam-kd: {problem}", file=sys.stderr)
        return 1 if problems else 0

    def _run_setting(self, setting: Setting) -> None:
        """Make a setting's runs: its teacher's, those of tuning, and the students', each in the order of the plan."""
        teacher, tuning, students = runs_of(setting, self.output)
        self._run_all(teacher)
        if any(run in self.failed for run in teacher):
            self._leave_out([*tuning, *students], "its teacher failed")
            return
        self._run_all(tuning)
        chosen = self._chosen(students)
        self._run_all(chosen)
        rows = {run.row for run in chosen}
        self._leave_out([run for run in students if run.row not in rows], "its tuning failed")

    def _leave_out(self, runs: Sequence[Run], reason: str) -> None:
        self.failed |= {run: reason for run in runs if not self._record(run)}

    def _record(self, run: Run) -> dict[str, Any] | None:
        return next((record for record in self.records if key_of(record) == run.key), None)

    def _missing(self, runs: Sequence[Run]) -> list[Run]:
        """Return the runs without a record, and check that the others have the arguments of the plan."""
        for run in runs:
            record = self._record(run)
            if record:
                _check_arguments(run, record["arguments"])
        return [run for run in runs if not self._record(run)]

    def _tried(self, setting: Setting, row: str) -> list[dict[str, Any]]:
        """Return the records of a row's tuning runs, in the order of the candidates, once all are there."""
        tuning = [run for run in runs_of(setting, self.output)[1] if run.row == row]
        records = [self._record(run) for run in tuning]
        return [record for record in records if record] if all(records) else []

    def _chosen(self, students: Sequence[Run]) -> list[Run]:
        """Return the students' runs, tuned rows with the best candidate; without rows whose tuning is not complete."""
        chosen = []
        for run in students:
            if not run.setting.candidates(run.row):
                chosen.append(run)
            elif tried := self._tried(run.setting, run.row):
                chosen.append(replace(run, candidate=best(tried, run.setting.metrics[0])))
        return chosen

    def _run_all(self, runs: Sequence[Run]) -> None:
        todo = self._missing(runs)
        with ThreadPoolExecutor(self.jobs) as pool:
            futures: dict[Future[None], Run] = {}
            for run in todo:
                needed = {other.key for other in run.needed}
                before = [future for future, other in futures.items() if other.key in needed]
                futures[pool.submit(self._make, run, before)] = run
            try:
                for number, future in enumerate(as_completed(futures), 1):
                    self._finished(futures[future], future.exception(), f"{number} of {len(todo)}")
            except BaseException:
                self.processes.stop()
                pool.shutdown(cancel_futures=True)
                raise

    def _finished(self, run: Run, error: BaseException | None, place: str) -> None:
        if error is None:
            metric, record = run.setting.metrics[0], self._record(run) or {}
            print(f"[{place}] {run}: {metric} {record['metrics'][metric]:.2f}", flush=True)
        else:
            self.failed[run] = f"{error} (see {run.folder / 'stdout.txt'})"
            print(f"[{place}] {run} failed: {self.failed[run]}", flush=True)
        self.report(confusions=False)

    # One run, in a thread of its own.

    def _make(self, run: Run, before: Sequence[Future[None]] = ()) -> None:
        """Make a run, unless its folder is complete, and append its record.

        Args:
            run: the run.
            before: runs of other rows that it needs. They were handed in earlier, so they are at work or done.
        """
        if any(future.exception() for future in before):
            raise RunError(f"a run that it needs failed: {', '.join(str(other) for other in run.needed)}")
        run.folder.mkdir(parents=True, exist_ok=True)
        path = run.folder / "compare.json"
        with self.processes.locked(run.folder / "lock") as lock:
            known = json.loads(path.read_text()) if path.is_file() else {}
            if known:
                _check_arguments(run, known["arguments"])
            if not known.get("complete"):
                trained = bool(known) and run.trained  # it ended after the comparison was killed
                if not trained:
                    known = {"arguments": run.arguments, **about(threads_of(self.processes.environment))}
                    write_atomically(path, to_json(known))
                peak = self.processes.call(run.command(), run.folder / "stdout.txt", lock)
                known |= {"peak_rss_gib": None if trained else peak, "complete": True}
                write_atomically(path, to_json(known))
            self._append({**read_run(run, known), **self._choice(run)})

    def _choice(self, run: Run) -> dict[str, Any]:
        """Return the entry of a result of a tuned row: the chosen candidate, and the metric of every one."""
        if run.tuning or run.candidate is None:
            return {}
        metric = run.setting.metrics[0]
        values = [record["metrics"][metric] for record in self._tried(run.setting, run.row)]
        return {"tuned": {"candidate": run.candidate, "arguments": list(run.tried), metric: values}}

    def _append(self, record: dict[str, Any]) -> None:
        with self.lock:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, (to_json(record) + "\n").encode())
                os.fsync(handle)
            finally:
                os.close(handle)
            self.records.append(record)

    # The records so far.

    def panel(self, setting: Setting) -> Panel:
        """Collect a setting's records for the table."""
        failed: dict[str, list[int]] = {}
        for run in self.failed:
            if run.setting is setting and not run.tuning:
                failed.setdefault(run.row, []).append(run.seed)
        students = self._chosen(runs_of(setting, self.output)[2])
        own = [r for r in self.records if r["setting"] == setting.name and r["row"] in (TEACHER, *setting.rows)]
        return Panel(
            name=setting.name,
            records=[record for record in own if "tuning" not in record],
            rows=list(setting.rows),
            metrics=setting.metrics,
            control=setting.control,
            threshold=setting.threshold,
            mimicking=setting.mimicking,
            failed=failed,
            tried=[record for record in own if "tuning" in record],
            chosen={run.row: run.candidate for run in students if run.candidate is not None},
        )

    def report(self, *, confusions: bool = True) -> list[str]:
        """Write ``table.md`` and its pictures, and return the reasons for settings without a table.

        Args:
            confusions: draw those of classifiers; ten rows of twelve classes take half a minute, more than a short run.
        """
        panels = [self.panel(setting) for setting in self.settings]
        parts, problems = [], []
        for setting, panel in zip(self.settings, panels):
            try:
                parts.append(section(panel) + (self._confusions(setting) if confusions else ""))
            except ConfigError as error:
                parts.append(f"## {panel.name}\n\n{error}\n")
                problems.append(str(error))
        write_atomically(self.output / "table.md", "\n".join(parts))
        write_atomically(self.output / "plot.png", plot(panels))
        return problems

    def _confusions(self, setting: Setting) -> str:
        """Write the picture of a setting's confusions, and return the line that shows it; nothing for other tasks."""
        teacher, _, students = runs_of(setting, self.output)
        by_row = sorted(students, key=lambda run: [*setting.rows].index(run.row))
        picture = confusion_picture([*teacher, *by_row])
        if picture is None:
            return ""
        name = f"confusion_{slug(setting.name)}.png"
        write_atomically(self.output / name, picture)
        return f"\n![true and predicted classes of each row, all seeds together]({name})\n"


def _check_arguments(run: Run, before: list[str]) -> None:
    if before != run.arguments:
        raise ConfigError(
            "output",
            f"a run of {run} with {' '.join(before)}",
            allowed=f"{' '.join(run.arguments)}, as in the plan",
            hint="choose another {output}",
        )
