"""A configuration with a space -> a sweep run by Ray Tune -> TuneResult, on disk and tracked.

Tune starts the trials, hands actors on from one to the next, and tries again what crashed. What is
tried, stopped and remembered is the sweep's (`rayloop.tune.sweep`); nothing of Tune's own state is
kept, so nothing of it can be lost.
"""

import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import ray
import ray.tune
from ray import cloudpickle
from ray.tune.callback import Callback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import memory_of_nodes, sizes_of_nodes
from rayloop.config import Config
from rayloop.data.versions import DatasetVersion, open_version
from rayloop.errors import ConfigError, WorkError
from rayloop.logs import stage_logger
from rayloop.models.classifier import count_parameters
from rayloop.storage import Storage
from rayloop.tracking import Tracker
from rayloop.train.alone import Segment
from rayloop.train.claim import new_run_id
from rayloop.train.final_test import final_test
from rayloop.train.start import initial_model, refuse_useless
from rayloop.tune.objective import COSTS
from rayloop.tune.picture import draw_sweep
from rayloop.tune.progress import Progress
from rayloop.tune.result import TuneResult, save_tune_result
from rayloop.tune.room import Room, plan_room
from rayloop.tune.search import front
from rayloop.tune.stopping import stopping_rule
from rayloop.tune.suggestion import Wait
from rayloop.tune.sweep import Sweep, read_space
from rayloop.tune.track import SweepTracking
from rayloop.tune.trainable import Measure, TrialWork, run_trial
from rayloop.tune.trial import Trial, lineage

log = stage_logger("tune")


def tune(
    config: Config,
    storage: Storage,
    tracker: Tracker,
    measure: Measure | None = None,
    clock: Clock = SYSTEM_CLOCK,
) -> TuneResult:
    """Run, or go on with, the sweep named in the configuration.

    Args:
        config: All settings; an empty `run_id` gets a new name.
        storage: The root.
        tracker: Where the sweep and its trials are tracked, on the driver only.
        measure: Tells what a network costs, where an objective asks for that.
        clock: For names and times.

    Raises:
        RequestError: The space or an objective makes no sense, the data is missing, the cluster has
            no room, or the run id belongs to another sweep.
        WorkError: No trial came to its end.
    """
    began_s = clock.monotonic()
    space = read_space(config)
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    refuse_useless(config, dataset, initial_model(config, dataset))
    room = plan_room(config, sizes_of_nodes(), sum(memory_of_nodes()))
    config = _fill_in(config, dataset, clock)
    sweep = Sweep(config, storage, dataset, clock)
    _announce(config, room, sweep, space.lines())
    tracking = SweepTracking(sweep, tracker, storage, dataset)
    wanted = {name for name in config.tune.objectives if name in COSTS}
    work = TrialWork(
        root=storage.root,
        kind=room.kind,
        num_threads=room.cpus_per_worker,
        measure=_costs(measure, wanted) if wanted else None,
    )
    with tracking.running(), Progress(sweep) as progress:
        _run(sweep, room, work, _Events(sweep, tracking, progress))
        result = _conclude(sweep, storage, began_s, clock)
        tracking.conclude(result)
    return result


def _fill_in(config: Config, dataset: DatasetVersion, clock: Clock) -> Config:
    """The sweep's name, and the dataset version that all its trials train on."""
    return replace(
        config,
        run_id=config.run_id or f"tune-{new_run_id(config, clock)}",
        data=replace(config.data, version=dataset.version),
    )


def _announce(config: Config, room: Room, sweep: Sweep, lines: list[str]) -> None:
    tune = config.tune
    log.info("sweep %s searches (%s):", config.run_id, tune.search)
    for line in lines:
        log.info("  %s", line)
    known, over = len(sweep.trials), sum(trial.is_over for trial in sweep.trials)
    log.info(
        "%d trials of %g epochs, %s, early stopping %s; %d at once, each %s",
        sweep.num_trials, config.train.epochs, " and ".join(tune.objectives), stopping_rule(tune),
        room.max_concurrent,
        "in one process" if room.kind == "function" else f"by {room.num_workers} workers",
    )  # fmt: skip
    if known:
        log.info("goes on: %d trials are over, %d were under way", over, known - over)


class _costs:  # noqa: N801  a function with settings, which must be pickled
    """Measures those costs of a network that are wanted."""

    def __init__(self, measure: Measure | None, wanted: set[str]) -> None:
        if measure is None and wanted - {"num_parameters"}:
            raise ConfigError(
                f"tune.objectives names {', '.join(sorted(wanted))}, and there is nothing here "
                "that measures it; run jobs/tune.py."
            )
        self._measure, self._wanted = measure, wanted

    def __call__(self, storage: Storage, config: Config) -> dict[str, float]:
        dataset = open_version(storage, config.data.dataset_name, config.data.version)
        found = {"num_parameters": float(count_parameters(initial_model(config, dataset)))}
        if self._measure and self._wanted - set(found):
            found |= self._measure(storage, config)
        return {name: found[name] for name in self._wanted}


def _run(sweep: Sweep, room: Room, work: TrialWork, events: "_Events") -> None:
    """Let Tune run what the sweep suggests, until nothing is left."""
    config = sweep.config
    function = room.kind == "function"
    resources = {
        "CPU": room.cpus_per_worker if function else 0.01,
        "GPU": room.gpus_per_worker if function else 0,
    }
    trainable = ray.tune.with_parameters(run_trial, work=work)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, resources),
        tune_config=ray.tune.TuneConfig(
            search_alg=_Suggestions(sweep, room, events),
            scheduler=_Decisions(events),
            num_samples=-1,
            max_concurrent_trials=room.max_concurrent,
            reuse_actors=function,
        ),
        run_config=ray.tune.RunConfig(
            name=f"session-{uuid.uuid4().hex[:6]}",
            storage_path=sweep.storage.path("runs", config.run_id, "ray"),
            failure_config=ray.tune.FailureConfig(max_failures=config.tune.max_failures),
            callbacks=[_Crashes(events)],
            verbose=0,
        ),
    )
    if not sweep.is_complete:
        tuner.fit()


def _conclude(sweep: Sweep, storage: Storage, began_s: float, clock: Clock) -> TuneResult:
    """Test the winner, once, draw the picture, and write the record."""
    config, trials, winner = sweep.config, sweep.trials, sweep.best()
    if winner is None:
        errors = [trial.error for trial in trials if trial.error]
        raise WorkError(
            f"None of the {len(trials)} trials of sweep {config.run_id} came to its end. The first "
            f"error: {errors[0] if errors else 'none was recorded'}"
        )
    tested = final_test(storage, winner.run_id, config.train)
    picture = f"runs/{config.run_id}/sweep.png"
    storage.write(picture, draw_sweep(config.tune, trials, winner, config.run_id))
    statuses = [trial.status for trial in trials]
    result = TuneResult(
        run_id=config.run_id,
        best_run_id=winner.run_id,
        best_config=winner.assignment,
        best_score=winner.figures[config.tune.objectives[0]],
        objectives=config.tune.objectives,
        test_accuracy=tested.test_accuracy,
        floor_accuracy=tested.floor_accuracy,
        num_trials=len(trials),
        finished=statuses.count("finished"),
        stopped=statuses.count("stopped"),
        failed=statuses.count("failed"),
        budget_epochs=round(sweep.budget_epochs, 3),
        schedule=_schedule(trials, winner),
        front=[trial.run_id for trial in front(config.tune, trials)],
        picture=picture,
        seconds=round(clock.monotonic() - began_s, 3),
    )
    save_tune_result(storage, result)
    told = " ".join(f"--{field} {_words(value)}" for field, value in winner.assignment.items())
    if result.schedule:
        log.info("best: %s, whose settings changed on the way: see schedule", winner.run_id)
    else:
        log.info("best: %s; again as a single run: %s", winner.run_id, told)
    return result


def _schedule(trials: list[Trial], winner: Trial) -> list[dict[str, Any]]:
    line = lineage(trials, winner)
    if len(line) == 1:
        return []
    return [
        {"from_epoch": trial.start_epoch, "run_id": trial.run_id, **trial.assignment}
        for trial in line
    ]


def _words(value: Any) -> str:
    """A value as the command line takes it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


class _Events:
    """What Tune tells, passed to the sweep first, then to those who show and track it."""

    def __init__(self, sweep: Sweep, tracking: SweepTracking, progress: Progress) -> None:
        self.sweep, self._tracking, self._progress = sweep, tracking, progress

    def begun(self, trial: Trial) -> None:
        """A trial is about to run."""
        self._tracking.begin(trial)

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        """A trial reported; gives whether it is to stop."""
        if "failed" in result:
            self.ended(number, error=result["failed"])
            return True
        if "costs" in result:
            self.sweep.cost(number, dict(result["costs"]))
            return False
        stop = self.sweep.report(number, dict(result["record"]))
        self._tracking.record(self.sweep.trial(number))
        if stop:
            self._told(number)
        return stop

    def retried(self, number: int, error: str) -> None:
        """A trial crashed and is begun again."""
        log.warning("trial %d is tried again: %s", number, error)
        self.sweep.retry(number, error)

    def ended(self, number: int, error: str = "") -> None:
        """A trial's work is over."""
        if self.sweep.trial(number).is_over:
            return
        if error:
            self.sweep.fail(number, error)
        else:
            self.sweep.finish(number)
        self._told(number)

    def _told(self, number: int) -> None:
        trial = self.sweep.trial(number)
        self._tracking.end(trial)
        self._progress.show(trial)


class _OfThisProcess:
    """Tune pickles what it is given, to restore it; a sweep never restores Tune."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Suggestions(_OfThisProcess, Searcher):
    """Tune's question what to run next."""

    def __init__(self, sweep: Sweep, room: Room, events: _Events) -> None:
        super().__init__(metric=None, mode=None)
        self._sweep, self._room, self._events = sweep, room, events

    def suggest(self, trial_id: str) -> Any:
        """The next trial's settings; None while there is nothing to do yet."""
        trial = self._sweep.next()
        if trial is None:
            return Searcher.FINISHED
        if isinstance(trial, Wait):
            return None
        self._events.begun(trial)
        segment = Segment(
            begin_with=self._sweep.trial(trial.parent).run_id if trial.parent >= 0 else "",
            stop_epochs=trial.stop_epochs,
        )
        config = self._sweep.settings_of(trial)
        train = replace(
            config.train, num_workers=self._room.num_workers, min_workers=0,
            cpus_per_worker=self._room.cpus_per_worker,
        )  # fmt: skip
        config = replace(config, train=train)
        return {"number": trial.number, "config": config, "segment": segment}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Nothing: the decisions hear of it."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's records are on disk."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see `save`."""


class _Decisions(_OfThisProcess, FIFOScheduler):
    """Tune's question whether a trial goes on."""

    def __init__(self, events: _Events) -> None:
        cast(Any, super()).__init__()
        self._events = events

    def on_trial_result(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> str:
        """Go on, or stop."""
        stop = self._events.reported(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """The trial's function returned."""
        self._events.ended(trial.config["number"])


class _Crashes(_OfThisProcess, Callback):
    """Tune's news that a trial crashed, and whether it is begun again."""

    def __init__(self, events: _Events) -> None:
        self._events = events

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """Keep the count."""
        self._events.retried(trial.config["number"], _error_of(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """The trial crashed once too often."""
        self._events.ended(trial.config["number"], error=_error_of(trial))


def _error_of(trial: TuneTrial) -> str:
    """What a crashed trial left, in one line."""
    path = Path(trial.pickled_error_file or "")
    if not path.is_file():
        return "the process that trained it ended without a word"
    error = cloudpickle.loads(path.read_bytes())
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"[:500]
