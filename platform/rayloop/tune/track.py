"""A sweep's trials -> MLflow runs under the sweep's own, written by the driver alone.

The sweep's records are on disk first. So after a kill all records of a trial are handed over again;
the tracker leaves out the steps it has.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from rayloop.config import Config, to_dict
from rayloop.data.versions import DatasetVersion
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.start import tracked
from rayloop.tune.result import TuneResult
from rayloop.tune.sweep import Sweep
from rayloop.tune.trial import Trial

ENDS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED", "running": "RUNNING"}


class SweepTracking:
    """The parent run of a sweep and one child a trial.

    Args:
        sweep: The sweep.
        tracker: The database.
        storage: The root, for where the data lies.
        dataset: What it trains on.
    """

    def __init__(
        self, sweep: Sweep, tracker: Tracker, storage: Storage, dataset: DatasetVersion
    ) -> None:
        self._sweep, self._tracker, self._storage = sweep, tracker, storage
        self._dataset = tracked(dataset, storage)
        self._parent = ""
        self._runs: dict[int, str] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the parent run; it is told if the block fails."""
        config = self._sweep.config
        self._parent = self._tracker.start_run(
            config.run_id, to_dict(config), {"rayloop.kind": "sweep"}, dataset=self._dataset
        )
        with self._tracker.told_if_it_fails(self._parent):
            for trial in self._sweep.trials:
                self._catch_up(trial)
            try:
                yield
            finally:
                for run_id in self._runs.values():  # those that were cut off
                    self._tracker.finish(run_id, "KILLED")

    def begin(self, trial: Trial, config: Config) -> None:
        """A trial begins, for the first time or again, with these settings."""
        self._runs[trial.number] = self._tracker.start_run(
            trial.run_id,
            to_dict(config),
            {"rayloop.kind": "trial"},
            parent=self._sweep.config.run_id,
            dataset=self._dataset,
        )
        self._log(trial)

    def record(self, trial: Trial) -> None:
        """A trial has reported; what it told before, as after a restart, is there already."""
        if not trial.records:
            return
        newest = trial.records[-1]
        self._tracker.log_metrics(self._runs[trial.number], newest, step=int(newest["step"]))

    def end(self, trial: Trial) -> None:
        """A trial is over."""
        run_id = self._runs[trial.number]
        step = int(trial.records[-1]["step"]) if trial.records else 0
        self._tracker.log_metrics(run_id, {**trial.costs, "epochs": trial.epochs}, step)
        self._tracker.tag(run_id, {"rayloop.status": trial.status, "rayloop.error": trial.error})
        self._tracker.finish(run_id, ENDS[trial.status])
        del self._runs[trial.number]

    def conclude(self, result: TuneResult) -> None:
        """The sweep is over: its figures, its picture, and what the winner's test said."""
        figures = {
            "best_score": result.best_score,
            "test_accuracy": result.test_accuracy,
            "budget_epochs": result.budget_epochs,
            "num_trials": result.num_trials,
            "failed_trials": result.failed,
        }
        # Of a sweep that is made longer the later figures count.
        self._tracker.log_metrics(self._parent, figures, step=result.num_trials)
        self._tracker.log_picture(self._parent, "sweep.png", self._storage.read(result.picture))
        self._tracker.tag(self._parent, {"rayloop.best": result.best_run_id})
        winner = self._tracker.find(result.best_run_id)
        if winner:
            steps = [trial for trial in self._sweep.trials if trial.run_id == result.best_run_id]
            self._tracker.log_metrics(
                winner,
                {"test_accuracy": result.test_accuracy, "floor_accuracy": result.floor_accuracy},
                step=int(steps[0].records[-1]["step"]),
            )
        self._tracker.finish(self._parent)

    def _catch_up(self, trial: Trial) -> None:
        """What a kill came before: a trial over on disk that the database has as running."""
        if not trial.is_over:
            return
        tracked = self._tracker.read(trial.run_id)
        if tracked is None or tracked.status == "RUNNING":
            self.begin(trial, self._sweep.settings_of(trial))
            self.end(trial)

    def _log(self, trial: Trial) -> None:
        for record in trial.records:
            self._tracker.log_metrics(self._runs[trial.number], record, step=int(record["step"]))
