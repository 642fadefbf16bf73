"""A configuration with a space -> a sweep run by Ray Tune -> TuneResult, on disk and tracked.

Tune starts the trials, hands actors on from one to the next, and tries again what crashed. What is
tried, stopped and remembered is the sweep's (`rayloop.tune.sweep`); nothing of Tune's own state is
kept, so nothing of it can be lost.
"""

import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.tune
from ray import cloudpickle
from ray.tune.callback import Callback
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from rayloop.clock import SYSTEM_CLOCK, Clock
from rayloop.cluster import memory_of_nodes, sizes_of_nodes
from rayloop.config import Config, ModelConfig
from rayloop.data.versions import DatasetVersion, open_version
from rayloop.errors import ConfigError, RequestError, WorkError
from rayloop.logs import stage_logger
from rayloop.models.classifier import ImageClassifier, count_parameters
from rayloop.storage import Storage
from rayloop.tracking import Tracker, held
from rayloop.train.alone import Segment
from rayloop.train.claim import new_run_id
from rayloop.train.final_test import final_test
from rayloop.train.start import initial_model, order_of, refuse_useless
from rayloop.tune.objective import COSTS
from rayloop.tune.picture import draw_sweep
from rayloop.tune.progress import Progress
from rayloop.tune.result import TuneResult, save_tune_result
from rayloop.tune.room import Room, plan_room
from rayloop.tune.search import front
from rayloop.tune.space import Space, assign
from rayloop.tune.stopping import stopping_rule
from rayloop.tune.suggestion import Wait
from rayloop.tune.sweep import Sweep, read_space
from rayloop.tune.track import SweepTracking
from rayloop.tune.trainable import Measure, TrialWork, run_trial
from rayloop.tune.trial import Trial, lineage

log = stage_logger("tune")

DRAWN_TO_CHECK = 50
"""Draws from the space that are tried against the data before a sweep begins."""


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
    space = read_space(config)
    dataset = open_version(storage, config.data.dataset_name, config.data.version)
    room = plan_room(config, sizes_of_nodes(), sum(memory_of_nodes()))
    _refuse_useless(space, dataset, room)
    config = _fill_in(config, dataset, clock)
    with held(storage, f"sweep-{config.run_id}", f"Sweep {config.run_id!r}"):
        return _run_sweep(config, storage, dataset, room, tracker, measure, clock)


def _run_sweep(
    config: Config, storage: Storage, dataset: DatasetVersion, room: Room, tracker: Tracker,
    measure: Measure | None, clock: Clock,
) -> TuneResult:  # fmt: skip
    began_s = clock.monotonic()
    sweep = Sweep(config, storage, dataset, clock)
    _announce(config, room, sweep)
    tracking = SweepTracking(sweep, tracker, storage, dataset)
    wanted = {name for name in config.tune.objectives if name in COSTS}
    work = TrialWork(
        root=storage.root,
        kind=room.kind,
        num_threads=room.cpus_per_worker,
        measure=_costs(measure, wanted) if wanted else None,
    )
    with tracking.running(), Progress(sweep) as progress:
        if not sweep.is_complete:
            _run(sweep, room, work, _Events(sweep, room, tracking, progress))
        result = _conclude(sweep, storage, tracker, began_s, clock)
        tracking.conclude(result)
    return result


def _fill_in(config: Config, dataset: DatasetVersion, clock: Clock) -> Config:
    """The sweep's name, and the dataset version that all its trials train on."""
    return replace(
        config,
        run_id=config.run_id or f"tune-{new_run_id(config, clock)}",
        data=replace(config.data, version=dataset.version),
    )


def _announce(config: Config, room: Room, sweep: Sweep) -> None:
    tune = config.tune
    log.info("sweep %s searches (%s):", config.run_id, tune.search)
    for line in sweep.space.lines():
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


def _refuse_useless(space: Space, dataset: DatasetVersion, room: Room) -> None:
    """Draw from the space, and refuse it if something that is drawn cannot train on the data."""
    random = np.random.default_rng(0)
    models: dict[ModelConfig, ImageClassifier] = {}
    for _ in range(DRAWN_TO_CHECK):
        assignment = space.sample(random)
        config = assign(space.base, assignment)
        config = replace(config, train=replace(config.train, num_workers=room.num_workers))
        if config.model not in models:
            models[config.model] = initial_model(config, dataset)
        try:
            refuse_useless(config, dataset, models[config.model])
        except RequestError as error:
            told = ", ".join(f"{field}={value}" for field, value in assignment.items())
            raise ConfigError(f"tune.space allows {told}, and that is refused: {error}") from None
    if space.base.tune.search == "pbt":
        train = space.base.train
        turn = space.base.tune.perturb_epochs * order_of(train, dataset).num_rows
        if turn < train.global_batch_size:
            raise ConfigError(
                f"tune.perturb_epochs={space.base.tune.perturb_epochs} is less than one step of "
                f"{train.global_batch_size} rows; use a longer turn."
            )


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
            search_alg=_Suggestions(events),
            scheduler=_Decisions(events),
            num_samples=-1,
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
    try:
        tuner.fit()
    except ray.tune.TuneError:
        if events.error is None:
            raise
    finally:
        sweep.storage.remove(f"runs/{config.run_id}/ray")
    if events.error is not None:
        raise events.error
    if not sweep.is_complete:
        raise WorkError(
            f"Sweep {config.run_id} was ended before all its trials were over; go on with it by "
            "the same command."
        )


def _conclude(
    sweep: Sweep, storage: Storage, tracker: Tracker, began_s: float, clock: Clock
) -> TuneResult:
    """Test the winner, once, draw the picture, and write the record."""
    config, trials, winner = sweep.config, sweep.trials, sweep.best()
    if winner is None:
        errors = [trial.error for trial in trials if trial.error]
        raise WorkError(
            f"None of the {len(trials)} trials of sweep {config.run_id} came to its end. The first "
            f"error: {errors[0] if errors else 'none was recorded'}"
        )
    tracked = tracker.find(winner.run_id) or ""
    tested = final_test(storage, winner.run_id, config.train, tracked)
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
    told = " ".join(_flag(field, value) for field, value in winner.assignment.items())
    if result.schedule:
        log.info("best: %s, whose settings changed on the way: see schedule", winner.run_id)
    else:
        log.info("best: %s; the same as a single run, with %s", winner.run_id, told)
    return result


def _schedule(trials: list[Trial], winner: Trial) -> list[dict[str, Any]]:
    line = lineage(trials, winner)
    if len(line) == 1:
        return []
    return [
        {"from_epoch": trial.start_epoch, "run_id": trial.run_id, **trial.assignment}
        for trial in line
    ]


def _flag(field: str, value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, bool):
        section, name = field.rsplit(".", 1)
        return f"--{field}" if value else f"--{section}.no-{name}"
    return f"--{field} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"


class _Events:
    """What Tune asks and tells, passed to the sweep first, then to those who show and track it.

    The first error of our own is kept: Tune would wrap it, or take it for a crash of the trial.
    """

    def __init__(
        self, sweep: Sweep, room: Room, tracking: SweepTracking, progress: Progress
    ) -> None:
        self._sweep, self._room, self._tracking, self._progress = sweep, room, tracking, progress
        self._running: set[int] = set()
        self._given_up: set[str] = set()
        """Tune's ids of its trials that have crashed for good."""
        self.error: Exception | None = None

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """Keep what is raised, so that it ends the sweep as it is."""
        if self.error is not None:
            raise self.error
        try:
            yield
        except Exception as error:
            self.error = error
            raise

    def wanted(self) -> dict[str, Any] | Wait | None:
        """The settings of the trial to begin now, if there is room for one more."""
        if len(self._running) >= self._room.max_concurrent:
            return Wait.FOR_TRIALS
        trial = self._sweep.next()
        if trial is None or isinstance(trial, Wait):
            return trial
        self._running.add(trial.number)
        config = self._sweep.settings_of(trial)
        train = replace(
            config.train, num_workers=self._room.num_workers, min_workers=0,
            cpus_per_worker=self._room.cpus_per_worker, max_failures=0,  # Tune tries again
        )  # fmt: skip
        config = replace(config, train=train)
        self._tracking.begin(trial, config)
        parent = self._sweep.trial(trial.parent).run_id if trial.parent >= 0 else ""
        segment = Segment(begin_with=parent, stop_epochs=trial.stop_epochs)
        return {"number": trial.number, "config": config, "segment": segment}

    def reported(self, number: int, result: dict[str, Any]) -> bool:
        """A trial reported; gives whether it is to stop."""
        if "stuck" in result:
            raise result["stuck"][0]
        if "failed" in result:
            self.ended(number, error=result["failed"])
            return True
        if "costs" in result:
            self._sweep.cost(number, dict(result["costs"]))
            return False
        stop = self._sweep.report(number, dict(result["record"]))
        self._tracking.record(self._sweep.trial(number))
        if stop:
            self._told(number)
        return stop

    def retried(self, number: int, error: str) -> None:
        """A trial crashed and is begun again by Tune."""
        log.warning("trial %d is tried again: %s", number, error)
        self._sweep.retry(number, error)

    def crashed(self, tune_trial: TuneTrial) -> None:
        """A trial crashed and Tune gives it up; as often as is allowed it is begun again."""
        if tune_trial.trial_id in self._given_up:
            return
        self._given_up.add(tune_trial.trial_id)
        number, error = tune_trial.config["number"], _error_of(tune_trial)
        trial = self._sweep.trial(number)
        if not trial.is_over and trial.attempts <= self._sweep.config.tune.max_failures:
            log.warning("trial %d is tried again: %s", number, error)
            self._running.discard(number)
            self._sweep.requeue(number)
        else:
            self.ended(number, error=error)

    def ended(self, number: int, error: str = "") -> None:
        """A trial's work is over."""
        if self._sweep.trial(number).is_over:
            return
        if error:
            self._sweep.fail(number, error)
        else:
            self._sweep.finish(number)
        self._told(number)

    def lost(self, trials: Iterable[TuneTrial]) -> None:
        """Trials that Tune has given up without a word."""
        for trial in trials:
            if trial.status == TuneTrial.ERROR:
                self.crashed(trial)

    def _told(self, number: int) -> None:
        trial = self._sweep.trial(number)
        self._running.discard(number)
        self._tracking.end(trial)
        self._progress.show(trial)


class _OfThisProcess:
    """Tune pickles what it is given, to restore it; a sweep never restores Tune."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Suggestions(_OfThisProcess, Searcher):
    """Tune's question what to run next."""

    def __init__(self, events: _Events) -> None:
        super().__init__(metric=None, mode=None)
        self._events = events

    def suggest(self, trial_id: str) -> Any:
        """The next trial's settings; None while there is nothing to do yet."""
        with self._events.keeping_errors():
            wanted = self._events.wanted()
        if wanted is None:
            return Searcher.FINISHED
        return None if isinstance(wanted, Wait) else wanted

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
        with self._events.keeping_errors():
            stop = self._events.reported(trial.config["number"], result)
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def on_trial_complete(self, controller: Any, trial: TuneTrial, result: dict[str, Any]) -> None:
        """The trial's function returned."""
        with self._events.keeping_errors():
            self._events.ended(trial.config["number"])


class _Crashes(_OfThisProcess, Callback):
    """Tune's news that a trial crashed, and whether it is begun again."""

    def __init__(self, events: _Events) -> None:
        self._events = events

    def on_trial_recover(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """Keep the count."""
        with self._events.keeping_errors():
            self._events.retried(trial.config["number"], _error_of(trial))

    def on_trial_error(self, iteration: int, trials: Any, trial: TuneTrial, **_: Any) -> None:
        """The trial crashed once too often, or where Tune does not try again."""
        with self._events.keeping_errors():
            self._events.crashed(trial)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **_: Any) -> None:
        """Tune tells nobody of a trial that could not be handed to a used actor."""
        with self._events.keeping_errors():
            self._events.lost(trials)


def _error_of(trial: TuneTrial) -> str:
    """What a crashed trial left, in one line."""
    path = Path(trial.pickled_error_file or "")
    if not path.is_file():
        return "the process that trained it ended without a word"
    error = cloudpickle.loads(path.read_bytes())
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0]}"[:500]
